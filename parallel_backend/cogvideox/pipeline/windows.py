"""Context windows: the frames that the model sees at a time. They overlap, and their predictions are blended.

Blending at every step is from MultiDiffusion (arXiv 2302.08113). Reusing the first window's noise in another order for later
frames is from FreeNoise (arXiv 2310.15169). All numbers of frames here are latent frames, including the padding to whole
tokens.
"""

import math
from dataclasses import dataclass

import torch

from ...jobs import SampleJob, WindowJob
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compression import TEMPORAL, latent_frames_of

GOLDEN_RATIO = 0.618034
"""The fractional parts of its multiples are evenly distributed, for any number of them."""


@dataclass(frozen=True)
class Window:
    """The frames of one forward pass. Windows of a step are independent of each other, so any rank can run any of them."""

    start: int
    weights: tuple[float, ...]
    """Blending weight of each frame's prediction; over all windows of a step they sum to 1 in every frame."""

    @property
    def frames(self) -> slice:
        """The window's position in the video."""
        return slice(self.start, self.start + len(self.weights))

    def weigh(self, prediction: torch.Tensor) -> torch.Tensor:
        """Multiplies a prediction ``[batch, frames, channels, height, width]`` by the weights."""
        if all(weight == 1 for weight in self.weights):  # avoids a copy from the host
            return prediction
        return prediction * prediction.new_tensor(self.weights)[:, None, None, None]


@dataclass(frozen=True)
class Layout:
    """How windows cover a video."""

    frames: int
    """Of the video."""
    length: int
    """Of each window; equals ``frames`` if there is one window."""
    overlap: int = 0
    """Minimum overlap of neighbouring windows."""
    token: int = 1
    """Frames per token; the other numbers are multiples of it."""
    shifted: bool = False
    """Whether windows move from step to step."""
    shuffled: bool = False
    """Whether later windows start from the first one's noise."""

    @classmethod
    def of(cls, job: SampleJob, checkpoint: Checkpoint) -> "Layout":
        """Returns the layout of a job, with lengths rounded up to whole tokens."""

        token = checkpoint.patch_size_t or 1

        def whole(frames: int) -> int:
            return math.ceil(frames / token) * token

        frames, asked = job.latent.shape[2] + checkpoint.padding_frames(job.latent.shape[2]), job.windows
        if asked is None:
            return cls(frames, frames)
        return cls(
            frames,
            length=min(frames, whole(latent_frames_of(asked.frames))),
            overlap=whole(asked.overlap // TEMPORAL),
            token=token,
            shifted=asked.schedule == "uniform",
            shuffled=asked.shuffle_noise,
        )

    @property
    def is_whole(self) -> bool:
        """Whether one window covers the entire video."""
        return self.length == self.frames

    @property
    def stride(self) -> int:
        """Maximum distance from one window's start to the next one's."""
        return self.length - self.overlap

    def at(self, step: int) -> tuple[Window, ...]:
        """Returns the windows of a step, in order.

        All have the same length, so the first and the last may overlap their neighbour by more. Weights are linear ramps over
        the overlap, so a prediction counts least where it has context on one side only.
        """
        if self.is_whole:
            return (Window(0, (1.0,) * self.frames),)
        last = self.frames - self.length
        shift = int(step * GOLDEN_RATIO % 1 * self.stride / self.token) * self.token if self.shifted else 0
        starts = sorted({min(max(start, 0), last) for start in range(-shift, last + self.stride, self.stride)})
        ramp = [min(place + 1, self.length - place, self.overlap + 1) for place in range(self.length)]
        total = [
            sum(ramp[frame - start] for start in starts if 0 <= frame - start < self.length) for frame in range(self.frames)
        ]
        return tuple(
            Window(start, tuple(weight / total[start + place] for place, weight in enumerate(ramp))) for start in starts
        )

    def starts(self, steps: int) -> set[int]:
        """Returns the start frames of all windows in a number of steps."""
        return {window.start for step in range(steps) for window in self.at(step)}

    def noise_order(self, generator: torch.Generator) -> list[int]:
        """Returns for each frame the index of the frame whose noise it gets.

        When a window advances, its new frames get the noise of the frames that it leaves, shuffled. All windows that do not
        shift thus see the noise of the first one.
        """
        order = list(range(self.length))
        while len(order) < self.frames:
            left = order[-self.length :][: min(self.stride, self.frames - len(order))]
            order += [left[place] for place in torch.randperm(len(left), generator=generator)]
        return order


def forward_size(job: SampleJob | WindowJob, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Returns batch size, frames, height and width of a forward pass; of one window if a job has several."""
    if isinstance(job, WindowJob):
        batch, frames, _, height, width = job.seen.shape
        return batch, frames, height, width
    return len(job.latent), Layout.of(job, checkpoint).length, *job.latent.shape[3:]
