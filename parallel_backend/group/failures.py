"""Remembers groups that failed to start, so that the next prompt does not wait for the same failure."""

import glob
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..config import CONFIG
from ..errors import GroupUnavailable
from ..system.files import FULL
from .exit_cause import ExitCause
from .preflight import group_python

WATCHED = re.compile("XDIT_|XDG_RUNTIME_DIR|TMPDIR|PATH|PYTHON|LD_|CUDA_|NCCL_|GLOO_")
"""Variables that may decide whether a group starts. Jobs in this process set others, such as TRITON_CACHE_DIR."""


@dataclass(frozen=True)
class FailedStart:
    """A group that did not start."""

    error: GroupUnavailable
    conditions: tuple
    at: float


_failures: dict[tuple[str, str], FailedStart] = {}


def conditions() -> tuple:
    """Returns what a start depends on, as far as this process can see. If it changes, the start is tried again."""
    python = Path(group_python())
    packages = glob.glob(str(python.parent.parent / "lib" / "python*" / "site-packages"))
    changed = []
    for path in (python, *packages):
        try:
            changed.append((str(path), os.stat(path).st_mtime_ns))
        except OSError:
            changed.append((str(path), None))
    networks = tuple(sorted((name, found.isup) for name, found in psutil.net_if_stats().items()))
    variables = tuple(sorted((name, value) for name, value in os.environ.items() if WATCHED.match(name)))
    return variables, tuple(changed), networks, torch.cuda.device_count()


def remember(plan: str, devices: str, error: GroupUnavailable, cause: ExitCause) -> None:
    """Remembers a failure, unless the next try may succeed: a rank was killed, or a GPU or a disk was full."""
    failure = cause.failure or {}
    if cause.by_itself and "OutOfMemory" not in failure.get("error", "") and not is_full(failure):
        _failures[plan, devices] = FailedStart(error, conditions(), time.monotonic())


def is_full(failure: dict[str, Any]) -> bool:
    """Whether a failure report is of a disk that was full."""
    return any(os.strerror(number) in failure.get("message", "") for number in FULL)


def check(plan: str, devices: str) -> None:
    """Checks whether a start may be tried.

    Raises:
        GroupUnavailable: with the last failure, if nothing has changed since.
    """
    failure = _failures.get((plan, devices))
    if failure is None:
        return
    ago = time.monotonic() - failure.at
    if ago < CONFIG.failed_start_seconds and failure.conditions == conditions():
        raise GroupUnavailable(
            f"{failure.error.summary} ({ago:.0f} s ago; it is tried again once something changes, or after "
            f"{CONFIG.failed_start_seconds / 60:g} minutes)",
            details=failure.error.details,
        )
    forget(plan, devices)


def last(plan: str, devices: str) -> str | None:
    """Returns why a group did not start, in one line; None if it has started since, or was not tried."""
    failure = _failures.get((plan, devices))
    return failure and failure.error.summary


def forget(plan: str, devices: str) -> None:
    """Forgets a failure, after the group has started."""
    _failures.pop((plan, devices), None)
