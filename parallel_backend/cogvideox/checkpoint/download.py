"""Downloads a model: only the files that are needed, resumed after a cut, and checked against the hub's sizes and hashes."""

import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from ...errors import Failure, RequestError, WriteFailure, reason_of
from ...system.files import FULL
from . import bundled
from .hubs import Hub, RemoteFile, Repository, answering

logger = logging.getLogger(__name__)

PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
"""The folders of a model in diffusers layout that are read."""
KINDS = (".json", ".model", ".safetensors", ".txt")
"""What is read of them. Weights of other kinds, and images, are left out."""
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema|ema)(?=[-.])")
"""In the name of a file: the same weights in another dtype."""
PARTIAL = ".partial"
"""Ending of a file that is not complete."""
GB = 1e9


@dataclass(frozen=True)
class Download:
    """What is to be downloaded, and where to."""

    hub: Hub
    repository: Repository
    files: list[RemoteFile]
    """Those that are needed; the file by which a folder is recognised as a model comes last."""
    folder: Path
    is_cached: bool
    """Whether the folder is a snapshot in the Hugging Face cache."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def describe(self) -> str:
        """What it is, its size and its licence, in one line."""
        return (
            f"{self.repository.name} from {self.hub.endpoint}: {self.size / GB:.1f} GB in {len(self.files)} files; "
            f"licence: {self.repository.licence}"
        )


def needed(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Returns the files of a repository that this pack reads.

    Weights in another dtype are left out if the same weights are there without it.
    """
    found = {file.path: file for file in files if is_read(PurePosixPath(file.path))}
    folders = {str(PurePosixPath(path).parent) for path in found if path.endswith(".safetensors") and not VARIANT.search(path)}
    kept = [file for path, file in found.items() if not (VARIANT.search(path) and str(PurePosixPath(path).parent) in folders)]
    return sorted(kept, key=lambda file: (file.path == bundled.TRANSFORMER.as_posix(), -file.size, file.path))


def is_read(path: PurePosixPath) -> bool:
    """Whether a file is read, by its path in the repository. The licence is kept with the model."""
    if len(path.parts) == 1:
        return path.name == "model_index.json" or path.name.upper().startswith("LICENSE")
    return len(path.parts) == 2 and path.parts[0] in PARTS and path.suffix in KINDS


def prepare(hub: Hub, repository: str, folder: Path | None) -> Download:
    """Asks the hub for a model's files.

    Args:
        hub: to ask.
        repository: ORG/NAME of the Hugging Face hub.
        folder: of the model, to write to; None for the Hugging Face cache.
    Raises:
        RequestError: if there is no such model, or not in a layout that can be read.
        Failure: if the hub does not answer.
    """
    found = hub.look(repository)
    files = needed(found.files)
    paths = {file.path for file in files}
    if bundled.TRANSFORMER.as_posix() not in paths:
        raise RequestError(f"{found.name} is not in diffusers layout (no {bundled.TRANSFORMER}), see {found.page}")
    if not any(path.startswith("transformer/") and path.endswith(".safetensors") for path in paths):
        raise RequestError(f"{found.name} has no safetensors in transformer/, and nothing else is read; see {found.page}")
    if folder is not None:
        return Download(hub, found, files, folder, is_cached=False)
    if found.commit is None:
        raise RequestError(f"from {hub.title} give a folder: --comfyui PATH, or --output FOLDER")
    return Download(hub, found, files, bundled.folder_in_cache(found.name) / "snapshots" / found.commit, is_cached=True)


