"""Finds a model by what the user calls it: one that comes with the pack, a folder, or one in the Hugging Face cache."""

import json
from pathlib import Path

from huggingface_hub import constants

from ...errors import RequestError

DEMO, DEMO_I2V = "demo", "demo-i2v"
"""The small trained models that come with the pack: text to video, and image to video, which borrows VAE and text from it."""
SHIPPED = Path(__file__).parents[2] / "checkpoints"
"""Where they are; how they were made is in ``training/``."""
TRANSFORMER = Path("transformer", "config.json")
"""In every folder in diffusers layout."""
CACHED = "models--"
"""How the names of the Hugging Face cache's folders of models begin; ``models--ORG--NAME`` is ORG/NAME."""


def shipped() -> dict[str, Path]:
    """The models that come with the pack, by name."""
    return {name: SHIPPED / name for name in (DEMO, DEMO_I2V)}


def hub_cache() -> Path:
    """Returns the folder of the Hugging Face cache."""
    return Path(constants.HF_HUB_CACHE)


def hub_models() -> dict[str, Path]:
    """The CogVideoX checkpoints in the Hugging Face cache, by ``ORG/NAME``."""
    found = ((folder, checkpoint_in(folder)) for folder in sorted(hub_cache().glob(f"{CACHED}*")))
    return {
        name_in_cache(folder): checkpoint for folder, checkpoint in found if checkpoint is not None and is_cogvideox(checkpoint)
    }


def name_in_cache(folder: Path) -> str:
    """What a model is called whose folder in the Hugging Face cache this is."""
    return folder.name.removeprefix(CACHED).replace("--", "/")


def checkpoint_in(folder: Path) -> Path | None:
    """The folder in diffusers layout that a folder is, or that it holds as one of the Hugging Face cache; None for another.

    Of several downloaded versions it is the one that ``main`` names, or the newest.
    """
    if (folder / TRANSFORMER).is_file():
        return folder
    versions = [path.parents[1] for path in folder.glob(str(Path("snapshots", "*", TRANSFORMER)))]
    if len(versions) > 1:
        try:
            main = (folder / "refs" / "main").read_text().strip()
        except OSError:
            main = None
        versions.sort(key=lambda version: (version.name == main, version.stat().st_mtime))
    return versions[-1] if versions else None


def is_cogvideox(folder: Path) -> bool:
    """Whether a folder in diffusers layout holds a CogVideoX. One whose configuration cannot be read may: opening it says more."""
    try:
        return "CogVideoX" in json.loads((folder / TRANSFORMER).read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return True


def find(name: str) -> Path:
    """The checkpoint for the name of a model that comes with the pack, for a path, which may be a transformer's single file, or for
    ``ORG/NAME`` of a model in the Hugging Face cache.

    Raises:
        RequestError: when there is none.
    """
    if name in shipped():
        return shipped()[name]
    path = Path(name).expanduser()
    if path.exists():
        return (checkpoint_in(path) or path).resolve()
    if found := hub_models().get(name):
        return found.resolve()
    names = " or ".join(f"'{known}'" for known in shipped())
    raise RequestError(
        f"there is no checkpoint folder {path}; give a folder in diffusers layout, {names}, or ORG/NAME of a model in the "
        f"Hugging Face cache ({hub_cache()})"
    )
