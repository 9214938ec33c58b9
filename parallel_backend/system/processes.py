"""Processes: their names, and that they end with their parents. Linux only."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has already ended
        os._exit(1)


def set_name(name: str) -> None:
    """Sets the name that ``top`` and ``ps -o comm`` show, of at most 15 bytes. A forked process shares its parent's command line."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
