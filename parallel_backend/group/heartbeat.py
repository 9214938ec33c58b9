"""A rank's heartbeat and last words, in memory that a group's processes on one machine share: no disk can be too full for them."""

import ctypes
import json
import mmap
import os
import struct
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

BEAT_BYTES, WORDS_BYTES = 1024, 63 * 1024
CLOSE_ON_EXEC = 1
VARIABLE = "XDIT_GROUP_BOARD"
"""Says to the ranks where the board is, and how many of them it is for."""
HEAD = struct.Struct("=QI")
"""Before what is written: a version, which is 0 before the first write and odd while one is under way, and the number of bytes."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank reported last."""

    count: int
    """How often it has reported; ranks that do the same work count alike."""
    doing: str
    seconds: float | None
    """How long this may take; None is for ever."""


class Board:
    """One slot for each of this machine's ranks.

    Args:
        descriptor: of the shared memory.
        count: ranks.
    """

    def __init__(self, descriptor: int, count: int):
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        """By which the processes that this one starts open it."""
        self.count = count
        self._memory = mmap.mmap(descriptor, count * (BEAT_BYTES + WORDS_BYTES))

    @classmethod
    def create(cls, count: int) -> "Board":
        """New shared memory; it is gone with the last process that has it."""
        # A Python that was built on an old system, such as conda's, lacks os.memfd_create; the system that it runs on has it.
        create = getattr(os, "memfd_create", None) or (
            lambda name: ctypes.CDLL(None).memfd_create(name.encode(), CLOSE_ON_EXEC)
        )
        descriptor = create("cogvideox-xdit")
        os.ftruncate(descriptor, count * (BEAT_BYTES + WORDS_BYTES))
        return cls(descriptor, count)

    @classmethod
    def open(cls, path: str, count: int) -> "Board":
        """The memory of another process, by its :attr:`path`."""
        return cls(os.open(path, os.O_RDWR), count)

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Sets the variable by which :meth:`of` opens the board in another process."""
        environment[VARIABLE] = f"{self.path}:{self.count}"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Board":
        """Opens the board that a process's environment names; see :meth:`export`."""
        path, _, count = environment[VARIABLE].rpartition(":")
        return cls.open(path, int(count))

    def beat(self, place: int, heartbeat: Heartbeat) -> None:
        """Writes the heartbeat of a rank, by its place among this machine's."""
        self._write(place * (BEAT_BYTES + WORDS_BYTES), BEAT_BYTES, asdict(heartbeat))

    def heartbeat(self, place: int) -> Heartbeat | None:
        """The last heartbeat of a rank, or None before the first."""
        found = self._read(place * (BEAT_BYTES + WORDS_BYTES))
        return found and Heartbeat(**found)

    def leave(self, place: int, words: dict[str, Any]) -> None:
        """Writes a rank's last words: why it ends. Of a long traceback the end is kept."""
        self._write(place * (BEAT_BYTES + WORDS_BYTES) + BEAT_BYTES, WORDS_BYTES, shortened(words, WORDS_BYTES - HEAD.size))

    def last_words(self, place: int) -> dict[str, Any] | None:
        """A rank's last words, or None."""
        return self._read(place * (BEAT_BYTES + WORDS_BYTES) + BEAT_BYTES)

    def _write(self, start: int, room: int, plain: dict[str, Any]) -> None:
        version, _ = HEAD.unpack_from(self._memory, start)
        data = as_bytes(plain)
        if len(data) > room - HEAD.size:
            raise ValueError(f"{len(data)} bytes for a slot of {room}")
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
                except ValueError:  # another core's write that arrives out of order
                    pass
            time.sleep(0.001)
        return None  # a rank that was killed while it wrote


def as_bytes(plain: dict[str, Any]) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(plain, ensure_ascii=False).encode(errors="replace")


def shortened(words: dict[str, Any], room: int) -> dict[str, Any]:
    """Last words that fit into so many bytes."""
    while len(as_bytes(words)) > room:
        words = {**words, "message": words["message"][:2000], "traceback": words["traceback"][len(words["traceback"]) // 2 :]}
    return words


class HeartbeatWriter:
    """Writes a rank's heartbeat. The main thread does it, so that one which hangs is silent.

    Args:
        board: of this machine's ranks.
        place: the rank's place among them.
    """

    def __init__(self, board: Board, place: int):
        self._board = board
        self._place = place
        self._count = 0

    def beat(self, doing: str, seconds: float | None) -> None:
        """Reports what comes next, and within how many seconds the next heartbeat does."""
        self._count += 1
        self._board.beat(self._place, Heartbeat(self._count, doing, seconds))

    def leave(self, words: dict[str, Any]) -> None:
        """Leaves last words: ``error``, ``message``, ``traceback``, ``host`` and ``waited``."""
        self._board.leave(self._place, words)
