"""A connection to a group, or to one of its clients, on which no wait is without a deadline."""

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
    """The other side is there and says nothing."""


class Broken(Exception):
    """A connection broke, in a message or between two."""


@contextmanager
def talking() -> Iterator[None]:
    """Turns whatever a broken connection raises into :class:`Broken`. A peer that is killed in the middle of a message makes it a
    plain OSError, which must not be taken for one of the caller's own."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise Broken(str(error)) from error


class Patient:
    """A connection whose next message comes before a deadline, or is no longer wanted.

    Args:
        connection: of both sides.
        seconds: for all that is received.
        should_stop: asked while nothing comes.
    """

    def __init__(self, connection: Connection, seconds: float, should_stop: Callable[[], bool] = lambda: False):
        self._connection = connection
        self._deadline = time.monotonic() + seconds
        self._should_stop = should_stop
        self.send_bytes = connection.send_bytes

    def recv_bytes(self, most: int | None = None) -> bytes:
        """See :meth:`multiprocessing.connection.Connection.recv_bytes`.

        Raises:
            Stalled: when nothing comes in time.
            Cancelled: when the caller wants to stop.
        """
        while not self._connection.poll(CONFIG.poll_seconds):
            if self._should_stop():
                raise Cancelled("stopped while the group was asked")
            if time.monotonic() > self._deadline:
                raise Stalled("it does not answer")
        return self._connection.recv_bytes(most)


def bounded(end: socket.socket, *, sending: float, receiving: float) -> None:
    """Has the kernel end a read or write of a socket that does not get on for so many seconds; 0 waits for ever."""
    end.setblocking(True)  # whatever another part of this program has set with socket.setdefaulttimeout
    for option, seconds in ((socket.SO_SNDTIMEO, sending), (socket.SO_RCVTIMEO, receiving)):
        end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def hang_up(connection: Connection) -> None:
    """Ends a connection for both sides, also where another thread waits in it: closing its descriptor would not."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side, or this one, was first
        return


def connect(path: str, key: bytes, should_stop: Callable[[], bool]) -> Connection:
    """A connection to a group's socket.

    Raises:
        OSError: when nobody listens there; :class:`Stalled` when whoever does says nothing.
        multiprocessing.AuthenticationError: for a wrong key.
        Cancelled: when the caller wants to stop.
    """
    end = socket.socket(socket.AF_UNIX)
    try:
        bounded(end, sending=CONFIG.stall_seconds, receiving=CONFIG.stall_seconds)
        end.connect(path)
    except BlockingIOError as error:  # as many others wait as the listener lets
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
