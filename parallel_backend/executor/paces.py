"""How fast unequal workers are, and whether one should begin with what is left."""

import heapq
import time
from collections.abc import Hashable, Iterable


class Paces:
    """What is known of each worker: seconds of its last piece, and since when it is at one. Pieces are of one size, about."""

    def __init__(self):
        self._seconds: dict[Hashable, float] = {}
        self._since: dict[Hashable, float] = {}

    def begin(self, worker: Hashable) -> None:
        """Notes that a worker is at a piece."""
        self._since[worker] = time.monotonic()

    def end(self, worker: Hashable, *, besides: float | None) -> None:
        """Notes that a worker is free: after a piece, ``besides`` which were seconds of no work; after none where that is None."""
        since = self._since.pop(worker)
        if besides is not None:
            self._seconds[worker] = max(time.monotonic() - since - besides, 0.0)

    def should_begin(self, worker: Hashable, others: Iterable[Hashable], *, left: int) -> bool:
        """Whether a free worker would be done with one of the pieces left before the others were done with all of them.

        Else a slow one would hold up the end. The others are those that can take pieces; of one that has done none yet nothing
        is expected, and one that takes longer than it did is as slow as it now looks.
        """
        now = time.monotonic()
        if worker not in self._seconds:
            return True
        free_at = []
        for other in set(others) & self._seconds.keys():
            since = self._since.get(other)
            pace = max(self._seconds[other], now - since if since is not None else 0.0)
            free_at.append((max(now, since + self._seconds[other]) if since is not None else now, pace, id(other)))
        if not free_at:
            return True
        heapq.heapify(free_at)
        end = now
        for _ in range(left):
            free, pace, name = free_at[0]
            end = max(end, free + pace)
            heapq.heapreplace(free_at, (free + pace, pace, name))
        return now + self._seconds[worker] <= end
