"""Writes files that appear whole or not at all."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RequestError, WriteFailure

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Errors of a disk: full, over quota, file too large, I/O error."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to ``path`` at the end. After an error no file is left.

    Raises:
        WriteFailure: with the system's reason, such as a full disk or a missing folder.
    """
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        partial.replace(path)
    except OSError as error:
        raise WriteFailure(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder, and run it again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before any work is done, by writing a small one and removing it.

    Permissions are not enough: they allow root everything, and know nothing of full or read-only disks.

    Raises:
        RequestError: when the folder is missing or read-only, or the name is that of a folder or too long.
        WriteFailure: when the disk is full.
    """
    folder = path.parent
    if not os.path.isdir(folder):
        raise RequestError(f"cannot write {path}: there is no folder {folder}; create it first")
    if os.path.isdir(path):  # unlike Path.is_dir it does not raise for a name that is too long
        raise RequestError(f"cannot write {path}: it is a folder; give a file name")
    there = os.path.lexists(path)
    if there and not os.access(path, os.W_OK):
        raise RequestError(f"cannot write {path}: no permission; choose another folder")
    probe = path.with_name(f".{uuid.uuid4().hex[:8]}") if there else path
    try:
        try:
            with probe.open("xb") as file:
                file.write(bytes(1 << 16))
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        kind = WriteFailure if getattr(error, "errno", None) in FULL else RequestError
        reason = getattr(error, "strerror", None) or error
        raise kind(f"cannot write {path}: {reason}; free space or choose another folder or name") from error
