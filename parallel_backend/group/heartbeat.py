"""Heartbeats and failure reports of ranks, in shared memory, so that a full disk cannot stop them."""

import ctypes
import json
import mmap
import os
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

BEAT_BYTES, REPORT_BYTES = 1024, 63 * 1024
CLOSE_ON_EXEC = 1
HEAD = struct.Struct("=QI")
"""Header of a slot: a version, which is 0 before the first write and odd during a write, and the number of bytes."""


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last report of what it does."""

    count: int
    """Number of heartbeats so far; ranks that do the same work have the same count."""
    doing: str
    seconds: float | None
    """Timeout of what it does; None is no timeout."""


class Board:
    """Shared memory with a slot for each rank on this machine.

    Args:
        descriptor: of the shared memory.
        count: number of ranks.
    """

    def __init__(self, descriptor: int, count: int):
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        """Path by which other processes of the user open it."""
        self._memory = mmap.mmap(descriptor, count * (BEAT_BYTES + REPORT_BYTES))

    @classmethod
    def create(cls, count: int) -> "Board":
        """Creates the shared memory. The kernel frees it with the last process that has it open."""
        # A Python built on an old system, such as conda's, lacks os.memfd_create; the C library here has it.
        create = getattr(os, "memfd_create", None) or (
            lambda name: ctypes.CDLL(None).memfd_create(name.encode(), CLOSE_ON_EXEC)
        )
        descriptor = create("cogvideox-xdit")
        os.ftruncate(descriptor, count * (BEAT_BYTES + REPORT_BYTES))
        return cls(descriptor, count)

    @classmethod
    def open(cls, path: str, count: int) -> "Board":
        """Opens the memory of another process by its :attr:`path`."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(descriptor, count)
        finally:
            os.close(descriptor)  # the mapping has its own

    def close(self) -> None:
        """Unmaps the memory."""
        self._memory.close()

    def beat(self, place: int, heartbeat: Heartbeat) -> None:
        """Writes the heartbeat of a rank; ``place`` is its local rank."""
        self._write(place * (BEAT_BYTES + REPORT_BYTES), BEAT_BYTES, asdict(heartbeat))

    def heartbeat(self, place: int) -> Heartbeat | None:
        """Returns the last heartbeat of a rank; None before the first."""
        found = self._read(place * (BEAT_BYTES + REPORT_BYTES))
        return found and Heartbeat(**found)

    def report_failure(self, place: int, failure: dict[str, Any]) -> None:
        """Writes a rank's failure report before it exits, with when it is written (``at``). Of a long traceback the end is kept."""
        report = shortened({**failure, "at": time.monotonic()}, REPORT_BYTES - HEAD.size)
        self._write(place * (BEAT_BYTES + REPORT_BYTES) + BEAT_BYTES, REPORT_BYTES, report)

    def failure_report(self, place: int) -> dict[str, Any] | None:
        """Returns a rank's failure report, or None."""
        return self._read(place * (BEAT_BYTES + REPORT_BYTES) + BEAT_BYTES)

    def _write(self, start: int, size: int, plain: dict[str, Any]) -> None:
        version, _ = HEAD.unpack_from(self._memory, start)
        data = as_bytes(plain)
        if len(data) > size - HEAD.size:
            raise ValueError(f"{len(data)} bytes for a slot of {size}")
        HEAD.pack_into(self._memory, start, version + 1, 0)
        self._memory[start + HEAD.size : start + HEAD.size + len(data)] = data
        HEAD.pack_into(self._memory, start, version + 2, len(data))

    def _read(self, start: int, tries: int = 100) -> dict[str, Any] | None:
        for _ in range(tries):
            version, size = before = HEAD.unpack_from(self._memory, start)
            if version == 0:
                return None
            data = bytes(self._memory[start + HEAD.size : start + HEAD.size + size])
            if version % 2 == 0 and HEAD.unpack_from(self._memory, start) == before:
                try:
                    return json.loads(data)
                except ValueError:  # writes of another core may become visible out of order
                    pass
            time.sleep(0.001)
        return None  # the rank was killed during a write


def as_bytes(plain: dict[str, Any]) -> bytes:
    """Encodes as JSON in UTF-8."""
    return json.dumps(plain, ensure_ascii=False).encode(errors="replace")


def shortened(failure: dict[str, Any], limit: int) -> dict[str, Any]:
    """Shortens a failure report to ``limit`` bytes."""
    while len(as_bytes(failure)) > limit:
        failure = {
            **failure,
            "message": failure["message"][:2000],
            "traceback": failure["traceback"][len(failure["traceback"]) // 2 :],
        }
    return failure


class HeartbeatWriter:
    """Writes a rank's heartbeats. Only the main thread may call it, so that a hang there is noticed.

    Args:
        board: of this machine's ranks.
        place: the local rank.
    """

    def __init__(self, board: Board, place: int):
        self._board = board
        self._place = place
        self._count = 0
        self._seconds: float | None = None

    def beat(self, doing: str, seconds: float | None) -> None:
        """Reports what comes next, and its timeout in seconds."""
        self._count += 1
        self._seconds = seconds
        self.say(doing)

    def say(self, doing: str) -> None:
        """Reports what goes on within the last heartbeat's work. Its timeout starts again; the count stays, as on the other ranks."""
        self._board.beat(self._place, Heartbeat(self._count, doing, self._seconds))

    def report_failure(self, failure: dict[str, Any]) -> None:
        """Writes the failure report: ``error``, ``message``, ``traceback``, ``host`` and ``waited``."""
        self._board.report_failure(self._place, failure)
