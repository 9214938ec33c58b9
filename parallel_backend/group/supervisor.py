"""The parent process of a group's ranks on one machine, forked from the :mod:`.fork_server`.

It forks the ranks and notices when one ends. Two threads watch the owner and look for ranks that hang. However this process ends, the
kernel kills the ranks. It reports to the owner over a socket: its process ID when it starts, and why the group ended.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from ..config import CONFIG
from ..system.processes import described, end_with, leave, log_error, set_name
from .exit_cause import KILLED, ExitCause, how_it_ended
from .hang_detector import Hang, HangDetector
from .heartbeat import Board
from .ownership import OwnerWatch
from .registry import GroupAddress
from .start_request import HOST, StartRequest


class Supervisor:
    """Runs and watches a group's ranks on this machine.

    Args:
        request: of the owner.
        connection: to the owner.
    """

    def __init__(self, request: StartRequest, connection: socket.socket):
        self.request = request
        self.connection = connection
        self.address = GroupAddress(Path(request.folder))
        description = self.address.describe()
        self.first_rank, self.count = description["first_rank"], description["processes"]
        self.nodes, self.node = description["nodes"], description["node"]
        self.owner = OwnerWatch(Path(description["lock"]))
        self.board = Board.create(self.count)
        self.ranks: dict[int, int] = {}
        """Local rank of each running process, by its process ID."""
        self.hang: Hang | None = None
        self.is_leaving = False

    def run(self) -> int:
        """Forks the ranks and waits until they end. Returns the exit status."""
        from torch.distributed import TCPStore

        self.report(supervisor=os.getpid())
        host, port = self.request.store
        if self.node == 0:  # the store must live as long as the ranks
            store = TCPStore(host, port, is_master=True, wait_for_workers=False)
            port = store.port
        for place in range(self.count):
            self.ranks[self._fork_rank(place, host, port)] = place
        self.address.add(supervisor=os.getpid(), ranks=list(self.ranks), board=self.board.path)
        for watch in (self.watch_owner, self.watch_ranks):
            threading.Thread(target=watch, name=watch.__name__, daemon=True).start()
        ends = self._wait()
        if not ends or self.is_leaving:
            self.address.remove()
            return 0
        self.report(exit=asdict(self.exit_cause(ends)))
        return 1

    def report(self, **plain: Any) -> None:
        """Sends one JSON object to the owner."""
        try:
            self.connection.sendall(json.dumps(plain).encode() + b"\n")
        except OSError:  # it has ended, which the watch sees
            return

    def _fork_rank(self, place: int, host: str, port: int) -> int:
        """Forks one rank. Returns its process ID."""
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            end_with(parent)
            set_name(f"xdit rank {self.first_rank + place}")
            self.connection.close()
            self._redirect(place)
            os.environ.update(
                RANK=str(self.first_rank + place),
                LOCAL_RANK=str(place),
                WORLD_SIZE=str(self.count * self.nodes),
                LOCAL_WORLD_SIZE=str(self.count),
                MASTER_ADDR=host,
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 makes no store of its own
                TORCHELASTIC_RESTART_COUNT="0",
            )
            from . import worker

            worker.run(self.address, self.request.plan, self.request.kind, self.board)
            status = 0
        except BaseException as error:
            log_error(error)
            if self.board.failure_report(place) is None:
                self.board.report_failure(place, {**described(error), "host": os.environ.get(HOST), "waited": 0.0})
        leave(status)  # without the shutdown of process groups, whose threads may hang

    def _redirect(self, place: int) -> None:
        """Sends a rank's output to its own logs."""
        folder = self.address.logs / str(place)
        folder.mkdir(parents=True, exist_ok=True)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(log, descriptor)
            os.close(log)

    def _wait(self) -> dict[int, int]:
        """Waits until all ranks have ended, and kills the others once one has failed.

        Returns:
            Exit code of each rank that failed, by its number; empty if none did.
        """
        ends: dict[int, int] = {}
        while self.ranks and not ends:
            self._collect(ends, *os.waitpid(-1, 0))
        deadline = time.monotonic() + CONFIG.settle_seconds
        while self.ranks and time.monotonic() < deadline and not any(code in KILLED for code in ends.values()):
            if not self._collect(ends, *os.waitpid(-1, os.WNOHANG)):
                time.sleep(CONFIG.poll_seconds)
        for pid in self.ranks:
            os.kill(pid, signal.SIGKILL)
        while self.ranks:
            self._collect({}, *os.waitpid(-1, 0))
        return ends

    def _collect(self, ends: dict[int, int], pid: int, status: int) -> bool:
        """Notes the end of a process. Returns whether one has ended."""
        if pid == 0:
            return False
        place, code = self.ranks.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            with suppress(OSError):  # the disk of the log is full
                print(f"rank {self.first_rank + place} ended with {code}", file=sys.stderr, flush=True)
            ends[self.first_rank + place] = code
        return True

    def watch_owner(self) -> None:
        """Ends the group when its owner ends, or shuts the connection down."""
        while self.owner.is_alive():
            if select.select([self.connection], [], [], 1.0)[0]:
                break
        self.is_leaving = True
        for pid in list(self.ranks):  # :meth:`run` waits for them: they hold the GPUs' memory until they have ended
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def watch_ranks(self) -> None:
        """Kills ranks that hang; :meth:`run` then ends the others."""
        detector = HangDetector(self.board, self.first_rank)
        workers = {place: psutil.Process(pid) for pid, place in self.ranks.copy().items()}
        while True:
            time.sleep(1)
            try:
                self.hang = detector.look(workers)
            except psutil.Error:  # a rank has just ended
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

    def exit_cause(self, ends: dict[int, int]) -> ExitCause:
        """Returns which rank failed first and how.

        Args:
            ends: exit codes by rank, of those that failed within ``settle_seconds``, in any order.
        """
        if self.hang:
            return self.hang.cause
        reports = {self.first_rank + place: self.board.failure_report(place) for place in range(self.count)}
        failures = [{**report, "rank": rank} for rank, report in reports.items() if report]
        first = min(failures, key=lambda failure: failure["at"] - failure["waited"], default=None)
        # A rank that was killed makes the others fail, and one that failed makes the others end.
        rank = next((rank for rank, code in ends.items() if code in KILLED), None)
        if rank is None:
            rank = first["rank"] if first and first["rank"] in ends else next(iter(ends))
        return replace(how_it_ended(f"rank {rank}", ends[rank]), failure=first)
