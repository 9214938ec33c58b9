"""First-block step cache: while the first block does nearly what it did at an earlier step, what the others added then is
added again instead of computed. From ParaAttention's and TeaCache's observation that neighbouring steps resemble each other.
"""

from collections.abc import Callable

import torch

STATES = 3
"""Tensors as large as a rank's tokens that a cache holds at most while a forward runs."""


class StepCache:
    """What one window's forwards have in common. Lives as long as its job.

    Args:
        threshold: relative change of the first block's work, in L1 norm over all tokens of all ranks, below which the other
            blocks' work is used again. It is measured from the last forward that ran whole, so small changes add up.
        total: sums a tensor over all ranks, so that all take the same decision.
    """

    def __init__(self, threshold: float, total: Callable[[torch.Tensor], torch.Tensor]):
        self.threshold = threshold
        self.total = total
        self.reusing = False
        """Whether blocks after the first have nothing to do in this forward."""
        self.forwards = self.reused = 0
        self._first = self._start = self._rest = None

    def begin(self) -> None:
        """A forward starts: the first block always runs."""
        self.reusing = False
        self.forwards += 1

    def after_first(self, before: torch.Tensor, after: torch.Tensor, real: int) -> None:
        """Decides, from tokens ``[batch, tokens, features]`` before and after the first block, the first ``real`` of them no padding."""
        change = after - before
        if self._rest is not None:
            earlier, now = self._first[:, :real].float(), change[:, :real].float()
            difference, size = self.total(torch.stack([(now - earlier).abs().sum(), earlier.abs().sum()])).tolist()
            self.reusing = difference < self.threshold * size
        if not self.reusing:
            self._first, self._start = change, after

    def after_last(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the blocks have made of the tokens, given what came out of the last one."""
        if self.reusing:
            self.reused += 1
            return tokens + self._rest
        self._rest, self._start = tokens - self._start, None
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

    @property
    def anew(self) -> str | None:
        """For the person whose job goes on after it was lost: what began again, if anything did."""
        return "the step cache began anew on the way" if self.threshold else None

    @property
    def note(self) -> str | None:
        """For the person: how much was spared."""
        if self.threshold == 0:
            return None
        reused, forwards = (sum(getattr(cache, name) for cache in self._caches.values()) for name in ("reused", "forwards"))
        return f"step cache {self.threshold:g}: {reused} of {forwards} forwards used an earlier one's blocks again"
