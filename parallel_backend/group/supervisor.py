"""The parent of a group's workers: ``python -m parallel_backend.group.supervisor FOLDER ARGUMENTS`` of ``torch.distributed.run``.

That one starts the workers and notices when one ends. Two threads watch meanwhile: one for the end of the owner, one for ranks that
hang. The kernel kills the workers when this process ends, in whatever way it does. Standard output is the way back to the owner: a
line when this process is there, and one that says why the group ended.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ..config import CONFIG
from .exit_cause import KILLED, ExitCause, how_it_ended
from .heartbeat import Board, Heartbeat
from .ownership import OwnerWatch
from .registry import GroupAddress

SUPERVISOR = "XDIT_GROUP_SUPERVISOR"
"""In the environment of the workers: this process's number."""
HOST = "XDIT_HOST"
"""In the environment of the workers: this host's name for messages, set where a group has several hosts."""


@dataclass(frozen=True)
class Hang:
    """Ranks that hang, by their place on this machine."""

    places: list[int]
    cause: ExitCause


class HangDetector:
    """Finds ranks that hang. Time is counted in looks, one a second, so that a suspended machine does not count.

    Args:
        board: with the heartbeats.
        first_rank: of this machine.
    """

    def __init__(self, board: Board, first_rank: int = 0):
        self.board = board
        self.first_rank = first_rank
        self._stopped: dict[int, int] = {}
        self._last: dict[int, tuple[Heartbeat, int]] = {}

    def look(self, workers: dict[int, psutil.Process]) -> Hang | None:
        """The ranks to give up and why; None while all go on.

        Args:
            workers: by place.
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
        behind = min(heartbeat.count for heartbeat in late.values())  # the others may only wait for it
        places = [place for place, heartbeat in late.items() if heartbeat.count == behind]
        last = late[places[0]]
        return self._hang(places, f"hung: no sign of life for {last.seconds:.0f} s while {last.doing}", behind)

    def _hang(self, places: list[int], what: str, behind: int) -> Hang:
        ranks = [str(self.first_rank + place) for place in places]
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
        return Hang(places, ExitCause(f"{names} {what}", by_itself=False, behind=behind))


class Supervisor:
    """One life of a group's processes on this machine.

    Args:
        address: the group's.
        report: writes one JSON object to the owner.
    """

    def __init__(self, address: GroupAddress, report: Callable[[dict[str, Any]], None]):
        description = address.describe()
        self.address = address
        self.report = report
        self.first_rank, self.count = description["first_rank"], description["processes"]
        self.owner = OwnerWatch(Path(description["lock"]))
        self.board = Board.create(self.count)
        self.hang: Hang | None = None
        os.environ[SUPERVISOR] = str(os.getpid())
        self.board.export(os.environ)

    def watch_owner(self) -> None:
        """Ends the group with its owner, or when the owner asks for it by writing to standard input or closing it."""
        while self.owner.is_alive():
            if select.select([0], [], [], 1.0)[0]:
                break
        self.address.remove()
        os._exit(0)

    def watch_ranks(self) -> None:
        """Ends the group when a rank hangs: kills it, and ``torch.distributed.run`` ends the others."""
        detector, workers = HangDetector(self.board, self.first_rank), {}
        while True:
            time.sleep(1)
            if len(workers) < self.count:
                workers = self.workers()
            try:
                self.hang = detector.look(workers)
            except psutil.Error:  # a worker ended between two lines; torch.distributed.run sees to it
                continue
            if self.hang is None:
                continue
            for place, worker in workers.items():
                if self.board.heartbeat(place):
                    worker.send_signal(signal.SIGUSR1)  # every thread's stack goes to the rank's log
            time.sleep(0.5)
            for place in self.hang.places:
                workers[place].kill()
            return

    def workers(self) -> dict[int, psutil.Process]:
        """The workers that have started, by place."""
        found = {}
        for child in psutil.Process().children():
            try:
                found[int(child.environ()["LOCAL_RANK"])] = child
            except (psutil.Error, OSError, KeyError):  # it has just ended, or is no worker
                continue
        return found

    def run(self, arguments: list[str]) -> int:
        """Starts the workers and waits for their end. Returns the exit status."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        try:
            run(parse_args(arguments))
        except ChildFailedError as error:
            print(error, file=sys.stderr)
            self.report({"exit": asdict(self.exit_cause(error))})
            return 1
        return 0

    def exit_cause(self, error) -> ExitCause:
        """Which rank ended first and how, from a ``ChildFailedError``."""
        if self.hang:
            return self.hang.cause
        # Of those that ended within a second any may be first, and a killed one takes the others along.
        ends = sorted(error.failures.items(), key=lambda end: end[1].timestamp)
        rank, failure = min(ends, key=lambda end: end[1].exitcode not in KILLED)
        words = [(self.first_rank + place, self.board.last_words(place)) for place in range(self.count)]
        failures = [{**said, "rank": rank} for rank, said in words if said]
        # The rank that waited longest for the others to fail too is the one that failed.
        last = max(failures, key=lambda failure: failure["waited"], default=None)
        return replace(how_it_ended(f"rank {rank}", failure.exitcode), failure=last)


def main() -> None:
    """Runs the group until it ends."""
    to_owner = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed goes to the log

    def report(plain: dict[str, Any]) -> None:
        os.write(to_owner, json.dumps(plain).encode() + b"\n")

    report({"supervisor": os.getpid()})
    supervisor = Supervisor(GroupAddress(Path(sys.argv[1])), report)
    for watch in (supervisor.watch_owner, supervisor.watch_ranks):
        threading.Thread(target=watch, name=watch.__name__, daemon=True).start()
    # torch asks for this machine's full name for its event log alone, which takes minutes where no resolver answers.
    socket.getfqdn = lambda name="": name or socket.gethostname()
    sys.exit(supervisor.run(sys.argv[2:]))


if __name__ == "__main__":
    main()
