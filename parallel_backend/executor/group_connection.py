"""A request to a group and its answers."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ..cogvideox.vae.frames import FramesListener
from ..cogvideox.vae.preview import PictureListener
from ..config import CONFIG
from ..errors import Cancelled, GroupError, GroupFailure, GroupLost, GroupUnavailable, RequestError
from ..group import protocol
from ..group.codec import LAST, Message
from ..group.connection import Broken, Stalled, connect, talking
from ..group.registry import GroupAddress
from ..jobs import Progress, Report, Result
from ..notes import marked
from .base import StepListener, StopSignal

GiveUp = Callable[[Exception, float], GroupFailure | RequestError | None]
"""Takes why the last attempt to connect failed and the seconds waited; returns the error to raise, or None to try again."""


@dataclass
class Keepsake:
    """What a group reports about a job, apart from its steps."""

    on_picture: PictureListener | None = None
    """Called with each preview."""
    on_frames: FramesListener | None = None
    """Called with the frames of a decoding job."""
    progress: Progress | None = None
    """Where to resume when the group is lost."""


def open_connection(address: GroupAddress, should_stop: StopSignal, give_up: GiveUp) -> Connection:
    """Connects to a group, and waits until it answers.

    Args:
        address: of the group.
        should_stop: called between attempts.
        give_up: called after each failed attempt.
    Raises:
        Cancelled: when ``should_stop`` returns True.
        GroupFailure, RequestError: from ``give_up``; also GroupError for a wrong key or a listener that says nothing.
    """
    began = time.monotonic()
    while True:
        try:
            return connect(address.socket, address.key, should_stop)
        except AuthenticationError as error:
            raise GroupError(f"the group at {address.folder} does not know this key") from error
        except Stalled as error:
            raise GroupError(f"the group at {address.folder} does not answer; its logs are there") from error
        except (EOFError, OSError) as error:
            if should_stop():
                raise Cancelled("stopped while the group was starting") from error
            if failure := give_up(error, time.monotonic() - began):
                raise failure from error
        time.sleep(CONFIG.poll_seconds)


class Channel(Protocol):
    """One request on its way to a group, and the answers to it."""

    def receive(self, seconds: float) -> Message | None:
        """Returns the next answer; None if none comes within ``seconds``."""

    def cancel(self) -> None:
        """Asks the group to stop the job."""


class SocketChannel:
    """A request over a group's socket. Every method raises Broken when the connection breaks.

    Args:
        connection: from :func:`open_connection`.
        message: the request, which is sent.
    """

    def __init__(self, connection: Connection, message: Message):
        self._connection = connection
        with talking():
            protocol.send(connection, message)

    def receive(self, seconds: float) -> Message | None:
        """See :meth:`Channel.receive`."""
        with talking():
            return protocol.receive(self._connection) if self._connection.poll(seconds) else None

    def cancel(self) -> None:
        """See :meth:`Channel.cancel`."""
        with talking():
            self._connection.send_bytes(b"cancel")


def answers(channel: Channel, should_stop: StopSignal, seconds: float | None) -> Iterator[Message]:
    """Yields the answers to a request, up to the last one. Asks the group to cancel it once the caller wants to stop.

    Args:
        channel: of the request.
        should_stop: called while no answer comes.
        seconds: timeout for the last answer; None waits for as long as the job takes.
    Raises:
        GroupError: after a timeout.
    """
    deadline, late = seconds and time.monotonic() + seconds, f"did not answer within {seconds or 0:.0f} s"
    is_cancelled = False
    while True:
        if not is_cancelled and should_stop():
            channel.cancel()
            is_cancelled, deadline = True, time.monotonic() + CONFIG.cancel_seconds
            late = f"did not stop within {CONFIG.cancel_seconds:.0f} s of being asked"
        if deadline and time.monotonic() > deadline:
            raise GroupError(f"the group {late}")
        answer = channel.receive(CONFIG.poll_seconds)
        if answer is not None:
            yield answer
            if answer.kind in LAST:
                return


def last_answer(found: Iterator[Message], on_step: StepListener, kept: Keepsake) -> Message:
    """Returns the last answer to a request, and reports what comes before it.

    Args:
        found: the answers.
        on_step: called after each step of a job.
        kept: receives previews and progress.
    Raises:
        Cancelled: when the group has cancelled the job.
        RequestError, GroupFailure: when the job failed.
    """
    for answer in found:
        if answer.kind == "step":
            on_step(answer.plain["step"], answer.plain["steps"])
        elif answer.kind == "kept":
            kept.progress = Progress(**answer.plain, **answer.tensors)
        elif answer.kind == "picture":
            kept.on_picture(answer.tensors["picture"])
        elif answer.kind == "frames":
            kept.on_frames(answer.plain["video"], answer.plain["start"], answer.tensors["frames"])
        elif answer.kind == "cancelled":
            raise Cancelled(answer.plain["message"])
        elif answer.kind == "failed":
            raise error_of(answer.plain)
        else:
            return answer
    raise Broken("the answers ended")


def result_of(answer: Message, notes: Sequence[str]) -> Result:
    """Returns the result of a job from the last answer, with notes before its own."""
    report = {key: tuple(value) if isinstance(value, list) else value for key, value in answer.plain["report"].items()}
    report["notes"] = (*notes, *marked(report["notes"], answer.plain.get("information", ())))
    return Result(answer.tensors["tensor"], Report(**report))


def error_of(failure: dict[str, Any]) -> RequestError | GroupFailure:
    """Returns the error for a failure of a rank, or of a group on a cluster, as a ``failed`` answer or an exit cause describes it."""
    if failure["error"] == RequestError.__name__:
        return RequestError(failure["message"])
    if "about" in failure:
        kinds = {kind.__name__: kind for kind in (GroupError, GroupLost, GroupUnavailable)}
        return kinds[failure["error"]](failure["message"], **failure["about"])
    rank = failure.get("rank")
    where = "the group" if rank is None else f"rank {rank}" + (f" on {failure['host']}" if failure.get("host") else "")
    summary = f"{where} failed: {failure['error']}: {failure['message']}"
    return GroupError(summary, rank=rank, details=failure.get("traceback", ""))
