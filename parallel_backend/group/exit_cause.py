"""Why a group ended, and which of several causes came first."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KILLS = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
KILLED = [-getattr(signal, name) for name in KILLS if hasattr(signal, name)]  # Windows, which has no groups, lacks some
"""Exit codes of a process that was killed or crashed. SIGTERM is not among them: the launcher sends it."""


@dataclass(frozen=True)
class ExitCause:
    """Why a group, or its part on one machine, ended."""

    cause: str
    by_itself: bool = True
    """False if it was killed or hung: the job may succeed if it is tried again."""
    gone: bool = False
    """Whether a whole machine was lost."""
    behind: int = 0
    """For ranks that hung, the number of heartbeats they had sent. The ranks with the fewest are the cause."""
    failure: dict[str, Any] | None = None
    """The failure report of the rank: ``rank``, ``error``, ``message``, ``traceback``, ``host``, ``waited`` (seconds) and ``at`` (the machine's
    clock when it was written)."""
    details: str = ""
    """The last lines of the processes' logs."""


def how_it_ended(who: str, code: int) -> ExitCause:
    """Describes an exit code."""
    if code < 0:
        return ExitCause(f"{who} was killed by {signal.Signals(-code).name}", by_itself=code not in KILLED)
    return ExitCause(f"{who} ended with status {code}")


def first_of(causes: Sequence[ExitCause]) -> ExitCause:
    """Returns the first cause among the reports of several machines; the others follow from it.

    A lost machine comes first, then a rank that was killed or hung. Of ranks that failed, it is the one that waited longest for
    the others: their connections broke when it left.
    """

    def order(cause: ExitCause) -> tuple:
        waited = cause.failure["waited"] if cause.failure else 0.0
        return not cause.gone, cause.by_itself, cause.behind, -waited

    return min(causes, key=order)
