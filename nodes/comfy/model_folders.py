"""The models, LoRAs and ControlNets in ComfyUI's folders and in the Hugging Face cache, by the names that nodes show.

A name is the kind of folder and the path inside it. Saved workflows contain it. If two folders of a kind contain the same name,
the first one keeps it, and the second name is followed by its folder.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ...parallel_backend.cogvideox.checkpoint import bundled, catalogue, single_file
from ...parallel_backend.cogvideox.checkpoint.controlnet import is_controlnet
from ...parallel_backend.cogvideox.transformer.lora import SUFFIXES
from ...parallel_backend.errors import RequestError

MODEL_FOLDERS = ("CogVideo", "diffusers", "CogVideoX_Fun", "Fun_Models", "VideoX_Fun")
"""The CogVideoX wrapper's folder, the core's, and those of VideoX-Fun's nodes."""
FILES = "diffusion_models"
LORA_FOLDERS = {"loras": "", "cogvideox_loras": "CogVideo/loras/"}
"""ComfyUI's name of each kind of folder, and the prefix of the names shown. The second kind is the CogVideoX wrapper's."""
INSIDE = {"cogvideox_loras": "CogVideo/loras", "cogvideox_controlnets": "CogVideo/ControlNet"}
"""The path inside ComfyUI's models folder, for a kind whose folder is not named after it."""
CONTROLNET_FOLDERS = {"controlnet": "", "cogvideox_controlnets": "CogVideo/ControlNet/"}
"""Likewise for ControlNets."""
HUB = "huggingface"
OFFER = " (download: "
"""In the name of a model that is not here, what stands between the name that it is going to have and its size."""
LEVELS = 3
"""The depth to which folders are searched for checkpoints, such as ``CogVideo/ORG/NAME``."""


def roots_of(kind: str) -> list[Path]:
    """Returns ComfyUI's folders for a kind of model.

    The one in ComfyUI's own models folder is always included, and those next to any folder of ``extra_model_paths.yaml``: for a kind
    that the core does not know, ComfyUI has only the folders that this file names so.
    """
    default = Path(folder_paths.models_dir) / INSIDE.get(kind, kind)
    try:
        named = [Path(root) for root in folder_paths.get_folder_paths(kind)]
    except KeyError:
        named = []
    beside = [] if kind in INSIDE else [parent / kind for parent in parents() if os.path.isdir(parent / kind)]
    return list(dict.fromkeys([*(named if default in named else [default, *named]), *beside]))


def parents() -> list[Path]:
    """Returns the folders that hold ComfyUI's folders of models, such as the ``base_path`` of ``extra_model_paths.yaml``."""
    known = (root for roots, _ in folder_paths.folder_names_and_paths.values() for root in roots)
    return list(dict.fromkeys(Path(root).parent for root in known))


def add(found: dict[str, Path], name: str, path: Path, root: Path) -> None:
    """Adds a path under a name, or under the name and its root if the name is taken. A link to the same path is skipped."""
    if name in found:
        if found[name].resolve() == path.resolve():
            return
        name = f"{name} ({root})"
    found[name] = path


def folders_below(root: Path, levels: int = LEVELS) -> Iterator[Path]:
    """Yields the checkpoint folders below a root.

    It does not search inside a checkpoint or deeper than ``levels``: disks may be slow, and links may form loops.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return
    for folder in (root / name for name in names):
        if bundled.checkpoint_in(folder):
            yield folder
        elif levels > 1:
            yield from folders_below(folder, levels - 1)


def model_folders() -> dict[str, Path]:
    """Returns the checkpoint folders that can be loaded, by the name shown. Other models in the same folders are left out."""
    found: dict[str, Path] = {}
    for kind in MODEL_FOLDERS:
        for root in roots_of(kind):
            for folder in folders_below(root):
                checkpoint = bundled.checkpoint_in(folder)
                if bundled.is_cogvideox(checkpoint):
                    add(found, f"{kind}/{folder.relative_to(root).as_posix()}", checkpoint, root)
    return found | {f"{HUB}/{name}": path for name, path in bundled.hub_models().items()}


def model_files() -> dict[str, Path]:
    """Returns the single files of CogVideoX transformers, by the name shown. Other models in the same folders are left out."""
    found: dict[str, Path] = {}
    own = [kind for kind in MODEL_FOLDERS if kind != "diffusers"]
    places = [
        (kind, root, path.name) for kind in own for root in roots_of(kind) for path in bundled.matches(root, "*.safetensors")
    ]
    places += [(FILES, root, name) for name in folder_paths.get_filename_list(FILES) for root in roots_of(FILES)]
    for kind, root, name in places:
        if single_file.is_cogvideox(root / name):
            add(found, f"{kind}/{Path(name).as_posix()}", root / name, root)
    return found


def model_names() -> list[str]:
    """Returns the names of all models: first those that are part of the pack, then folders, then files."""
    return [*bundled.shipped(), *model_folders(), *model_files()]


def offers(names: Iterable[str]) -> list[str]:
    """Returns the names of published models that are not here, each with its size and licence.

    Args:
        names: of the models that are here.
    """
    here = {catalogue.named_after(last_part(name)) for name in names}
    return [
        f"{MODEL_FOLDERS[0]}/{model.folder}{OFFER}{model.terms})"
        for short, model in catalogue.MODELS.items()
        if short not in here
    ]


def last_part(name: str) -> str:
    """Returns the name of a model's folder in a name that is shown."""
    return name.partition(" (")[0].rpartition("/")[2]


