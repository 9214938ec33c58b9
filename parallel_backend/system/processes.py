"""Processes: their names, and how they end. Linux only."""

import ctypes
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has already ended
        os._exit(1)


def set_name(name: str) -> None:
    """Sets the name that ``top`` and ``ps -o comm`` show, of at most 15 bytes. A forked process shares its parent's command line."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def flush() -> None:
    """Writes what was printed to the log, as far as it has room."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def leave(status: int) -> NoReturn:
    """Ends a forked process at once. What its log has no room for is lost."""
    flush()
    os._exit(status)


def log_error(error: BaseException) -> None:
    """Prints an error's traceback, if the log has room for it."""
    with suppress(OSError):
        traceback.print_exception(error)


def described(error: BaseException) -> dict[str, Any]:
    """Returns what a failure report says of an error: ``error``, ``message`` and ``traceback``."""
    return {"error": type(error).__name__, "message": str(error), "traceback": "".join(traceback.format_exception(error))}
