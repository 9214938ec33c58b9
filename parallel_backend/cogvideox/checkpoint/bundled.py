"""Finds a checkpoint by the user's name for it: a bundled model, a path, or a model that was downloaded."""

import json
import os
from pathlib import Path

from huggingface_hub import constants

from ...errors import RequestError
from . import catalogue

DEMO, DEMO_I2V = "demo", "demo-i2v"
"""The small trained models that come with the pack. The image-to-video one shares VAE and text encoder with the other."""
SHIPPED = Path(__file__).parents[2] / "checkpoints"
"""The bundled models' folder; ``training/`` has the scripts that made them."""
PACK = Path(__file__).parents[3]
"""The pack's folder; in ComfyUI it is in ``custom_nodes``."""
MODELS_FOLDER = Path("models", "CogVideo")
"""Where the pack keeps models in ComfyUI's folder. The CogVideoX wrapper uses it too."""
TRANSFORMER = Path("transformer", "config.json")
"""A file that every folder in diffusers layout has."""
CACHED = "models--"
"""Prefix of model folders in the Hugging Face cache: ``models--ORG--NAME`` is ORG/NAME."""


def shipped() -> dict[str, Path]:
    """Returns the bundled models' folders by name."""
    return {name: SHIPPED / name for name in (DEMO, DEMO_I2V)}


def hub_cache() -> Path:
    """Returns the folder of the Hugging Face cache."""
    return Path(constants.HF_HUB_CACHE)


def hub_models() -> dict[str, Path]:
    """Returns the CogVideoX checkpoints in the Hugging Face cache by ``ORG/NAME``."""
    found = ((folder, checkpoint_in(folder)) for folder in matches(hub_cache(), f"{CACHED}*"))
    return {
        name_in_cache(folder): checkpoint for folder, checkpoint in found if checkpoint is not None and is_cogvideox(checkpoint)
    }


def folder_in_cache(repository: str) -> Path:
    """Returns the folder of a model in the Hugging Face cache, whether it exists or not."""
    return hub_cache() / f"{CACHED}{repository.replace('/', '--')}"


def comfyui() -> Path | None:
    """Returns the folder of the ComfyUI that the pack is installed in, or None."""
    root = PACK.parents[1]
    return root if PACK.parent.name == "custom_nodes" and (root / "models").is_dir() else None


def downloaded(name: str) -> Path | None:
    """Returns the folder of a model that was downloaded to the Hugging Face cache or to the models of this ComfyUI, or None.

    Args:
        name: of a published model, or ORG/NAME.
    """
    repository, root = catalogue.repository_of(name), comfyui()
    if repository is None:
        return None
    in_comfyui = root and checkpoint_in(root / MODELS_FOLDER / repository.partition("/")[2])
    return in_comfyui or hub_models().get(repository)


def name_in_cache(folder: Path) -> str:
    """Returns the ``ORG/NAME`` of a model's folder in the Hugging Face cache."""
    return folder.name.removeprefix(CACHED).replace("--", "/")


def name_of(path: Path) -> str:
    """Returns the name of a checkpoint that is shown to the user.

    It is the folder's or the file's name, or ORG/NAME in the Hugging Face cache, where the folder's name is a hash.
    """
    return name_in_cache(path.parents[1]) if path.parent.name == "snapshots" else path.name


def checkpoint_in(folder: Path) -> Path | None:
    """Returns the folder in diffusers layout: ``folder`` itself, or its snapshot if it is a model in the Hugging Face cache.

    If several snapshots were downloaded, it is the one that ``main`` points to, or else the newest. None if there is none.
    """
    if os.path.isfile(folder / TRANSFORMER):  # unlike Path.is_file it does not raise if the folder cannot be read
        return folder
    versions = [path.parents[1] for path in matches(folder, str(Path("snapshots", "*", TRANSFORMER)))]
    if len(versions) > 1:
        try:
            main = (folder / "refs" / "main").read_text().strip()
        except OSError:
            main = None
        versions.sort(key=lambda version: (version.name == main, version.stat().st_mtime))
    return versions[-1] if versions else None


def matches(folder: Path, pattern: str) -> list[Path]:
    """Returns what a folder has, in order; nothing if it cannot be read, such as a network drive that is gone."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def is_cogvideox(folder: Path) -> bool:
    """Returns whether a folder in diffusers layout holds a CogVideoX model.

    True if the configuration cannot be read: opening the checkpoint then reports why.
    """
    try:
        return "CogVideoX" in json.loads((folder / TRANSFORMER).read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def find(name: str) -> Path:
    """Returns the checkpoint's path.

    Args:
        name: of a bundled model; or a path to a folder or to a transformer's single file; or, of a model that was downloaded, the
            name in :mod:`.catalogue` or ORG/NAME.
    Raises:
        RequestError: if there is no such checkpoint.
    """
    if name in shipped():
        return shipped()[name]
    path = Path(name).expanduser()
    if path.exists():
        return (checkpoint_in(path) or path).resolve()
    if found := downloaded(name):
        return found.resolve()
    if catalogue.repository_of(name):
        raise RequestError(
            f"the model {name} is not downloaded: run {catalogue.DOWNLOAD} {name}. It was looked for in the Hugging Face cache "
            f"({hub_cache()}), and there is no folder of that name"
        )
    names = ", ".join([*shipped(), *catalogue.MODELS])
    raise RequestError(
        f"there is no checkpoint folder {path}; give a folder in diffusers layout, ORG/NAME of a model in the Hugging Face cache "
        f"({hub_cache()}), or one of {names}"
    )
