"""The exceptions: wrong requests, failures of devices, files and groups, and cancellation."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RequestError(ValueError):
    """A request that cannot be fulfilled as it is. The message is one line: what was given, what is allowed, what to do.

    It is raised before anything is loaded or a group is touched. The command line ends with exit status 2.
    """


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
