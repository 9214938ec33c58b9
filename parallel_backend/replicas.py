"""Several groups that share videos: each takes the next one when it is free, and one that is lost is missed by nobody."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .devices import Devices
from .errors import Cancelled, GroupFailure
from .executor import Executor, StepListener, StopSignal, steps_of
from .group.client import GroupExecutor
from .jobs import Job, Report, Result
from .pieces import cut, join
from .plans import Plan

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
LEAVE_SECONDS = 30.0
"""A caller that leaves waits so long for its pieces to stop; they go on stopping without it."""


class Pool:
    """Which replicas are free, over all calls.

    Args:
        replicas: those that are taken first come first.
    """

    def __init__(self, replicas: Sequence[GroupExecutor]):
        self._order = list(replicas)
        self._busy: set[GroupExecutor] = set()
        self._changed = threading.Condition()

    def take(self, without: set[GroupExecutor], should_stop: StopSignal) -> GroupExecutor | None:
        """The first free replica, once there is one; None when none is left, or nobody wants one any more."""
        with self._changed:
            while not should_stop() and not without.issuperset(self._order):
                for replica in self._order:
                    if replica not in self._busy and replica not in without:
                        self._busy.add(replica)
                        return replica
                self._changed.wait(POLL_SECONDS)
        return None

    def give_back(self, replica: GroupExecutor, *, lost: bool) -> None:
        """Makes a replica free; one that was lost will be taken last, in case it comes back."""
        with self._changed:
            self._busy.discard(replica)
            if lost:
                self._order.remove(replica)
                self._order.append(replica)
            self._changed.notify_all()


@dataclass(frozen=True)
class Piece:
    """One video of one of a call's jobs."""

    number: int
    job: Job


class Spread:
    """The pieces of one call, and who runs them.

    Threads, as many as can have a replica at once, take pieces; the caller's own thread hears of their steps.

    Args:
        pool: of all replicas.
        names: of each replica, for a person.
        jobs: to run, a piece each.
        has_closed: whether the executor was closed meanwhile.
    """

    def __init__(self, pool: Pool, names: dict[GroupExecutor, str], jobs: Sequence[Job], has_closed: StopSignal):
        self.pool = pool
        self.names = names
        self.jobs = jobs
        self.has_closed = has_closed
        self.results: dict[int, tuple[GroupExecutor, Result]] = {}
        self.notes: list[str] = []
        self._waiting = deque(Piece(number, job) for number, job in enumerate(jobs))
        self._steps: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._lost: set[GroupExecutor] = set()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def run(self, on_step: StepListener, should_stop: StopSignal) -> None:
        """Runs all pieces; raises the error of the first that failed, or Cancelled."""
        threads = [
            threading.Thread(target=self._work, name=f"replica {place}", daemon=True)
            for place in range(min(len(self.jobs), len(self.names)))
        ]
        for thread in threads:
            thread.start()
        try:
            self._listen(threads, on_step, should_stop)
        finally:
            self._stop.set()
            deadline = time.monotonic() + LEAVE_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._error:
            raise self._error
        if len(self.results) < len(self.jobs):
            raise Cancelled(f"stopped with {len(self.results)} of {len(self.jobs)} videos done")

    def _listen(self, threads: list[threading.Thread], on_step: StepListener, should_stop: StopSignal) -> None:
        """Tells steps of all pieces together until the threads have ended."""
        done, total = dict.fromkeys(range(len(self.jobs)), 0), steps_of(self.jobs)
        while True:
            ended = not any(thread.is_alive() for thread in threads)  # before the look: what they said is heard then
            try:
                number, step = self._steps.get(timeout=0 if ended else POLL_SECONDS)
                done[number] = step
                on_step(sum(done.values()), total)
            except queue.Empty:
                if ended:
                    return
            if should_stop():
                self._stop.set()

    def _is_stopping(self) -> bool:
        return self._stop.is_set() or self.has_closed()

    def _work(self) -> None:
        """Takes pieces until none is left. One that waits for others to end sees to what they give back."""
        while not self._is_stopping() and len(self.results) < len(self.jobs):
            with self._lock:
                piece = self._waiting.popleft() if self._waiting else None
            if piece is None:
                time.sleep(POLL_SECONDS)
                continue
            replica = self.pool.take(self._lost, self._is_stopping)
            if replica is None:  # none is left, and the last one's error is known; or nobody wants the rest
                with self._lock:
                    self._waiting.appendleft(piece)
                return
            self._try(piece, replica)

    def _try(self, piece: Piece, replica: GroupExecutor) -> None:
        lost = False
        try:
            result = replica.run(piece.job, lambda step, _: self._steps.put((piece.number, step)), self._is_stopping)
            self.results[piece.number] = replica, result
        except GroupFailure as error:
            lost = not replica.is_there()  # else the job is what fails, and would fail anywhere
            if lost:
                self._give_up(piece, replica, error)
            else:
                self._fail(error)
        except Cancelled:
            self._stop.set()
        except Exception as error:  # raised again in the caller's thread
            self._fail(error)
        finally:
            if self.has_closed():
                replica.close()  # it may just have been started again
            self.pool.give_back(replica, lost=lost)

    def _give_up(self, piece: Piece, replica: GroupExecutor, error: GroupFailure) -> None:
        """Goes on without a replica."""
        with self._lock:
            self._lost.add(replica)
            self._waiting.appendleft(piece)
            none_is_left = len(self._lost) == len(self.names)
        if none_is_left:
            self._fail(error)
            return
        self.notes.append(f"{self.names[replica]} was lost, and the others do its work: {error.summary}")
        logger.warning(self.notes[-1])
        self._steps.put((piece.number, 0))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop.set()


