"""First-block step cache: while the first block does nearly what it did at an earlier step, what the others would add is predicted
from what they added then. From ParaAttention's and TeaCache's observation that neighbouring steps resemble each other, and from
TaylorSeer's that what is added goes on as it went.
"""

from collections.abc import Callable

import torch

STATES = 4
"""Tensors as large as a rank's tokens that a cache holds at most while blocks run."""
LIMIT = 3
"""Steps in a row that are spared at most, however high the threshold: cache-dit's ``max_continuous_cached_steps``. Measured in
benchmarks/NOTES.md."""


class StepCache:
    """What one window's forwards have in common. Lives as long as its job.

    What the other blocks add is predicted from the line through what they added in the last two forwards that ran whole. How far along
    it, the first block's work says, by least squares: where a step's new noise is most of what changes, that is hardly any way.

    Args:
        threshold: relative change of the first block's work, in L1 norm over all tokens of all ranks, below which the other
            blocks do not run. It is measured from the last forward that ran whole, so small changes add up.
        total: sums a tensor over all ranks, so that all take the same decision.
    """

    def __init__(self, threshold: float, total: Callable[[torch.Tensor], torch.Tensor]):
        self.threshold = threshold
        self.total = total
        self.reusing = False
        """Whether blocks after the first have nothing to do in this forward."""
        self.forwards = self.reused = 0
        self._in_a_row = 0
        self._ahead = 0.0
        """Of the last whole forward on the line, in its distance from the one before it."""
        self._first = self._rest = 0.0
        """What the first block and the others added in the last whole forward; before it, nothing."""
        self._first_gained = self._rest_gained = self._start = None
        """Over the whole forward before that; and what the others start from in one that is under way."""

    def begin(self) -> None:
        """A forward starts: the first block always runs."""
        self.reusing = False
        self.forwards += 1

    def after_first(self, before: torch.Tensor, after: torch.Tensor, real: int) -> None:
        """Decides, from tokens ``[batch, tokens, features]`` before and after the first block, the first ``real`` of them no padding."""
        change = after - before
        if self._first_gained is not None:
            earlier, gained = (part[:, :real].float() for part in (self._first, self._first_gained))
            moved = change[:, :real].float() - earlier
            products = (moved.flatten() @ gained.flatten(), gained.flatten() @ gained.flatten())
            sums = torch.stack([moved.abs().sum(), earlier.abs().sum(), *products])
            difference, size, along, length = self.total(sums).tolist()
            self.reusing = self._in_a_row < LIMIT and difference < self.threshold * size
            self._ahead = min(max(along / length, 0.0), LIMIT) if length else 0.0
        if not self.reusing:
            self._first_gained, self._rest_gained = change - self._first, None
            self._first, self._start = change, after

    def expire(self) -> None:
        """Has the next forward run whole: earlier ones do not predict what it makes."""
        self._first = self._rest = 0.0
        self._first_gained = self._rest_gained = None
        self._in_a_row = 0

    def after_last(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the blocks have made of the tokens, given what came out of the last one."""
        if self.reusing:
            self.reused += 1
            self._in_a_row += 1
            return tokens + self._rest.add(self._rest_gained, alpha=self._ahead)
        rest, self._start = tokens - self._start, None
        self._rest, self._rest_gained, self._in_a_row = rest, rest - self._rest, 0
        return tokens


class StepCaches:
    """The caches of one job, one a window. With a threshold of 0 there are none."""

    def __init__(self, threshold: float, total: Callable[[torch.Tensor], torch.Tensor]):
        self.threshold = threshold
        self.total = total
        self._caches: dict[tuple[int, int], StepCache] = {}

    def of(self, frames: slice) -> StepCache | None:
        """The cache of a window's frames, wherever it lies in the video."""
        if self.threshold == 0:
            return None
        return self._caches.setdefault((frames.start, frames.stop), StepCache(self.threshold, self.total))

    def expire(self) -> None:
        """Has the next forward of every window run whole, as its prompt is another one."""
        for cache in self._caches.values():
            cache.expire()

    @property
    def restarted(self) -> str | None:
        """A note for a resumed job: what began again, if anything did."""
        return "the step cache began again on the way" if self.threshold else None

    @property
    def note(self) -> str | None:
        """A note: how much was spared."""
        if self.threshold == 0:
            return None
        reused, forwards = (sum(getattr(cache, name) for cache in self._caches.values()) for name in ("reused", "forwards"))
        return f"step cache {self.threshold:g}: {reused} of {forwards} forwards ran their first block only"
