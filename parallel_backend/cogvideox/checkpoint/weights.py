"""Reads the safetensors files of one component: checks their headers, sizes and shapes, and loads single tensors."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...errors import RequestError, reason_of

MAX_HEADER = 100 * 2**20
LFS_POINTER = b"version https://git-lfs"
"""How a text file begins that git leaves where a large file was not downloaded."""
DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def header(path: Path) -> dict:
    """Reads the header of a safetensors file: dtype, shape and offsets by name.

    Raises:
        RequestError: if the file is missing, unreadable, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise RequestError(
                    f"{path} is a Git LFS pointer of {size} bytes, not the file itself; run 'git lfs pull' in its folder, or download it"
                )
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise RequestError(f"{path} is truncated or not a safetensors file; download it again")
            text = file.read(length)
    except FileNotFoundError:
        raise RequestError(f"the checkpoint lacks {path}; download the complete folder") from None
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        entries = json_object(text)
        entries.pop("__metadata__", None)
        sum(math.prod(entry["shape"]) for entry in entries.values() if entry["dtype"])  # fails unless shapes hold numbers
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestError(f"{path} is not a safetensors file ({reason_of(error)}); download it again") from error
    if end != size:
        raise RequestError(f"{path} is {size:,} bytes but should be {end:,}: it is cut off; download it again")
    return entries


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parses JSON that is an object.

    Raises:
        ValueError: if it is not.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and no object")
    return found


def unreadable(path: Path, error: OSError) -> RequestError:
    """Returns the error for a file that is there and cannot be read."""
    return RequestError(f"{path} cannot be read: {error.strerror or error}; change its permissions, or download it again")


def files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a component; if it is sharded, those of its index.

    Raises:
        RequestError: if there are none, or only pickled ones.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json_object(index.read_bytes())["weight_map"].values())
            return [folder / name for name in sorted(names)]
        except OSError as error:
            raise unreadable(index, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{index} lists no weights; download it again") from error
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise RequestError(f"{folder} holds pickled weights (.bin or .pt); only safetensors are supported: convert them")
        raise RequestError(f"the checkpoint has no weights in {folder}; download the complete folder")
    return found


def elements(folder: Path) -> int:
    """Counts the weight elements of a component, after checking that all of its files are complete.

    Raises:
        RequestError: if a file is missing or truncated.
    """
    return sum(math.prod(entry["shape"]) for path in files(folder) for entry in header(path).values())


@dataclass(frozen=True)
class Stored:
    """The location of a weight on disk."""

    path: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def stored(folder: Path) -> dict[str, Stored]:
    """Returns the location of each weight of a component, by name."""
    return {name: Stored(path, name, tuple(entry["shape"])) for path in files(folder) for name, entry in header(path).items()}


Cut = Callable[[str, tuple[int, ...]], tuple[slice, ...]]
"""Returns the slices to read of a weight, given its name and shape."""


def tensors(wanted: dict[str, Stored], cut: Cut = lambda name, shape: ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields weights one at a time, in their stored dtype. Reads only the slices that ``cut`` returns.

    A full weight stays in the file's memory mapping, which the machine's processes share, until it is moved or converted.
    """
    for path in sorted({where.path for where in wanted.values()}):
        with safe_open(path, "pt") as file:
            for name, where in sorted(wanted.items()):
                if where.path != path:
                    continue
                part = cut(name, where.shape)
                if all(piece == slice(0, length) for piece, length in zip(part, where.shape)):
                    yield name, file.get_tensor(where.name)
                else:
                    yield name, file.get_slice(where.name)[part]


def stored_dtype(folder: Path) -> str:
    """Returns the dtype that most elements of a component are stored in, by its safetensors name."""
    return most_common_dtype(entry for path in files(folder) for entry in header(path).values())


def most_common_dtype(entries: Iterable[dict]) -> str:
    """Returns the dtype that most elements of these header entries have, by its safetensors name."""
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
    return max(counts, key=counts.get, default="F32")


def fingerprint(paths: Iterable[Path]) -> tuple:
    """Returns the paths, sizes and modification times of files, which change when a file does."""
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
