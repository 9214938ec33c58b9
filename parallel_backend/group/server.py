"""Rank 0's side of the socket: queues the requests of any number of clients."""

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from ..config import CONFIG
from ..errors import Cancelled, GroupFailure
from . import codec, protocol
from .codec import Message, ProtocolError
from .connection import Patient, bounded, hang_up
from .registry import GroupAddress

logger = logging.getLogger(__name__)

QUEUED = ("sample", "load", "window", "decode", "encode", "free", "stop")
CLIENTS = 64
"""Backlog of the listener: connections that may wait to be accepted."""


def refusal(error: Exception) -> Message:
    """Returns the answer to a request that fails with an error. From that of a group, the caller makes the same error again."""
    plain = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, GroupFailure):
        about = {name: value for name, value in vars(error).items() if name != "summary"}
        plain |= {"message": error.summary, "about": about}
    return Message("cancelled" if isinstance(error, Cancelled) else "failed", plain)


class ClientRequest:
    """One queued request and the connection for its answers.

    Args:
        data: the message's bytes, which rank 0 sends to every rank.
        connection: of the client; None when no client waits for an answer.
    """

    def __init__(self, data: bytes, connection: Connection | None):
        self.data = data
        self.connection = connection
        self.cancelled = threading.Event()
        self.waited = 0.0
        """Seconds in the queue; set by :meth:`begin`."""
        self._arrived = time.monotonic()
        self._begun = False
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Marks the request as running. Returns False if it was cancelled in the queue."""
        with self._lock:
            self._begun = not self.cancelled.is_set()
            self.waited = time.monotonic() - self._arrived
            return self._begun

    def cancel(self) -> None:
        """Cancels the request. One that is still in the queue is answered at once, as no job will answer it."""
        with self._lock:
            waiting = not self._begun and not self.cancelled.is_set()
            self.cancelled.set()
        if waiting:
            self.answer(Message("cancelled", {"message": "stopped while waiting in the queue"}))

    def answer(self, message: Message) -> None:
        """Sends a message to the client. If the client has gone, the request is cancelled."""
        if self.connection is None:
            return
        try:
            protocol.send(self.connection, message)
        except ProtocolError as error:
            self.answer(refusal(error))
        except OSError:  # it has gone, or does not read; after half a message the connection is unusable
            self.cancelled.set()
            hang_up(self.connection)


class Server:
    """Listens on a group's socket.

    Args:
        address: of the group.
        status: called in a connection's thread for a ``status`` request; returns plain values.
    """

    def __init__(self, address: GroupAddress, status: Callable[[], dict[str, Any]]):
        self._key = address.key
        self._status = status
        self._requests: queue.Queue[ClientRequest] = queue.Queue()
        self._closed = threading.Event()
        self._listener = Listener(address.socket, family="AF_UNIX", backlog=CLIENTS)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def next(self, seconds: float | None = None) -> ClientRequest | None:
        """Returns the next queued request, or None after a timeout of ``seconds``, if any."""
        try:
            return self._requests.get(timeout=seconds)
        except queue.Empty:
            return None

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return self._requests.qsize()

    def close(self) -> None:
        """Stops listening."""
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection = self._listener.accept()
            except OSError as error:  # such as no free file descriptor
                if self._closed.is_set():
                    return
                logger.warning("a client was not accepted: %s", error)
                time.sleep(CONFIG.retry_seconds)
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Serves one client, which authenticates, sends one request, and may cancel it."""
        # Authentication is here, not in the listener, so that a silent client does not block the others.
        try:
            with connection:
                with socket.socket(fileno=os.dup(connection.fileno())) as end:
                    bounded(end, sending=CONFIG.write_seconds, receiving=0)
                patient = Patient(connection, CONFIG.handshake_seconds)
                deliver_challenge(patient, self._key)
                answer_challenge(patient, self._key)
                self._converse(connection)
        except (EOFError, OSError):
            logger.debug("a client hung up")
        except Exception as error:  # whatever one client sends must not affect the others
            logger.warning("dropped a client: %s: %s", type(error).__name__, error)

    def _answer_status(self) -> Message:
        try:
            return Message("done", {**self._status(), "queue": self.waiting})
        except Exception as error:  # including an OSError, which would look like one of the connection
            logger.exception("cannot determine the status")
            return refusal(error)

    def _converse(self, connection: Connection) -> None:
        try:
            data = protocol.receive_bytes(connection)
            kind = codec.read_head(data).kind
            if kind not in (*QUEUED, "status"):
                raise ProtocolError(f"request '{kind}' is unknown")
        except ProtocolError as error:
            protocol.send(connection, refusal(error))
            return
        if kind == "status":
            protocol.send(connection, self._answer_status())
            return
        request = ClientRequest(data, connection)
        self._requests.put(request)
        # The client sends "cancel" and waits for the last answer, or disconnects: either way the request is cancelled.
        try:
            while True:
                connection.recv_bytes(1024)
                request.cancel()
        finally:
            request.cancelled.set()
