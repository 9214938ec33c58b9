"""A connection between two hosts of a group: lines of JSON, and a heartbeat every second, so that a lost host is noticed.

It carries only plain values, in lines of bounded length. Anybody who can reach the port can connect, as with torch's own
rendezvous, so it must be on a private network.
"""

import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from ..config import CONFIG

MAX_LINE = 2**17
KINDS = ("hello", "welcome", "here", "refused", "begin", "beat", "end", "ended", "over")
"""A host that joins sends ``hello``, gets ``welcome`` and confirms with ``here``. Then it is ``refused``, or gets ``begin``
when all hosts have come. When a host's part has ``ended``, node 0 asks the others to ``end`` theirs, and then sends ``over``."""


class LinkLost(ConnectionError):
    """The other host closed the connection, is silent, or does not speak this protocol; the message says which."""


class HostLink:
    """This host's end of a connection.

    Args:
        connection: to the other host; closed with the link.
    """

    def __init__(self, connection: socket.socket):
        connection.settimeout(CONFIG.silent_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()

    @property
    def here(self) -> str:
        """This host's address."""
        return self._connection.getsockname()[0]

    @property
    def there(self) -> str:
        """The other host's address."""
        return self._connection.getpeername()[0]

    def send(self, kind: str, **plain: Any) -> None:
        """Sends a message. A lost host is noticed by :meth:`receive`, not here."""
        line = json.dumps({"kind": kind, **plain}).encode() + b"\n"
        with self._sending, suppress(OSError):
            self._connection.sendall(line)

    def receive(self) -> dict[str, Any]:
        """Returns the next message, skipping heartbeats.

        Raises:
            LinkLost: when none can come.
        """
        while True:
            try:
                line = self._lines.readline(MAX_LINE)
            except TimeoutError:
                raise LinkLost(f"no sign of life for {CONFIG.silent_seconds:.0f} s") from None
            except (OSError, ValueError):
                line = b""
            if not line:
                raise LinkLost("its serve process, or the connection to it, ended")
            try:
                message = json.loads(line)
                known = message["kind"] in KINDS
            except (ValueError, KeyError, TypeError, RecursionError):
                known = False
            if not known:
                raise LinkLost("it sends what is no message; is it this pack's serve?")
            if message["kind"] != "beat":
                return message

    def start_beating(self) -> None:
        """Starts sending heartbeats."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        while not self._closed.wait(CONFIG.beat_seconds):
            self.send("beat")

    def finish(self) -> None:
        """Closes this side for sending. Messages sent before still arrive, and the other host's can be received."""
        self._closed.set()
        with suppress(OSError):  # the other host has closed it
            self._connection.shutdown(socket.SHUT_WR)

    def part(self, kind: str, **plain: Any) -> None:
        """Sends a last message and waits until the other host closes: closing with unread heartbeats would discard it."""
        self.send(kind, **plain)
        self.finish()
        deadline = time.monotonic() + CONFIG.part_seconds
        with suppress(OSError, ValueError):  # the connection broke, or another thread closed it
            self._connection.settimeout(CONFIG.part_seconds)
            while self._lines.readline(MAX_LINE) and time.monotonic() < deadline:
                pass
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self.finish()
        self._lines.close()
        self._connection.close()
