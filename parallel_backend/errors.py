"""The exceptions: wrong requests, failures of devices, files and groups, and cancellation."""

import logging
import re
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

logger = logging.getLogger(__name__)

LONGEST = 300
"""Characters of a reason."""
CLUTTER = re.compile(r"\[Errno -?\d+\] |\*+ (ERROR: )?")
"""What messages of Python, FFmpeg and ComfyUI begin with and a user does not need."""
ASSEMBLER = re.compile(r"ptxas.*?\b(?:error|fatal)\s*: (.*)")
"""A line of NVIDIA's assembler that says what is wrong."""


def reason_of(error: BaseException) -> str:
    """Returns why something failed as one line for the user. If the message says more than that, all of it goes to the log.

    Args:
        error: of any package. The first line of its message is often not the reason.
    """
    lines = lines_of(error)
    reason = reason_in(error, lines)
    if len(reason) > LONGEST:
        reason = f"{reason[: LONGEST - 1].rstrip()}…"
    whole = " ".join(lines)
    if whole in reason or whole.endswith(reason):
        return reason
    logger.info("%s: %s", type(error).__name__, error)
    return f"{reason} (details in the log)"


def reason_in(error: BaseException, lines: list[str]) -> str:
    """Returns what is the reason among the lines of an error's message."""
    if not lines:
        return type(error).__name__
    if is_a(error, "CompilationError"):  # Triton's: a place, the kernel, a caret, and the reason, unless the cause has that
        while is_a(error.__cause__, "CompilationError"):
            error = error.__cause__
        return f"Triton could not compile the kernel: {(lines_of(error) or lines)[-1]}"
    if is_a(error, "PTXASError"):  # Triton's: what the assembler said, and how to call it
        said = next(filter(None, map(ASSEMBLER.match, lines)), None)
        return f"Triton could not assemble the kernel: {said[1] if said else lines[0]}"
    if is_a(error, "ActorDiedError") and "creation task" in lines[0]:  # Ray's: the actor, the traceback, and the error
        return lines[-1]
    if isinstance(error, CalledProcessError):  # such as a C compiler's, with a dozen paths
        program = error.cmd if isinstance(error.cmd, str) else str(error.cmd[0])
        return f"{Path(program).name} failed with exit status {error.returncode}"
    if isinstance(error, KeyError):  # the message is the key alone
        return f"{type(error).__name__}: {lines[0]}"
    first = lines[0][match.end() :] if (match := CLUTTER.match(lines[0])) else lines[0]
    return f"{first} {lines[1]}" if first.endswith(":") and len(lines) > 1 else first


def lines_of(error: BaseException) -> list[str]:
    """Returns the lines of an error's message, without empty ones."""
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def readable(text: str) -> str:
    """Returns a text with a question mark for each half of a character, which a file's name or JSON may have and UTF-8 has not."""
    return text.encode(errors="replace").decode()


def is_a(error: BaseException | None, name: str) -> bool:
    """Returns whether an error is of a class of this name, which may belong to a package that is not installed."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


class RequestError(ValueError):
    """A request that cannot be fulfilled as it is. The message is one line: what was given, what is allowed, what to do.

    It is raised before anything is loaded or a group is touched. The command line ends with exit status 2.
    """

    @property
    def summary(self) -> str:
        """The message, as :attr:`GroupFailure.summary` is of a failure."""
        return str(self)


class Failure(RuntimeError):
    """A valid request failed. The command line shows the message and ends with exit status 1."""


class OutOfMemory(Failure):
    """A device is too small for a job. The message is one line: what was needed, what was free, which setting helps."""


class NotFinite(Failure, FloatingPointError):
    """Values of a job became NaN or infinite. The message is one line: in which step, and which setting helps."""


class WriteFailure(Failure):
    """A file cannot be written: the disk is full, or the folder was removed. The message is one line."""


class Cancelled(Exception):
    """The caller cancelled the job. The engine or group stays warm and takes the next one."""


class GroupFailure(Failure):
    """A group could not start, was lost, or failed in a job.

    Args:
        message: one line.
        details: the remote traceback or the last log lines.
    """

    progress: Any = None
    """The :class:`parallel_backend.jobs.Progress` from which another group can go on; None to begin again."""

    def __init__(self, message: str, *, details: str = ""):
        super().__init__(f"{message}\n{details}".rstrip())
        self.summary = message
        self.details = details


class GroupUnavailable(GroupFailure):
    """No group can start here (platform, missing package, processes that exit early). No work was lost."""


class GroupLost(GroupFailure):
    """A group was killed, or hung, or its connection broke. The job is not the cause.

    :class:`parallel_backend.executor.group.GroupExecutor` restarts the group and resumes the job. If that fails too, it raises
    :class:`GroupError`, or :class:`GroupUnavailable` if the group had never come up.

    Args:
        message, details: see :class:`GroupFailure`.
        came_up: whether the group had answered before.
        is_there: whether the group still answers, so that only the connection was lost.
    """

    def __init__(self, message: str, *, details: str = "", came_up: bool = True, is_there: bool = False):
        super().__init__(message, details=details)
        self.came_up = came_up
        self.is_there = is_there


class GroupError(GroupFailure):
    """A job failed inside a group, or a group was lost after it had come up.

    Args:
        message: one line, with the rank if it is known.
        rank: the rank that failed first, or None if the group was lost.
        details: the remote traceback or the last log lines.
    """

    def __init__(self, message: str, *, rank: int | None = None, details: str = ""):
        super().__init__(message, details=details)
        self.rank = rank
