"""Files that appear whole, or not at all."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RequestError, WriteFailure

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What the system says of a disk: no room, no quota, too large a file, broken."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name to write to. What is there at the end appears as ``path``; after an error nothing does.

    Raises:
        WriteFailure: naming what the system says, such as that the disk is full or the folder has gone.
    """
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # some file systems say only here that there was no room
        partial.replace(path)
    except OSError as error:
        raise WriteFailure(
            f"cannot write {path}: {error.strerror or error}; make room or choose another place, and run it again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_writable(path: Path) -> None:
    """Writes a small file in that place and removes it, so that what cannot be written is known before any work is done.

    What permissions say is not enough: they allow root everything, and know nothing of full or read-only disks.

    Raises:
        RequestError: when the folder is missing or closed, the name is a folder's or too long.
        WriteFailure: when the disk is full.
    """
    folder = path.parent
    if not os.path.isdir(folder):
        raise RequestError(f"cannot write {path}: there is no folder {folder}; make it first")
    if os.path.isdir(path):  # unlike Path.is_dir it answers for a name that is too long
        raise RequestError(f"cannot write {path}: it is a folder; give a file name")
    there = os.path.lexists(path)
    if there and not os.access(path, os.W_OK):
        raise RequestError(f"cannot write {path}: no permission; choose another place")
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
        raise kind(f"cannot write {path}: {reason}; make room or choose another place or name") from error
