"""Guidance cache: makes the unconditional half of guidance from the conditional one, without running the model on it.

This is the CFG-Cache of FasterCache (arXiv 2410.19355), with the numbers that it was published with for CogVideoX: the two halves of
neighbouring steps differ alike, first in low spatial frequencies and later in high ones.
"""

from collections.abc import Sequence

import torch

BEGIN = 660
"""Timestep below which steps may be spared: step 18 of 50."""
LOW_ABOVE, HIGH_BELOW = 200, 420
"""Timesteps above which low frequencies grow, and below which high ones do: until step 40 of 50, and from step 30."""
GROWTH = 1.1
"""Factor of the difference for every step that uses it."""
RADIUS = 5
"""Low frequencies are those within the shorter side divided by this."""


def low_pass(states: torch.Tensor) -> torch.Tensor:
    """Returns the low spatial frequencies of ``[…, height, width]``, float32."""
    height, width = states.shape[-2:]
    rows, columns = torch.arange(height, device=states.device), torch.arange(width // 2 + 1, device=states.device)
    distance = torch.minimum(rows, height - rows)[:, None] ** 2 + columns**2
    low = distance <= (min(height, width) // RADIUS) ** 2
    return torch.fft.irfft2(torch.fft.rfft2(states) * low, s=(height, width))


class GuidanceCache:
    """The difference of guidance's halves that one window's steps share during a job.

    The published method splits every prediction into frequencies. As that is linear, splitting the difference once is the same.

    Args:
        most: maximum number of steps after a full one that use its difference.
    """

    def __init__(self, most: int):
        self.most = most
        self.steps = self.spared = 0
        """Number of steps, and of those without an unconditional half of their own."""
        self.renews = False
        """Whether this step runs both halves for steps after it."""
        self._step = self._timestep = self._full = 0
        """The step and its timestep; and the last full step."""
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        """The difference, unconditional minus conditional, by frequency; None before a full step."""

    def begin(self, step: int, timestep: int) -> bool:
        """Starts a step of the job and returns whether it runs the conditional half only."""
        self.steps += 1
        self._step, self._timestep = step, timestep
        spared = self._low is not None and timestep < BEGIN and step - self._full <= self.most
        self.renews = timestep < BEGIN and not spared
        return spared

    def expire(self) -> None:
        """Forces a full step next, as earlier ones do not predict its difference."""
        self._low = self._high = None

    def halves(self, predicted: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Returns the unconditional and the conditional prediction of the step.

        Args:
            predicted: both, or the conditional one, ``[batch, frames, channels, height, width]``, float32.
        """
        if len(predicted) == 2:
            difference = predicted[0] - predicted[1]
            self._low = low_pass(difference)
            self._high, self._full = difference - self._low, self._step
            return predicted
        (conditional,) = predicted
        self.spared += 1
        if self._timestep > LOW_ABOVE:
            self._low = self._low * GROWTH
        if self._timestep < HIGH_BELOW:
            self._high = self._high * GROWTH
        return conditional + self._low + self._high, conditional
