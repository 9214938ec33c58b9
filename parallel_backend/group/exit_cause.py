"""Why a group ended, and which of several causes the others follow from."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KILLS = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
KILLED = [-getattr(signal, name) for name in KILLS if hasattr(signal, name)]  # Windows, which has no groups, lacks some
"""Exit codes of a process that another, the kernel or a fault of its own has ended; SIGTERM is the launcher's own."""


@dataclass(frozen=True)
class ExitCause:
    """Why a group, or the part of it on one host, ended."""

    cause: str
    by_itself: bool = True
    """False when it was killed, or hung: the job may succeed when it is tried again."""
    gone: bool = False
    """Whether a whole host went, so that the group comes again only when somebody starts it there."""
    behind: int = 0
    """Of ranks that hung: how many heartbeats they had sent. Of several, the ones with the fewest are the cause."""
    failure: dict[str, Any] | None = None
    """The last words of the rank that failed: ``rank``, ``error``, ``message``, ``traceback`` and ``waited``."""
    details: str = ""
    """What the processes wrote last."""

    @classmethod
    def read(cls, plain: dict[str, Any]) -> "ExitCause":
        """Reads what :func:`dataclasses.asdict` made of one, from a pipe or a network.

        Raises:
            KeyError, TypeError, ValueError: when they are none.
        """
        failure = plain["failure"] and {
            "rank": int(plain["failure"]["rank"]),
            "waited": float(plain["failure"]["waited"]),
            **{word: str(plain["failure"][word]) for word in ("error", "message", "traceback", "host")},
        }
        known = {"by_itself": bool(plain["by_itself"]), "gone": bool(plain["gone"]), "behind": int(plain["behind"])}
        return cls(str(plain["cause"]), **known, failure=failure, details=str(plain["details"]))


def how_it_ended(who: str, code: int) -> ExitCause:
    """Describes an exit code."""
    if code < 0:
        return ExitCause(f"{who} was killed by {signal.Signals(-code).name}", by_itself=code not in KILLED)
    return ExitCause(f"{who} ended with status {code}")


def first_of(causes: Sequence[ExitCause]) -> ExitCause:
    """The one that the others follow from, among what several hosts report of one end.

    A host that went takes the others along, and so does a rank that was killed or hung. Of ranks that failed it is the one
    that waited longest for the others to fail too: those met with broken connections at once.
    """

    def order(cause: ExitCause) -> tuple:
        waited = cause.failure["waited"] if cause.failure else 0.0
        return not cause.gone, cause.by_itself, cause.behind, -waited

    return min(causes, key=order)
