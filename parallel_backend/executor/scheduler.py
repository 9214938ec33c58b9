"""The pieces of one call, taken by replicas as they get free."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..cogvideox.vae.preview import PictureListener
from ..config import CONFIG
from ..errors import Cancelled, GroupFailure
from ..jobs import Job, Result, SampleJob
from .base import StepListener, StopSignal, steps_of
from .group import GroupExecutor
from .paces import Paces

logger = logging.getLogger(__name__)

Made = tuple[GroupExecutor, Result]
"""What a replica made, and which."""
Follow = Callable[[int, list[Made]], Job | None]
"""What follows from a piece's jobs so far: the next one, or None. Asked in the thread of the replica that made the last."""


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


class ReplicaScheduler:
    """The pieces of one call, and who runs them.

    Threads, as many as can have a replica at once, take pieces; the caller's own thread hears of their steps.

    Args:
        pool: of all replicas.
        names: of each replica, for a person.
        jobs: to run, a piece each.
        has_closed: whether the executor was closed meanwhile.
        after: an earlier call of the same work, whose losses and paces count for this one too.
        follow: what the same replica does next for a piece; what a piece that is followed up has made is not kept.
    """

    def __init__(
        self,
        pool: Pool,
        names: dict[GroupExecutor, str],
        jobs: Sequence[Job],
        has_closed: StopSignal,
        follow: Follow | None = None,
        *,
        after: "ReplicaScheduler | None" = None,
    ):
        self.pool = pool
        self.names = names
        self.jobs = list(jobs)
        self.has_closed = has_closed
        self.follow = follow
        self.results: dict[int, list[Made]] = {}
        """Of each piece that is done."""
        self._made: list[list[Made]] = [[] for _ in jobs]
        """Of each piece that is not; one that a replica was lost with goes on from there."""
        self.notes: list[str] = after.notes if after else []
        self._steps = [steps_of([job]) for job in self.jobs]
        self._waiting = deque(range(len(jobs)))
        self._heard: queue.SimpleQueue[tuple[int, int | torch.Tensor]] = queue.SimpleQueue()
        """Of each piece how many steps are done, or a picture."""
        self._lost: set[GroupExecutor] = after._lost if after else set()
        self._paces = after._paces if after else Paces()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def run(self, on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None) -> None:
        """Runs all pieces; raises the error of the first that failed, or Cancelled."""
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
            raise Cancelled(f"stopped with {len(self.results)} of {len(self.jobs)} pieces done")

    def _listen(
        self,
        threads: list[threading.Thread],
        on_step: StepListener,
        should_stop: StopSignal,
        on_picture: PictureListener | None,
    ) -> None:
        """Tells steps of all pieces together, and shows their pictures, until the threads have ended."""
        done = dict.fromkeys(range(len(self.jobs)), 0)
        while True:
            ended = not any(thread.is_alive() for thread in threads)  # before the look: what they said is heard then
            try:
                number, said = self._heard.get(timeout=0 if ended else CONFIG.poll_seconds)
                if isinstance(said, torch.Tensor):
                    # Of several, those of the first that has steps left; of the last one's last step none has.
                    if number == next((place for place in done if done[place] < self._steps[place]), number):
                        on_picture(said)
                else:
                    done[number] = said
                    on_step(sum(done.values()), sum(self._steps))
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
                time.sleep(CONFIG.poll_seconds)

    def _is_wanted(self, replica: GroupExecutor) -> bool:
        """Whether a replica is there, and no faster ones will have done before it what is left."""
        others = self.names.keys() - self._lost - {replica}
        return replica not in self._lost and self._paces.should_begin(replica, others, left=len(self._waiting))

    def _try(self, number: int, replica: GroupExecutor) -> None:
        lost, loading = False, None
        try:
            loading = self._run(number, replica)
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

    def _run(self, number: int, replica: GroupExecutor) -> float:
        """Runs a piece, and what follows from it. Returns the seconds that were spent on loading."""
        loading, job, made = 0.0, self.jobs[number], self._made[number]

        def hear(said: int | torch.Tensor) -> None:
            self._heard.put((number, said))

        while job is not None:
            result = replica.run(job, lambda step, _: hear(step), self._is_stopping, hear)
            loading += result.report.load_seconds
            made.append((replica, result))
            job = self.jobs[number] = self.follow(number, made) if self.follow else None
        self.results[number] = made if self.follow is None else []
        self._made[number] = []
        return loading

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
        if isinstance(self.jobs[number], SampleJob):
            self._heard.put((number, 0))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop.set()
