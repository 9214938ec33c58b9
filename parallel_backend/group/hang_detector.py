"""Finds ranks that hang: their heartbeats are older than the timeout that each heartbeat carries."""

from dataclasses import dataclass

import psutil

from ..config import CONFIG
from .exit_cause import ExitCause
from .heartbeat import Board, Heartbeat


@dataclass(frozen=True)
class Hang:
    """The local ranks that hang, and why."""

    places: list[int]
    cause: ExitCause


class HangDetector:
    """Finds ranks that hang.

    Time is counted in calls of :meth:`look`, one a second, so that the time in which the machine is suspended does not count.

    Args:
        board: with the heartbeats.
        first_rank: first rank on this machine.
    """

    def __init__(self, board: Board, first_rank: int = 0):
        self.board = board
        self.first_rank = first_rank
        self._stopped: dict[int, int] = {}
        self._last: dict[int, tuple[Heartbeat, int]] = {}

    def look(self, workers: dict[int, psutil.Process]) -> Hang | None:
        """Returns the ranks to kill and why; None if all are alive.

        Args:
            workers: by local rank.
        """
        late = {}
        for place, worker in workers.items():
            heartbeat = self.board.heartbeat(place)
            doing = heartbeat.doing if heartbeat else "starting"
            stopped = worker.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            self._stopped[place] = self._stopped.get(place, 0) + 1 if stopped else 0
            if self._stopped[place] >= CONFIG.stopped_seconds:
                return self._hang([place], f"was stopped (SIGSTOP) while {doing}", 0)
            if heartbeat is None:
                continue
            before, looks = self._last.get(place, (None, 0))
            self._last[place] = heartbeat, looks + 1 if heartbeat == before else 0
            if heartbeat.seconds is not None and self._last[place][1] > heartbeat.seconds:
                late[place] = heartbeat
        if not late:
            return None
        behind = min(heartbeat.count for heartbeat in late.values())  # the others may only be waiting for these
        places = [place for place, heartbeat in late.items() if heartbeat.count == behind]
        last = late[places[0]]
        return self._hang(places, f"hung: no sign of life for {last.seconds:.0f} s while {last.doing}", behind)

    def _hang(self, places: list[int], what: str, behind: int) -> Hang:
        ranks = [str(self.first_rank + place) for place in places]
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
        return Hang(places, ExitCause(f"{names} {what}", by_itself=False, behind=behind))