class ReplicasExecutor(Executor):
    """Runs jobs in several groups at once, one video in each.

    A replica of one device is a group too: a process of its own, so that it can fail alone.

    Args:
        plan: with ``replicas`` above 1; each has the rest of it.
        devices: as many as the plan needs; the first are the first replica's.
    Raises:
        RequestError, GroupUnavailable: when no such groups can be here; nothing has been started.
    """

    def __init__(self, plan: Plan, devices: Devices):
        plan.check_world(devices.count)
        self.plan = plan
        self.devices = devices
        self.replicas = [GroupExecutor(plan.replica, share) for share in devices.shared_out(plan.replicas)]
        self._names = {
            replica: f"replica {place} of {plan.replicas} ({replica.devices})" for place, replica in enumerate(self.replicas, 1)
        }
        self._pool = Pool(self.replicas)
        self._closed = threading.Event()

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """See :meth:`Executor.torch_devices`."""
        return self.devices.torch_devices

    def start(self) -> None:
        """Starts the groups that are not there, without waiting for them."""
        self._closed.clear()
        for replica in self.replicas:
            replica.start()

    def _run(self, job: Job, on_step: StepListener, should_stop: StopSignal) -> Result:
        return self._spread([job], on_step, should_stop)[0]

    def _run_all(self, jobs: Sequence[Job], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        for job in jobs:
            self.check(job)
        return self._spread(jobs, on_step, should_stop)

    def _spread(self, jobs: Sequence[Job], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        """Runs every video of the jobs where a replica is free. Results come in the jobs' order."""
        self._closed.clear()
        pieces = [cut(job) for job in jobs]
        began = time.perf_counter()
        spread = Spread(self._pool, self._names, [piece for part in pieces for piece in part], self._closed.is_set)
        spread.run(on_step, should_stop)
        seconds = time.perf_counter() - began
        results, first = [], 0
        for part in pieces:
            made = [spread.results[number] for number in range(first, first + len(part))]
            first += len(part)
            report = self._report(made, spread.notes, seconds if len(part) > 1 else made[0][1].report.run_seconds)
            results.append(Result(join([result.tensor for _, result in made]), report))
        return results

    def _report(self, made: list[tuple[GroupExecutor, Result]], notes: list[str], seconds: float) -> Report:
        """What one job cost; a rank that had no part in it used no memory for it."""
        reports = [result.report for _, result in made]
        peaks: list[int] = []
        for replica in self.replicas:
            own = [result.report.peak_memory for where, result in made if where is replica]
            peaks += [max(sizes) for sizes in zip(*own)] if own else [0] * self.plan.replica_size
        loading = max(report.load_seconds for report in reports)
        return Report(
            plan=str(self.plan),
            world_size=self.plan.world_size,
            load_seconds=loading,
            run_seconds=max(seconds - loading, 0.0) if len(made) > 1 else seconds,
            step_seconds=tuple(step for report in reports for step in report.step_seconds),
            peak_memory=tuple(peaks),
            notes=tuple(dict.fromkeys([*notes, *(note for report in reports for note in report.notes)])),
        )

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`; what each replica says is under ``replicas``."""
        said = [replica.status() for replica in self.replicas]
        states = {one["state"] for one in said}
        return {
            "state": next(state for state in ("busy", "ready", "starting", "absent") if state in states),
            "plan": str(self.plan),
            "devices": str(self.devices),
            "world_size": self.plan.world_size,
            "model": next((one["model"] for one in said if one.get("model")), None),
            "held": sorted({part for one in said for part in one.get("held", ())}),
            "loads": sum(one.get("loads", 0) for one in said),
            "jobs": sum(one.get("jobs", 0) for one in said),
            "memory": [size for one in said for size in one.get("memory", ())],
            "replicas": said,
        }

    def free(self) -> None:
        """See :meth:`Executor.free`. A replica that cannot is in no other's way."""
        errors: list[Exception] = []
        for replica in self.replicas:
            try:
                replica.free()
            except (GroupFailure, OSError, EOFError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._closed.set()
        for replica in self.replicas:
            replica.close()
