"""The parent process of a group's workers: ``python -m parallel_backend.group.supervisor FOLDER ARGUMENTS``.

The arguments are those of ``torch.distributed.run``, which starts the workers and notices when one ends. Two threads watch the
owner and look for ranks that hang. However this process ends, the kernel kills the workers. It reports to the owner on standard
output: one line when it starts, and one that says why the group ended.
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
"""Environment variable of the workers: this process's ID."""
HOST = "XDIT_HOST"
"""Environment variable of the workers: this host's name for messages; set if the group has several hosts."""


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


class Supervisor:
    """Runs and watches a group's processes on this machine.

    Args:
        address: of the group.
        report: sends one JSON object to the owner.
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
        """Ends the group when its owner ends, or writes to standard input or closes it."""
        while self.owner.is_alive():
            if select.select([0], [], [], 1.0)[0]:
                break
        self.address.remove()
        os._exit(0)

    def watch_ranks(self) -> None:
        """Kills ranks that hang; ``torch.distributed.run`` then ends the others."""
        detector, workers = HangDetector(self.board, self.first_rank), {}
        while True:
            time.sleep(1)
            if len(workers) < self.count:
                workers = self.workers()
            try:
                self.hang = detector.look(workers)
            except psutil.Error:  # a worker has just ended; torch.distributed.run handles it
                continue
            if self.hang is None:
                continue
            for place, worker in workers.items():
                if self.board.heartbeat(place):
                    worker.send_signal(signal.SIGUSR1)  # writes every thread's stack to the rank's log
            time.sleep(0.5)
            for place in self.hang.places:
                workers[place].kill()
            return

    def workers(self) -> dict[int, psutil.Process]:
        """Returns the workers that have started, by local rank."""
        found = {}
        for child in psutil.Process().children():
            try:
                found[int(child.environ()["LOCAL_RANK"])] = child
            except (psutil.Error, OSError, KeyError):  # it has just ended, or is not a worker
                continue
        return found

    def run(self, arguments: list[str]) -> int:
        """Starts the workers and waits until they end. Returns the exit status."""
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
        """Returns which rank ended first and how, from a ``ChildFailedError``."""
        if self.hang:
            return self.hang.cause
        # The order within a second is unreliable; a rank that was killed makes the others end.
        ends = sorted(error.failures.items(), key=lambda end: end[1].timestamp)
        rank, failure = min(ends, key=lambda end: end[1].exitcode not in KILLED)
        words = [(self.first_rank + place, self.board.last_words(place)) for place in range(self.count)]
        failures = [{**said, "rank": rank} for rank, said in words if said]
        # The rank that waited longest for the others failed first.
        last = max(failures, key=lambda failure: failure["waited"], default=None)
        return replace(how_it_ended(f"rank {rank}", failure.exitcode), failure=last)


def main() -> None:
    """Runs the group until it ends."""
    to_owner = os.dup(1)
    os.dup2(2, 1)  # all other output goes to the log

    def report(plain: dict[str, Any]) -> None:
        os.write(to_owner, json.dumps(plain).encode() + b"\n")

    report({"supervisor": os.getpid()})
    supervisor = Supervisor(GroupAddress(Path(sys.argv[1])), report)
    for watch in (supervisor.watch_owner, supervisor.watch_ranks):
        threading.Thread(target=watch, name=watch.__name__, daemon=True).start()
    # torch looks up the full host name for its event log, which takes minutes if no resolver answers.
    socket.getfqdn = lambda name="": name or socket.gethostname()
    sys.exit(supervisor.run(sys.argv[2:]))


if __name__ == "__main__":
    main()
