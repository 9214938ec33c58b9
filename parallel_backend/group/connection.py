"""A connection between a group and a client, with a timeout for every wait."""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from ..config import CONFIG
from ..errors import Cancelled


class Stalled(ConnectionError):
    """The other side is there but does not answer."""


class Broken(Exception):
    """A connection broke."""


@contextmanager
def talking() -> Iterator[None]:
    """Raises :class:`Broken` for any error of a broken connection.

    A peer that is killed in the middle of a message causes a plain OSError, which the caller could not tell from its own.
    """
    try:
        yield
    except (EOFError, OSError) as error:
        raise Broken(str(error)) from error


class Patient:
    """A connection whose messages must arrive before a deadline.

    Args:
        connection: to wrap.
        seconds: timeout for all messages together.
        should_stop: called while waiting; True cancels.
    """

    def __init__(self, connection: Connection, seconds: float, should_stop: Callable[[], bool] = lambda: False):
        self._connection = connection
        self._deadline = time.monotonic() + seconds
        self._should_stop = should_stop
        self.send_bytes = connection.send_bytes

    def recv_bytes(self, most: int | None = None) -> bytes:
        """Receives bytes; see :meth:`multiprocessing.connection.Connection.recv_bytes`.

        Raises:
            Stalled: after the timeout.
            Cancelled: when ``should_stop`` returns True.
        """
        while not self._connection.poll(CONFIG.poll_seconds):
            if self._should_stop():
                raise Cancelled("stopped while waiting for the group to answer")
            if time.monotonic() > self._deadline:
                raise Stalled("it does not answer")
        return self._connection.recv_bytes(most)


def bounded(end: socket.socket, *, sending: float, receiving: float) -> None:
    """Sets the timeouts of a socket in the kernel, in seconds without progress; 0 waits forever."""
    end.setblocking(True)  # in spite of socket.setdefaulttimeout, which other code may have called
    for option, seconds in ((socket.SO_SNDTIMEO, sending), (socket.SO_RCVTIMEO, receiving)):
        end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def hang_up(connection: Connection) -> None:
    """Shuts a connection down for both sides. Unlike closing it, this also wakes a thread that is blocked in it."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
    except OSError:  # already closed
        return


def connect(path: str, key: bytes, should_stop: Callable[[], bool]) -> Connection:
    """Connects to a group's socket.

    Args:
        path: of the socket.
        key: that both sides must prove to know.
        should_stop: called while waiting; True cancels.
    Raises:
        OSError: when no process listens there.
        Stalled: when a process listens but does not answer.
        multiprocessing.AuthenticationError: for a wrong key.
        Cancelled: when ``should_stop`` returns True.
    """
    end = socket.socket(socket.AF_UNIX)
    try:
        bounded(end, sending=CONFIG.stall_seconds, receiving=CONFIG.stall_seconds)
        end.connect(path)
    except BlockingIOError as error:  # the listener's backlog is full
        end.close()
        raise Stalled("it accepts no connection") from error
    except BaseException:
        end.close()
        raise
    connection = Connection(end.detach())
    try:
        patient = Patient(connection, CONFIG.handshake_seconds, should_stop)
        answer_challenge(patient, key)
        deliver_challenge(patient, key)
    except BaseException:
        connection.close()
        raise
    return connection
