"""Which frames the model sees at a time: all of them, or windows whose predictions are blended.

The ideas are MultiDiffusion's (arXiv 2302.08113: overlapping parts are blended at every step) and FreeNoise's (arXiv
2310.15169: the noise of the first window, in another order, is that of the later ones). All numbers of frames here are
latent frames, with the padding that makes them whole tokens.
"""

from dataclasses import dataclass

import torch

from ...jobs import SampleJob, WindowJob
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.facts import TEMPORAL

GOLDEN_RATIO = 0.618034
"""The fractions of its multiples spread evenly, however many are taken."""


@dataclass(frozen=True)
class Window:
    """The frames of one forward. No window of a step needs another of the same step: any rank could run any of them."""

    start: int
    weights: tuple[float, ...]
    """Of each frame's prediction; those of all windows of a step sum to 1 in every frame."""

    @property
    def frames(self) -> slice:
        """The window's place in the video."""
        return slice(self.start, self.start + len(self.weights))

    def weigh(self, prediction: torch.Tensor) -> torch.Tensor:
        """A prediction ``[batch, frames, channels, height, width]`` times the weights."""
        if all(weight == 1 for weight in self.weights):  # and no device is waited for
            return prediction
        return prediction * prediction.new_tensor(self.weights)[:, None, None, None]


@dataclass(frozen=True)
class Layout:
    """How windows cover a video."""

    frames: int
    """Of the video."""
    length: int
    """Of each window; all frames where there is one window."""
    overlap: int = 0
    """By which neighbours overlap at least."""
    token: int = 1
    """Frames of one token; the other numbers are multiples of it."""
    shifted: bool = False
    """Whether windows move from step to step."""
    shuffled: bool = False
    """Whether later windows start from the first one's noise."""

    @classmethod
    def of(cls, job: SampleJob, checkpoint: Checkpoint) -> "Layout":
        """A job's. What is no whole token is rounded up."""

        def whole(frames: int) -> int:
            return frames + checkpoint.padding_frames(frames)

        frames, asked = whole(job.latent.shape[2]), job.windows
        if asked is None:
            return cls(frames, frames)
        return cls(
            frames,
            length=min(frames, whole((asked.frames - 1) // TEMPORAL + 1)),
            overlap=whole(asked.overlap // TEMPORAL),
            token=checkpoint.patch_size_t or 1,
            shifted=asked.schedule == "uniform",
            shuffled=asked.shuffle_noise,
        )

    @property
    def is_whole(self) -> bool:
        """Whether the only window is the video."""
        return self.length == self.frames

    @property
    def stride(self) -> int:
        """Frames from one window's start to the next one's, at most."""
        return self.length - self.overlap

    def at(self, step: int) -> tuple[Window, ...]:
        """The windows of a step, in order; all of one length, so the first and the last may overlap their neighbour more.

        Weights rise and fall linearly over the overlap, so that a prediction counts least where it knows only one side.
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
        """Where windows begin in any of so many steps."""
        return {window.start for step in range(steps) for window in self.at(step)}

    def noise_order(self, generator: torch.Generator) -> list[int]:
        """For each frame the one whose noise it gets.

        Where a window moves on, the frames that it takes in get the noise of those that it leaves, in a new order: so all
        windows that do not shift see the noise of the first.
        """
        order = list(range(self.length))
        while len(order) < self.frames:
            left = order[-self.length :][: min(self.stride, self.frames - len(order))]
            order += [left[place] for place in torch.randperm(len(left), generator=generator)]
        return order


def forward_size(job: SampleJob | WindowJob, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Videos, frames, height and width of a forward: of one window where a job has several."""
    if isinstance(job, WindowJob):
        batch, frames, _, height, width = job.seen.shape
        return batch, frames, height, width
    return len(job.latent), Layout.of(job, checkpoint).length, *job.latent.shape[3:]


def advice(job: SampleJob, checkpoint: Checkpoint) -> str | None:
    """A line for the user whose windows change nothing, or whose video needs some."""
    name, most, frames = checkpoint.name, checkpoint.most_frames, (job.latent.shape[2] - 1) * TEMPORAL + 1
    if job.windows is not None and Layout.of(job, checkpoint).is_whole:
        return f"the video of {frames} frames fits in one window of {job.windows.frames}: it is sampled whole"
    if job.windows is None and job.image is None and frames > most:
        return f"{frames} frames are more than the {most} that {name} was trained for; CogVideoX Context Windows (--window) may help"
    return None
