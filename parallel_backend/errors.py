"""What can go wrong, by who can mend it."""


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RequestError(ValueError):
    """A request that makes no sense. The message is one line: what was given, what is allowed, what to do.

    The command line ends with exit status 2; nothing has been loaded and no group touched.
    """


class Failure(RuntimeError):
    """A request that made sense could not be done. The command line shows the message and ends with exit status 1."""


class OutOfMemory(Failure):
    """A device is too small for a job. The message is one line: what was needed, what was free, which setting helps."""


class NotFinite(Failure, FloatingPointError):
    """A job's numbers became NaN or infinite. The message is one line: in which step, and which setting helps."""


class WriteFailure(Failure):
    """A file cannot be written: the disk is full, or its folder has gone. The message is one line."""


class Cancelled(Exception):
    """The caller asked for the job to stop; the engine or group is warm and takes the next one."""


class GroupFailure(Failure):
    """A group is not there, or a job in it failed.

    Args:
        message: one line.
        details: the remote traceback or the last log lines.
    """

    def __init__(self, message: str, *, details: str = ""):
        super().__init__(f"{message}\n{details}".rstrip())
        self.summary = message
        self.details = details


class GroupUnavailable(GroupFailure):
    """No group can start here (platform, missing package, processes that end before they answer); nothing was lost."""


class GroupLost(GroupFailure):
    """A group was killed, or hung, or the connection to it broke: nothing is wrong with the job.

    :class:`parallel_backend.executor.group.GroupExecutor` starts the group again and goes on with the job; it raises
    :class:`GroupError` when that does not help, or :class:`GroupUnavailable` where it had not come up.

    Args:
        message, details: see :class:`GroupFailure`.
        came_up: whether the group had answered.
        is_there: whether it answers again, and only the connection was lost.
    """

    def __init__(self, message: str, *, details: str = "", came_up: bool = True, is_there: bool = False):
        super().__init__(message, details=details)
        self.came_up = came_up
        self.is_there = is_there


class GroupError(GroupFailure):
    """A job failed inside a group, or a group that had answered was lost.

    Args:
        message: one line, naming the rank where it is known.
        rank: the rank that failed first, or None when the group itself was lost.
        details: the remote traceback or the last log lines.
    """

    def __init__(self, message: str, *, rank: int | None = None, details: str = ""):
        super().__init__(message, details=details)
        self.rank = rank
