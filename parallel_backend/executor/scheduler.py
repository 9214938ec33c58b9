"""Distributes the jobs of one call over replicas as they become free."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..cogvideox.vae.preview import PictureListener
from ..config import CONFIG
from ..errors import Cancelled, GroupFailure, GroupUnavailable
from ..jobs import Job, Result, SampleJob
from .base import Executor, StepListener, StopSignal, steps_of
from .paces import Paces

logger = logging.getLogger(__name__)

ReplicaResult = tuple[Executor, Result]
"""A result, after the replica that it is from."""
MOST_LOSSES = 3
"""A task that was lost so often without a step between is at fault itself, as when it fills a node's memory."""
NextJob = Callable[[int, list[ReplicaResult]], Job | None]
"""Takes a task's number and its results so far, and returns its next job, or None. Called in the thread that ran the last job."""


class Pool:
    """The free replicas, shared by all calls.

    Args:
        replicas: in the order of preference.
    """

    def __init__(self, replicas: Sequence[Executor]):
        self._order = list(replicas)
        self._busy: set[Executor] = set()
        self._lock = threading.Lock()

    def take(self, is_wanted: Callable[[Executor], bool]) -> Executor | None:
        """Takes the first free replica that is wanted; None if there is none."""
        with self._lock:
            for replica in self._order:
                if replica not in self._busy and is_wanted(replica):
                    self._busy.add(replica)
                    return replica
        return None

    def give_back(self, replica: Executor, *, lost: bool) -> None:
        """Makes a replica free. A lost one is taken last from now on, in case it comes back."""
        with self._lock:
            self._busy.discard(replica)
            if lost:
                self._order.remove(replica)
                self._order.append(replica)


