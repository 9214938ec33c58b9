"""Measures how fast unequal workers are, and keeps slow ones from delaying the end."""

import heapq
import time
from collections.abc import Hashable, Iterable


class Paces:
    """The duration of each worker's last task, and the start of its running one. Tasks are assumed to be of about the same size."""

    def __init__(self):
        self._seconds: dict[Hashable, float] = {}
        self._since: dict[Hashable, float] = {}

    def begin(self, worker: Hashable) -> None:
        """Records that a worker begins a task."""
        self._since[worker] = time.monotonic()

    def end(self, worker: Hashable, *, overhead: float | None) -> None:
        """Records that a worker is free.

        Args:
            worker: that had begun a task.
            overhead: seconds of the task that were spent loading, which do not count; None if it did not finish the task.
        """
        since = self._since.pop(worker)
        if overhead is not None:
            self._seconds[worker] = max(time.monotonic() - since - overhead, 0.0)

    def should_begin(self, worker: Hashable, others: Iterable[Hashable], *, left: int) -> bool:
        """Whether a free worker would finish a task before the others finish all that are left. If not, it would delay the end.

        Args:
            worker: the free worker. It should begin if its speed is unknown.
            others: the workers that can also take tasks. Those whose speed is unknown do not count; one whose running task takes
                longer than its last one counts as that slow.
            left: tasks that no worker has begun.
        """
        now = time.monotonic()
        if worker not in self._seconds:
            return True
        free_at = []
        for other in set(others) & self._seconds.keys():
            since = self._since.get(other)
            seconds = max(self._seconds[other], now - since if since is not None else 0.0)
            free_at.append((max(now, since + self._seconds[other]) if since is not None else now, seconds, id(other)))
        if not free_at:
            return True
        heapq.heapify(free_at)
        end = now
        for _ in range(left):
            free, seconds, name = free_at[0]
            end = max(end, free + seconds)
            heapq.heapreplace(free_at, (free + seconds, seconds, name))
        return now + self._seconds[worker] <= end
