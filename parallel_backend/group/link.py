"""A connection between two hosts of a group: lines of JSON, and a beat every second, so that silence is noticed.

Nothing but plain values crosses it, in lines of bounded length; whoever can reach the port can speak, as with torch's own
rendezvous. So it belongs on a private network.
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
"""A host that joins says ``hello`` and, when it is ``welcome``, that it is still ``here``; it is ``refused``, or asked to ``begin``
when all have come. When a part of the group has ``ended`` node 0 asks the others to ``end`` theirs, and says when all is ``over``."""


class LinkLost(ConnectionError):
    """The other host hung up, is silent, or is none of ours; the message says which."""


class HostLink:
    """One end of a connection.

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
        """This end's address."""
        return self._connection.getsockname()[0]

    @property
    def there(self) -> str:
        """The other end's address."""
        return self._connection.getpeername()[0]

    def send(self, kind: str, **plain: Any) -> None:
        """Sends a message. That the other host has gone is noticed by who receives."""
        line = json.dumps({"kind": kind, **plain}).encode() + b"\n"
        with self._sending, suppress(OSError):
            self._connection.sendall(line)

    def receive(self) -> dict[str, Any]:
        """The next message that is more than a beat.

        Raises:
            LinkLost: when none comes.
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
        """Gives a sign of life every second from now on."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        while not self._closed.wait(CONFIG.beat_seconds):
            self.send("beat")

    def finish(self) -> None:
        """Says that nothing more comes. What has been sent still arrives, and the other side's end can be received."""
        self._closed.set()
        with suppress(OSError):  # the other side has hung up first
            self._connection.shutdown(socket.SHUT_WR)

    def part(self, kind: str, **plain: Any) -> None:
        """Sends a last message and hangs up when the other side has: closing with beats unread would take the message back."""
        self.send(kind, **plain)
        self.finish()
        deadline = time.monotonic() + CONFIG.part_seconds
        with suppress(OSError, ValueError):  # it was cut off, or closed here meanwhile
            self._connection.settimeout(CONFIG.part_seconds)
            while self._lines.readline(MAX_LINE) and time.monotonic() < deadline:
                pass
        self.close()

    def close(self) -> None:
        """Hangs up."""
        self.finish()
        self._lines.close()
        self._connection.close()