def download(wanted: Download, on_bytes: Callable[[int], None] = lambda done: None) -> None:
    """Downloads what is missing, and checks all files. What a cut leaves is used by the next call.

    Args:
        wanted: what and where to.
        on_bytes: called after each chunk with the bytes that are there of all files. To stop, it raises
            :class:`..errors.Cancelled`, and what is there stays.
    Raises:
        WriteFailure: if the disk is full, or has too little space from the start.
        Failure: if the hub does not answer, or a file is not what the hub says it is. That file is removed.
    """
    check_space(wanted)
    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    done = 0
    for number, file in enumerate(wanted.files, 1):
        logger.info("%d of %d: %s (%.2f GB)", number, len(wanted.files), file.path, file.size / GB)
        try:
            fetch(wanted, file, lambda there, before=done: on_bytes(before + there))
        except OSError as error:
            if error.errno not in FULL:
                raise Failure(f"{file.path} cannot be written in {wanted.folder}: {error.strerror or error}") from error
            raise WriteFailure(
                f"{file.path} cannot be written in {wanted.folder}: {error.strerror}; free space, and try again: "
                "it goes on where it stopped"
            ) from error
        done += file.size
        on_bytes(done)
    if wanted.is_cached:
        main = wanted.folder.parents[1] / "refs" / "main"
        main.parent.mkdir(exist_ok=True)
        main.write_text(wanted.repository.commit)


def check_space(wanted: Download) -> None:
    """Raises WriteFailure if the disk has too little space for what is missing."""
    missing = sum(max(0, file.size - present(wanted.folder / file.path)) for file in wanted.files)
    there = next(folder for folder in (wanted.folder, *wanted.folder.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise WriteFailure(
            f"{wanted.repository.name} needs {missing / GB:.1f} GB more in {wanted.folder}, and {free / GB:.1f} GB are free; "
            "free space, or make its folder a link to another disk (or --output)"
        )


def present(path: Path) -> int:
    """Returns the bytes of a file that are on the disk, maybe of an incomplete one."""
    for found in (path, partial(path)):
        if found.is_file():
            return found.stat().st_size
    return 0


def partial(path: Path) -> Path:
    """Returns the path of a file until it is complete."""
    return path.with_name(path.name + PARTIAL)


def fetch(wanted: Download, file: RemoteFile, on_bytes: Callable[[int], None]) -> None:
    """Downloads one file if it is not there, or is another one. ``on_bytes`` gets the bytes that are there of this file."""
    path = wanted.folder / file.path
    if path.is_file() and is_right(path, file):
        return
    unfinished = partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if present(unfinished) > file.size:
        unfinished.unlink()
    while True:
        before = present(unfinished)
        try:
            append(wanted, file, unfinished, on_bytes)
            break
        except Failure as error:
            if present(unfinished) <= before:
                raise
            logger.warning("%s: %s; going on at %.2f GB", file.path, reason_of(error), present(unfinished) / GB)
    if not is_right(unfinished, file):
        unfinished.unlink()
        raise Failure(f"{file.path} is not what {wanted.hub.endpoint} says it is (size or hash), so it was removed; try again")
    unfinished.replace(path)


class Watched:
    """A file that reports its position after each write."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None]):
        self._file, self._on_bytes = file, on_bytes

    def write(self, chunk: bytes) -> int:
        """Writes a chunk, and reports it. It is not written if the download is cancelled by then: another one may have begun."""
        self._on_bytes(self._file.tell())
        written = self._file.write(chunk)
        self._on_bytes(self._file.tell())
        return written

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def append(wanted: Download, file: RemoteFile, unfinished: Path, on_bytes: Callable[[int], None]) -> None:
    """Downloads what is missing of a file to the end of ``unfinished``. What comes before a cut stays there."""
    with unfinished.open("r+b" if unfinished.exists() else "w+b") as written, answering(wanted.hub.endpoint):
        start = written.seek(0, os.SEEK_END)
        http_get(
            wanted.hub.url(wanted.repository, file),
            Watched(written, on_bytes),
            resume_size=start,
            headers=wanted.hub.headers,
            expected_size=file.size,
            displayed_filename=file.path,
        )


def is_right(path: Path, file: RemoteFile) -> bool:
    """Whether a file on the disk has the size and the hash that the hub says."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        return digest(path, hashlib.sha256()) == file.sha256.lower()
    if file.git_sha1:
        return digest(path, hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)) == file.git_sha1
    return True


def digest(path: Path, found) -> str:
    """Adds a file's content to a hash, and returns it."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
