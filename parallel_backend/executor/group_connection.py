"""A request to a group and its answers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

from ..cogvideox.vae.preview import PictureListener
from ..config import CONFIG
from ..errors import Cancelled, GroupError, GroupFailure, RequestError
from ..group import protocol
from ..group.codec import Message
from ..group.connection import Stalled, connect, talking
from ..group.registry import GroupAddress
from ..jobs import Progress
from .base import StepListener, StopSignal

GiveUp = Callable[[Exception, float], GroupFailure | RequestError | None]
"""Takes why the last attempt to connect failed and the seconds waited; returns the error to raise, or None to try again."""


@dataclass
class Keepsake:
    """What a group reports about a job, apart from its steps."""

    on_picture: PictureListener | None = None
    """Called with each preview."""
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


def ask(
    connection: Connection,
    message: Message,
    on_step: StepListener,
    should_stop: StopSignal,
    kept: Keepsake,
    seconds: float | None,
) -> Message:
    """Sends a request and returns its last answer. Asks the group to cancel it once the caller wants to stop.

    Args:
        connection: from :func:`open_connection`.
        message: the request.
        on_step: called after each step of a job.
        should_stop: called while no answer comes.
        kept: receives previews and progress.
        seconds: timeout for the last answer; None waits for as long as the job takes.
    Raises:
        Broken: when the connection breaks.
        Cancelled: when the group has cancelled the job.
        RequestError, GroupError: when the job failed; GroupError also after a timeout.
    """
    with talking():
        protocol.send(connection, message)
    deadline, late = seconds and time.monotonic() + seconds, f"did not answer within {seconds or 0:.0f} s"
    is_cancelled = False
    while True:
        if not is_cancelled and should_stop():
            with talking():
                connection.send_bytes(b"cancel")
            is_cancelled, deadline = True, time.monotonic() + CONFIG.cancel_seconds
            late = f"did not stop within {CONFIG.cancel_seconds:.0f} s of being asked"
        if deadline and time.monotonic() > deadline:
            raise GroupError(f"the group {late}")
        with talking():
            if not connection.poll(CONFIG.poll_seconds):
                continue
            answer = protocol.receive(connection)
        if answer.kind == "step":
            on_step(answer.plain["step"], answer.plain["steps"])
        elif answer.kind == "kept":
            kept.progress = Progress(**answer.plain, **answer.tensors)
        elif answer.kind == "picture":
            kept.on_picture(answer.tensors["picture"])
        elif answer.kind == "cancelled":
            raise Cancelled(answer.plain["message"])
        elif answer.kind == "failed":
            raise error_of(answer.plain)
        else:
            return answer


def error_of(failure: dict[str, Any]) -> RequestError | GroupError:
    """Returns the error for a rank's failure, as a ``failed`` answer or an exit cause describes it."""
    if failure["error"] == RequestError.__name__:
        return RequestError(failure["message"])
    rank = failure.get("rank")
    where = "the group" if rank is None else f"rank {rank}" + (f" on {failure['host']}" if failure.get("host") else "")
    summary = f"{where} failed: {failure['error']}: {failure['message']}"
    return GroupError(summary, rank=rank, details=failure.get("traceback", ""))
