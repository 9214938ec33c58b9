"""The parent of a group's workers: ``python -m parallel_backend.group.agent FOLDER ARGUMENTS`` of ``torch.distributed.run``.

That one starts the workers and sees when one ends. Beside it two threads watch: the first for the end of the owner, the
second for ranks that stand still. Workers get SIGKILL from the kernel when this process ends, in whatever way it does.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from .address import GroupAddress
from .pulse import Pulse, read

AGENT = "XDIT_GROUP_AGENT"
"""Names this process to its workers."""
STOPPED_SECONDS = 5
"""A rank that is stopped (SIGSTOP) for so long is given up."""


def watch_owner(address: GroupAddress) -> None:
    """Ends the group with its owner: the pipe from it ends in whatever way the owner does."""
    while os.read(0, 4096):
        pass
    address.remove()
    os._exit(0)


def ranks() -> dict[int, psutil.Process]:
    """The workers that have started, by rank."""
    found = {}
    for child in psutil.Process().children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, OSError, KeyError):  # it has just ended, or is no worker
            continue
    return found


class Standstill:
    """Finds ranks that stand still. Time is counted in looks, one a second, so that a suspended machine does not count.

    Args:
        address: whose pulse files are read.
    """

    def __init__(self, address: GroupAddress):
        self.address = address
        self._stopped: dict[int, int] = {}
        self._last: dict[int, tuple[Pulse, int]] = {}

    def look(self, workers: dict[int, psutil.Process]) -> tuple[list[int], str, int] | None:
        """The ranks to give up, why, and how often those had given a sign of life (0: never mind); None while all go on."""
        late = {}
        for rank, worker in workers.items():
            pulse = read(self.address.pulse_file(rank))
            doing = pulse.doing if pulse else "starting"
            stopped = worker.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            self._stopped[rank] = self._stopped.get(rank, 0) + 1 if stopped else 0
            if self._stopped[rank] >= STOPPED_SECONDS:
                return [rank], f"rank {rank} was stopped (SIGSTOP) while {doing}", 0
            if pulse is None:
                continue
            before, looks = self._last.get(rank, (None, 0))
            self._last[rank] = pulse, looks + 1 if pulse == before else 0
            if pulse.seconds is not None and self._last[rank][1] > pulse.seconds:
                late[rank] = pulse
        if not late:
            return None
        behind = min(pulse.count for pulse in late.values())  # the others may only wait for it
        culprits = [rank for rank, pulse in late.items() if pulse.count == behind]
        pulse = late[culprits[0]]
        names = f"rank {culprits[0]}" if len(culprits) == 1 else f"ranks {', '.join(map(str, culprits))}"
        return culprits, f"{names} hung: no sign of life for {pulse.seconds:.0f} s while {pulse.doing}", behind


def watch_ranks(address: GroupAddress) -> None:
    """Ends the group when a rank stands still: kills it, and ``torch.distributed.run`` ends the others."""
    standstill, workers = Standstill(address), {}
    expected = address.describe()["processes"]
    while True:
        time.sleep(1)
        if len(workers) < expected:
            workers = ranks()
        try:
            found = standstill.look(workers)
        except psutil.Error:  # a worker ended between two lines; torch.distributed.run sees to it
            continue
        if found is None:
            continue
        culprits, cause, behind = found
        address.cause_file.write_text(json.dumps({"cause": cause, "behind": behind}))
        for rank, worker in workers.items():
            if address.pulse_file(rank).exists():
                worker.send_signal(signal.SIGUSR1)  # every thread's stack goes to the rank's log
        time.sleep(0.5)
        for rank in culprits:
            workers[rank].kill()
        return


def main() -> None:
    """Runs the group until it ends."""
    address = GroupAddress(Path(sys.argv[1]))
    os.environ[AGENT] = str(os.getpid())
    for watch in (watch_owner, watch_ranks):
        threading.Thread(target=watch, args=(address,), name=watch.__name__, daemon=True).start()
    from torch.distributed.run import main as run

    run(sys.argv[2:])


if __name__ == "__main__":
    main()
