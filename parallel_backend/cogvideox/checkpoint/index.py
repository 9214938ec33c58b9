"""The configuration files of a checkpoint folder, and the sibling folder that provides missing parts."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import RequestError
from . import weights

LENDER = "_parts_from"
"""Key in ``model_index.json``: the name of a sibling folder that provides the parts that this folder lacks. The bundled models
use it to store VAE and text encoder once. diffusers ignores keys that start with an underscore."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Reads a component's JSON configuration.

    Raises:
        RequestError: if the file is missing, unreadable, or no JSON object.
    """
    path = folder / name
    try:
        return weights.json_object(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"the checkpoint has no {path}; download the complete folder, in diffusers layout") from None
    except OSError as error:
        raise weights.unreadable(path, error) from error
    except ValueError as error:
        raise RequestError(f"{path} cannot be read: {error}; download it again") from error


def folder_of(path: Path, part: str, lender: Path | None) -> Path:
    """Returns the folder of a part: the checkpoint's own, or else the lender's."""
    own = path / part
    return lender / part if lender and not own.is_dir() else own


def state(path: Path) -> tuple:
    """Returns the fingerprint of a checkpoint folder and of its lender: names, sizes and modification times of their files."""
    folders = [path, *filter(None, [lender_of(path, read_index(path))])]
    found = (file for folder in folders for file in sorted((*folder.glob("*"), *folder.glob("*/*"))))
    return weights.fingerprint(file for file in found if file.is_file())


def read_index(path: Path) -> dict[str, Any]:
    """Reads ``model_index.json``; empty if there is none."""
    found = path / "model_index.json"
    return read_found_index(path, weights.fingerprint([found])) if found.exists() else {}


@lru_cache(maxsize=8)
def read_found_index(path: Path, state: tuple) -> dict[str, Any]:
    """Reads ``model_index.json``; cached by its fingerprint ``state``."""
    return read_config(path, "model_index.json")


def lender_of(path: Path, index: dict[str, Any]) -> Path | None:
    """Returns the folder that provides missing parts, or None. It is always a sibling of ``path``, whatever the index says."""
    name = Path(str(index.get(LENDER, ""))).name
    return path.parent / name if name not in ("", "..") else None
