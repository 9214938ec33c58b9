"""Has the system read files into its page cache, while the processes that are going to need them still start."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .limits import usable_memory

SHARE = 0.5
"""Share of the usable memory that files may take: what is read beyond it would push out files that others need."""


def read_ahead(files: Sequence[Path]) -> threading.Thread | None:
    """Starts to read files into the page cache, and does not wait for it.

    Returns:
        The thread that asks the system, or None where nothing is read: the files are too large for the memory, or the system
        cannot do it.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS and Windows
        return None
    with suppress(OSError):  # a file that is missing is named by what reads it
        if sum(path.stat().st_size for path in files) > SHARE * usable_memory():
            return None
        thread = threading.Thread(target=_ask, args=(tuple(files),), name="read ahead", daemon=True)
        thread.start()
        return thread
    return None


def _ask(files: tuple[Path, ...]) -> None:
    for path in files:
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
