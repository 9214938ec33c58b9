"""The configuration files of a checkpoint folder, and the folder that lends it parts."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import RequestError
from . import weights

LENDER = "_parts_from"
"""In ``model_index.json``: the name of the folder beside it that lends what this one lacks, so that the VAE and the text
encoder of the pack's two models are stored once. diffusers passes over names that begin so."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's JSON configuration.

    Raises:
        RequestError: when the file is missing or is no JSON.
    """
    path = folder / name
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"the checkpoint has no {path}; download the folder whole, in diffusers layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}; download it again") from error


def folder_of(path: Path, part: str, lender: Path | None) -> Path:
    """A part's folder: the checkpoint's own, or the one that is lent."""
    own = path / part
    return lender / part if lender and not own.is_dir() else own


def state(path: Path) -> tuple:
    """Changes when a file of a checkpoint folder, or of one that lends it parts, does: names, sizes and times of change."""
    folders = [path, *filter(None, [lender_of(path, read_index(path))])]
    found = (file for folder in folders for file in sorted((*folder.glob("*"), *folder.glob("*/*"))))
    return weights.fingerprint(file for file in found if file.is_file())


def read_index(path: Path) -> dict[str, Any]:
    """What ``model_index.json`` says; nothing where there is none."""
    found = path / "model_index.json"
    return read_found_index(path, weights.fingerprint([found])) if found.exists() else {}


@lru_cache(maxsize=8)
def read_found_index(path: Path, state: tuple) -> dict[str, Any]:
    """The index of a folder in one state."""
    return read_config(path, "model_index.json")


def lender_of(path: Path, index: dict[str, Any]) -> Path | None:
    """The folder beside a checkpoint's that lends it parts; nowhere else, whatever the index says."""
    name = Path(str(index.get(LENDER, ""))).name
    return path.parent / name if name not in ("", "..") else None
