"""The pieces of one call, taken by replicas as they get free."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .errors import Cancelled, GroupFailure
from .executor import StepListener, StopSignal, steps_of
from .group.client import GroupExecutor
from .jobs import Job, Result
from .paces import Paces

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
        self._lock = threading.Lock()

    def take(self, is_wanted: Callable[[GroupExecutor], bool]) -> GroupExecutor | None:
        """The first free replica that is wanted, or None."""
        with self._lock:
            for replica in self._order:
                if replica not in self._busy and is_wanted(replica):
                    self._busy.add(replica)
                    return replica
        return None

    def give_back(self, replica: GroupExecutor, *, lost: bool) -> None:
        """Makes a replica free; one that was lost will be taken last, in case it comes back."""
        with self._lock:
            self._busy.discard(replica)
            if lost:
                self._order.remove(replica)
                self._order.append(replica)


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
        self._waiting = deque(range(len(jobs)))
        self._steps: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._lost: set[GroupExecutor] = set()
        self._paces = Paces()
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
        """Takes pieces until all are done. While it finds none, or no replica, it looks again for what others give back."""
        while not self._is_stopping() and len(self.results) < len(self.jobs):
            with self._lock:
                replica = self.pool.take(self._is_wanted) if self._waiting else None
                if replica:
                    number = self._waiting.popleft()
                    self._paces.begin(replica)
            if replica:
                self._try(number, replica)
            else:
                time.sleep(POLL_SECONDS)

    def _is_wanted(self, replica: GroupExecutor) -> bool:
        """Whether a replica is there, and no faster ones will have done before it what is left."""
        others = self.names.keys() - self._lost - {replica}
        return replica not in self._lost and self._paces.should_begin(replica, others, left=len(self._waiting))

    def _try(self, number: int, replica: GroupExecutor) -> None:
        lost, loading = False, None
        try:
            result = replica.run(self.jobs[number], lambda step, _: self._steps.put((number, step)), self._is_stopping)
            self.results[number] = replica, result
            loading = result.report.load_seconds
        except GroupFailure as error:
            lost = not replica.is_there()  # else the job is what fails, and would fail anywhere
            if lost:
                self._give_up(number, replica, error)
            else:
                self._fail(error)
        except Cancelled:
            self._stop.set()
        except Exception as error:  # raised again in the caller's thread
            self._fail(error)
        finally:
            with self._lock:
                self._paces.end(replica, besides=loading)
            if self.has_closed():
                replica.close()  # it may just have been started again
            self.pool.give_back(replica, lost=lost)

    def _give_up(self, number: int, replica: GroupExecutor, error: GroupFailure) -> None:
        """Goes on without a replica."""
        with self._lock:
            self._lost.add(replica)
            self._waiting.appendleft(number)
            none_is_left = len(self._lost) == len(self.names)
        if none_is_left:
            self._fail(error)
            return
        self.notes.append(f"{self.names[replica]} was lost, and the others do its work: {error.summary}")
        logger.warning(self.notes[-1])
        self._steps.put((number, 0))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop.set()