class ReplicaScheduler:
    """Runs the tasks of one call on replicas.

    A task is a job, and the jobs that follow from its result. Threads, at most one for each replica, take tasks. Steps are
    reported in the caller's thread.

    Args:
        pool: all replicas.
        names: the name of each replica, for the user.
        jobs: the first job of each task.
        has_closed: whether the executor was closed meanwhile.
        next_job: returns a task's next job for the same replica, and results are not kept. None if each task is one job.
        after: an earlier scheduler of the same work, whose lost replicas and measured speeds count for this one too.
    """

    def __init__(
        self,
        pool: Pool,
        names: dict[Executor, str],
        jobs: Sequence[Job],
        has_closed: StopSignal,
        next_job: NextJob | None = None,
        *,
        after: "ReplicaScheduler | None" = None,
    ):
        self.pool = pool
        self.names = names
        self.jobs = list(jobs)
        self.has_closed = has_closed
        self.next_job = next_job
        self.results: dict[int, list[ReplicaResult]] = {}
        """Results of each finished task."""
        self._unfinished: list[list[ReplicaResult]] = [[] for _ in jobs]
        """Results of each unfinished task. If its replica is lost, another one continues from there."""
        self.notes: list[str] = after.notes if after else []
        self._steps = [steps_of([job]) for job in self.jobs]
        self._waiting = deque(range(len(jobs)))
        self._events: queue.SimpleQueue[tuple[int, int | torch.Tensor]] = queue.SimpleQueue()
        """Pairs of a task's number and either its steps done or a preview."""
        self._lost: set[Executor] = after._lost if after else set()
        self._losses: dict[int, list[int]] = {}
        """Steps at which each task was lost."""
        self._ready_at = time.monotonic()
        """When a replica was last seen ready."""
        self._paces = after._paces if after else Paces()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def run(self, on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None) -> None:
        """Runs all tasks. Raises the error of the first that failed, or Cancelled."""
        threads = [
            threading.Thread(target=self._work, name=f"replica {place}", daemon=True)
            for place in range(min(len(self.jobs), len(self.names)))
        ]
        for thread in threads:
            thread.start()
        try:
            self._listen(threads, on_step, should_stop, on_picture)
        finally:
            self._stop.set()
            deadline = time.monotonic() + CONFIG.leave_seconds
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._error:
            raise self._error
        if len(self.results) < len(self.jobs):
            raise Cancelled(f"stopped with {len(self.results)} of {len(self.jobs)} jobs done")

    def _listen(
        self,
        threads: list[threading.Thread],
        on_step: StepListener,
        should_stop: StopSignal,
        on_picture: PictureListener | None,
    ) -> None:
        """Reports the steps of all tasks together, and previews, until the threads have ended."""
        done = dict.fromkeys(range(len(self.jobs)), 0)
        while True:
            ended = not any(thread.is_alive() for thread in threads)  # checked before the queue, so that no event is missed
            try:
                number, event = self._events.get(timeout=0 if ended else CONFIG.poll_seconds)
                if isinstance(event, torch.Tensor):
                    # Only the first task with steps left is previewed. At the very last step no task has steps left.
                    if number == next((task for task in done if done[task] < self._steps[task]), number):
                        on_picture(event)
                else:
                    done[number] = event
                    on_step(sum(done.values()), sum(self._steps))
            except queue.Empty:
                if ended:
                    return
            if should_stop():
                self._stop.set()

    def _is_stopping(self) -> bool:
        return self._stop.is_set() or self.has_closed()

    def _work(self) -> None:
        """Takes tasks until all are done. If no task or no replica is free it polls, as another thread may return one."""
        while not self._is_stopping() and len(self.results) < len(self.jobs):
            with self._lock:
                replica = self.pool.take(self._is_wanted) if self._waiting else None
                if replica:
                    number = self._waiting.popleft()
                    self._paces.begin(replica)
            if replica:
                self._try(number, replica)
            else:
                self._check_ready()
                time.sleep(CONFIG.poll_seconds)

    def _check_ready(self) -> None:
        """Gives up if no replica has been ready for ``wait_seconds``."""
        if any(replica.is_ready() for replica in self.names):
            self._ready_at = time.monotonic()
        elif time.monotonic() - self._ready_at > CONFIG.wait_seconds:
            self._fail(
                GroupUnavailable(
                    f"no replica has had a node of the Ray cluster for {CONFIG.wait_seconds:.0f} s; `status --ray` shows the nodes"
                )
            )

    def _is_wanted(self, replica: Executor) -> bool:
        """Whether a replica should take a task: it is there, and faster ones would not finish all tasks before it."""
        others = {other for other in self.names.keys() - self._lost - {replica} if other.is_ready()}
        return (
            replica not in self._lost
            and replica.is_ready()
            and self._paces.should_begin(replica, others, left=len(self._waiting))
        )

    def _try(self, number: int, replica: Executor) -> None:
        """Runs a task on a replica, handles its errors, and returns the replica to the pool."""
        lost, loading = False, None
        try:
            loading = self._run(number, replica)
        except GroupFailure as error:
            lost = not replica.is_there()  # if not, the job is at fault and would fail on any replica
            if lost:
                self._drop(number, replica, error)
            else:
                self._fail(error)
        except Cancelled:
            self._stop.set()
        except Exception as error:  # raised again in the caller's thread
            self._fail(error)
        finally:
            with self._lock:
                self._paces.end(replica, overhead=loading)
            if self.has_closed():
                replica.close()  # it may just have been started again
            self.pool.give_back(replica, lost=lost)

    def _run(self, number: int, replica: Executor) -> float:
        """Runs all jobs of a task. Returns the seconds that were spent loading."""
        loading, job, results = 0.0, self.jobs[number], self._unfinished[number]

        def report(picture: torch.Tensor) -> None:
            self._events.put((number, picture))

        while job is not None:
            on_step = partial(self._report_step, number, steps_of([job]))
            result = replica.run(job, on_step, self._is_stopping, report)
            loading += result.report.load_seconds
            results.append((replica, result))
            job = self.jobs[number] = self.next_job(number, results) if self.next_job else None
        self.results[number] = results if self.next_job is None else []
        self._unfinished[number] = []
        return loading

    def _report_step(self, number: int, own: int, step: int, steps: int) -> None:
        """Reports a step of a task among its own steps; a long video from a start image has those of all its windows."""
        self._events.put((number, step * own // steps))

    def _drop(self, number: int, replica: Executor, error: GroupFailure) -> None:
        """Continues without a lost replica; the others run its task, from the last step that was kept."""
        job = self.jobs[number]
        if isinstance(job, SampleJob) and error.progress:
            job = self.jobs[number] = replace(job, progress=error.progress)
        done = job.progress.step if isinstance(job, SampleJob) and job.progress else 0
        with self._lock:
            losses = self._losses.setdefault(number, [])
            losses.append(done)
            if not replica.is_replaced:
                self._lost.add(replica)
            self._waiting.appendleft(number)
            is_over = len(self._lost) == len(self.names) or losses.count(done) == MOST_LOSSES
        if is_over:
            self._fail(error)
            return
        self.notes.append(f"{self.names[replica]} was lost, and the others do its work: {error.summary}")
        logger.warning(self.notes[-1])
        if isinstance(job, SampleJob):
            self._events.put((number, done))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop.set()