class NotDownloaded(RequestError):
    """A published model that is not here. ``short`` is its name in the catalogue."""

    def __init__(self, short: str):
        model = catalogue.MODELS[short]
        super().__init__(
            f"{model.folder} is not downloaded ({model.terms}): set download in Load CogVideoX to huggingface or modelscope, or "
            f"run {catalogue.DOWNLOAD} {short}"
        )
        self.short = short


def find_model(name: str) -> Path:
    """Returns the folder or file of a model.

    A published model is found under any name that ends with its folder's, so that a workflow works before and after the download,
    and on a computer that has the model elsewhere.

    Raises:
        NotDownloaded: for a published model that is not here.
        RequestError: for another name that is not in the list.
    """
    if name in bundled.shipped():
        return bundled.shipped()[name]
    found = model_folders() | model_files()
    if name in found:
        return found[name]
    short = catalogue.named_after(last_part(name))
    if short is None:
        raise RequestError(
            f"there is no model '{name}'; put a folder into models/CogVideo or models/diffusers, or a .safetensors file into "
            "models/diffusion_models"
        )
    same = [path for other, path in found.items() if catalogue.named_after(last_part(other)) == short]
    if not same:
        raise NotDownloaded(short)
    return same[0]


def files_of(kind: str) -> Iterator[tuple[Path, str]]:
    """Yields the folder of each .safetensors file of a kind, and its path inside. The wrapper's kinds are in each ``CogVideo``, too."""
    roots = roots_of(kind)
    if kind in INSIDE:
        roots += [root / Path(INSIDE[kind]).name for root in roots_of("CogVideo")]
    for root in dict.fromkeys(roots):
        names, _ = folder_paths.recursive_search(str(root), [".git"])
        yield from ((root, name) for name in sorted(names) if name.endswith(SUFFIXES))


def lora_files() -> dict[str, Path]:
    """Returns the LoRA files that can be loaded, by the name shown."""
    found: dict[str, Path] = {}
    for kind, shown in LORA_FOLDERS.items():
        for root, name in files_of(kind):
            add(found, shown + name, root / name, root)
    return found


def find_lora(name: str) -> Path:
    """Returns the file of a LoRA.

    Raises:
        RequestError: for a name that is not in the list.
    """
    files = lora_files()
    if name not in files:
        raise RequestError(
            f"there is no LoRA '{name}' in models/loras or models/CogVideo/loras; put its .safetensors file there"
        )
    return files[name]


def controlnets() -> dict[str, Path]:
    """Returns the ControlNets for CogVideoX, folders and files, by the name shown. Others in the same folders are left out."""
    found: dict[str, Path] = {}
    for kind, shown in CONTROLNET_FOLDERS.items():
        for root, path in dict.fromkeys((root, controlnet_of(root / name)) for root, name in files_of(kind)):
            if is_controlnet(path):
                add(found, shown + path.relative_to(root).as_posix(), path, root)
    return found


def controlnet_of(path: Path) -> Path:
    """Returns what a file of weights is a part of: its folder if that has a configuration, else the file itself."""
    return path.parent if os.path.isfile(path.parent / "config.json") else path


def find_controlnet(name: str) -> Path:
    """Returns the folder or file of a ControlNet.

    Raises:
        RequestError: for a name that is not in the list.
    """
    found = controlnets()
    if name not in found:
        raise RequestError(
            f"there is no ControlNet '{name}' in models/controlnet or models/CogVideo/ControlNet; put its folder there, such as that of "
            "TheDenk/cogvideox-5b-controlnet-canny-v1"
        )
    return found[name]
