"""First-block step cache: extrapolates the other blocks' residual while the first block's changes little between steps.

That neighbouring steps are similar is the observation of ParaAttention and TeaCache; extrapolating residuals is from
TaylorSeer.
"""

from collections.abc import Callable

import torch

STATES = 4
"""Maximum number of tensors of a rank's token size that a cache holds while blocks run."""
LIMIT = 3
"""Maximum number of consecutive extrapolated steps, whatever the threshold: cache-dit's ``max_continuous_cached_steps``.
Measured in benchmarks/NOTES.md."""


class StepCache:
    """The state that one window's forward passes share during a job.

    The other blocks' residual is extrapolated linearly from the last two full forward passes. How far is estimated from the
    first block's residual by least squares: if most of its change is new noise, hardly at all.

    Args:
        threshold: relative change of the first block's residual, in L1 norm over all tokens of all ranks, below which the other
            blocks are extrapolated. It is relative to the last full forward pass, so small changes accumulate.
        total: sums a tensor over all ranks, so that all decide alike.
    """

    def __init__(self, threshold: float, total: Callable[[torch.Tensor], torch.Tensor]):
        self.threshold = threshold
        self.total = total
        self.reusing = False
        """Whether blocks after the first are skipped in this forward pass."""
        self.forwards = self.reused = 0
        self._in_a_row = 0
        self._ahead = 0.0
        """Position on the line, from the last full pass, in units of its distance from the one before."""
        self._first = self._rest = 0.0
        """Residuals of the first block and of the others in the last full pass; 0 before it."""
        self._first_gained = self._rest_gained = self._start = None
        """Their changes since the full pass before; and the input of the other blocks during a full pass."""

    def begin(self) -> None:
        """Starts a forward pass; the first block always runs."""
        self.reusing = False
        self.forwards += 1

    def after_first(self, before: torch.Tensor, after: torch.Tensor, real: int) -> None:
        """Decides whether the other blocks run.

        Args:
            before, after: tokens ``[batch, tokens, features]`` before and after the first block.
            real: number of tokens that are not padding; they come first.
        """
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
        """Forces a full pass next, as earlier ones do not predict its residuals."""
        self._first = self._rest = 0.0
        self._first_gained = self._rest_gained = None
        self._in_a_row = 0

    def after_last(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the output of all blocks, given the output of the last one."""
        if self.reusing:
            self.reused += 1
            self._in_a_row += 1
            return tokens + self._rest.add(self._rest_gained, alpha=self._ahead)
        rest, self._start = tokens - self._start, None
        self._rest, self._rest_gained, self._in_a_row = rest, rest - self._rest, 0
        return tokens
