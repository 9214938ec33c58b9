"""Jobs: frozen requests with their tensors, checked when they are made.

Tensors have ComfyUI's layouts: latents are unscaled VAE latents ``[batch, channels, latent frames, height/8, width/8]``; images
are ``[frames, height, width, 3]`` in 0..1. Whether a job fits a checkpoint (channels, text tokens) is checked by
:func:`parallel_backend.cogvideox.pipeline.validation.check`.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, fields

import torch

from .errors import RequestError
from .model import ControlNet, Model, Windows
from .upscale_job import UpscaleJob
from .validation import (
    CHANNELS,
    between,
    check_conditions,
    check_images,
    check_latent,
    check_size,
    check_text,
    check_tiles,
    check_timesteps,
    choice,
)

SCHEDULERS = ("auto", "ddim", "dpm")
IMAGE_SCALES = ("auto", "inverse", "raw", "scaled")
"""Factors for a start image's latent; see ``Checkpoint.image_scale``."""
MAX_SEED = 2**64 - 1
ROUNDING = 1e-6
"""Tolerance for a share of the steps."""


def empty_latent(*, width: int, height: int, frames: int, batch: int = 1, channels: int = CHANNELS) -> torch.Tensor:
    """Returns zeros of shape ``[batch, channels, (frames-1)/4+1, height/8, width/8]``.

    Raises:
        RequestError: for a size that no CogVideoX can make.
    """
    check_size(width, height, frames, batch)
    return torch.zeros(batch, channels, (frames - 1) // 4 + 1, height // 8, width // 8)


@dataclass(frozen=True)
class Progress:
    """The state of a sampling job after some of its steps: all that is needed to resume it."""

    step: int
    """Number of steps done."""
    latents: torch.Tensor
    """Noisy, scaled, in the model's dtype: ``[batch, latent frames with padding, channels, height/8, width/8]``."""
    generator: torch.Tensor
    """State of the noise generator, as bytes."""
    clean: torch.Tensor | None = None
    """The clean latents that the last step predicted, float32, shaped like ``latents``. The next step of DPM needs them."""


@dataclass(frozen=True)
class SampleJob:
    """Denoises a latent. The result is a latent of the same shape, float32."""

    kind = "sample"
    model: Model
    positive: torch.Tensor
    """Text states ``[1 or batch, tokens, features]``; with ``positive_starts`` ``[1 or batch, prompts, tokens, features]``."""
    latent: torch.Tensor
    """``[batch, channels, latent frames, height/8, width/8]``; all zeros means empty."""
    negative: torch.Tensor | None = None
    """Like ``positive``; required if ``cfg`` is above 1."""
    seed: int = 0
    steps: int = 50
    cfg: float = 6.0
    scheduler: str = "auto"
    """``auto`` is the checkpoint's own."""
    dynamic_cfg: bool = False
    """Whether the guidance scale follows a cosine over the steps, as in diffusers."""
    denoise: float = 1.0
    """1 starts from noise; 0.6 runs the last 60 % of the steps on the latent, as in diffusers."""
    image: torch.Tensor | None = None
    """The start image as an unscaled VAE latent ``[1 or batch, channels, 1, height/8, width/8]``; None for text to video."""
    progress: Progress | None = None
    """The state to resume from, as a lost group reported it; None starts at the first step."""
    windows: Windows | None = None
    """For a video longer than the model was trained for; None runs all frames at once."""
    image_scale: str = "auto"
    """The factor for the start image's latent: one of ``IMAGE_SCALES``; ``auto`` is the checkpoint's own."""
    image_strength: float = 1.0
    """Another factor for that latent, or for ``masked_video``."""
    image_start: float = 0.0
    """Share of the steps at which the model is first shown the image or masked video; ``image_end`` is when that ends."""
    image_end: float = 1.0
    end_image: torch.Tensor | None = None
    """The video's last image, shaped like ``image`` and given with it; see :mod:`.cogvideox.pipeline.conditions`."""
    kept: torch.Tensor | None = None
    """The video's first frames like ``latent``, if they are not to be made; see :mod:`.executor.continuing`."""
    control: torch.Tensor | None = None
    """A control video as an unscaled VAE latent ``[1 or batch, channels, latent frames, height/8, width/8]``."""
    control_strength: float = 1.0
    """The factor for the control video's latent."""
    control_start: float = 0.0
    """Share of the steps at which control starts; ``control_end`` is when it ends."""
    control_end: float = 1.0
    masked_video: torch.Tensor | None = None
    """For inpaint models: the video as an unscaled VAE latent like ``control``, black where it is replaced. For object removal models:
    the whole video."""
    mask: torch.Tensor | None = None
    """Goes with ``masked_video``: ``[1 or batch, 1, latent frames, height/8, width/8]``, 1 where the video is replaced. For object
    removal models: as an unscaled VAE latent; see :mod:`parallel_backend.cogvideox.pipeline.removal`."""
    batch_size: int = 0
    """If the job is one video of a batch, the size of the batch; 0 for a whole job."""
    batch_index: int = 0
    """The video's index in that batch. It gets the noise that it would get there."""
    pipefusion_warmup: int = 4
    """Number of first steps that a plan with ``pipefusion`` computes exactly. With more of them the video is closer to that of
    ``single``; with all of them it is the same (benchmarks/results/pipefusion.md)."""
    preview: bool = False
    """Whether steps report pictures of the predicted clean video to the caller."""
    positive_starts: tuple[float, ...] = ()
    """For several prompts in turn: the share of the steps at which each starts, ascending from 0."""
    negative_starts: tuple[float, ...] = ()
    """Likewise for ``negative``."""
    noise: torch.Tensor | None = None
    """Where to start instead of noise from the seed: of unit variance, shaped like ``latent``, its first dimension 1 or the batch."""
    timesteps: tuple[int, ...] = ()
    """The timesteps of the steps by hand, descending from at most 999; empty for the scheduler's own."""
    controlnets: tuple[ControlNet, ...] = ()
    """ControlNets, whose changes add up."""
    controlnet_videos: torch.Tensor | None = None
    """Their encoded control videos, one after the other: ``[1 or batch, channels, latent frames, height/8, width/8]``."""

    def __post_init__(self):
        check_latent(self.latent)
        check_images(self)
        choice("image_scale", self.image_scale, IMAGE_SCALES)
        check_conditions(self)
        choice("scheduler", self.scheduler, SCHEDULERS)
        between("steps", self.steps, 1, 1000)
        between("pipefusion_warmup", self.pipefusion_warmup, 1, 1000)
        between("seed", self.seed, 0, MAX_SEED)
        between("cfg", self.cfg, 0.0, 100.0)
        between("denoise", self.denoise, 0.0, 1.0)
        if self.steps_to_run < 1:
            raise RequestError(f"denoise {self.denoise} of {self.steps} steps leaves no step; increase one of them")
        if self.batch_size and not (self.latent.shape[0] == 1 and 0 <= self.batch_index < self.batch_size):
            raise RequestError(
                f"the latent has {self.latent.shape[0]} videos, at index {self.batch_index} of a batch of {self.batch_size}; "
                "a job for one video of a batch has a latent of one video and an index below the batch size"
            )
        if self.denoise < 1 and not self.batch_size and not self.latent.any():
            raise RequestError(f"denoise is {self.denoise} but the latent is empty; encode a video, or use denoise 1")
        if self.guided and self.negative is None:
            raise RequestError(f"cfg is {self.cfg} but there is no negative conditioning; add one, or use cfg 1")
        batch = len(self.latent)
        check_text("positive", self.positive, self.positive_starts, batch)
        if self.negative is not None:
            check_text("negative", self.negative, self.negative_starts, batch)
        check_timesteps(self.timesteps, self.steps)

    @property
    def guided(self) -> bool:
        """Whether each step runs the model on both prompts (classifier-free guidance)."""
        return self.cfg > 1

    @property
    def riflex(self) -> str:
        """One of ``model.RIFLEXES``."""
        return self.windows.riflex if self.windows else "off"

    @property
    def steps_to_run(self) -> int:
        """Number of steps that ``denoise`` leaves."""
        return int(self.steps * self.denoise)

    def prompts_of(self, step: int) -> tuple[int, int]:
        """Returns the indices of the negative and the positive prompt of a step, counted from the first step that is run."""
        share = (self.steps - self.steps_to_run + step) / self.steps + ROUNDING
        return tuple(max(bisect_right(starts, share) - 1, 0) for starts in (self.negative_starts, self.positive_starts))

    @property
    def drawn(self) -> tuple[int, slice]:
        """The number of videos to draw noise for, and the slice of it that this job uses."""
        if self.batch_size:
            return self.batch_size, slice(self.batch_index, self.batch_index + 1)
        return self.latent.shape[0], slice(None)


@dataclass(frozen=True)
class LoadJob(SampleJob):
    """Loads the weights for a sampling job whose text is not known yet. The result is an empty tensor."""

    kind = "load"

    @classmethod
    def of(cls, job: SampleJob) -> "LoadJob":
        """Makes the load job for a sampling job."""
        return cls(**{item.name: getattr(job, item.name) for item in fields(job)})


@dataclass(frozen=True)
class WindowJob:
    """Predicts the frames of a window in one step. The result is ``[batch, frames, channels, height/8, width/8]``, float32."""

    kind = "window"
    model: Model
    seen: torch.Tensor
    """The model's input ``[batch, frames, channels, height/8, width/8]`` in its dtype: noisy, scaled latents of whole tokens,
    concatenated with the condition if there is one."""
    positive: torch.Tensor
    """Text states ``[1 or batch, tokens, features]``."""
    timestep: int
    scale: float
    """Guidance scale; not used without ``negative``."""
    negative: torch.Tensor | None = None
    """None if the step is not guided."""
    controlnets: tuple[ControlNet, ...] = ()
    """As they are in this step. Their encoded control videos are the last channels of ``seen``."""
    riflex: str = "off"
    """Of the job's windows."""

    @property
    def guided(self) -> bool:
        """Whether the model runs on both prompts (classifier-free guidance)."""
        return self.negative is not None

    def __post_init__(self):
        if self.seen.ndim != 5:
            raise RequestError(f"a window is {tuple(self.seen.shape)}; it must be [batch, frames, channels, height/8, width/8]")


@dataclass(frozen=True)
class DecodeJob:
    """Decodes a latent. The result is ``[batch, frames, height, width, 3]``, float32 in 0..1."""

    kind = "decode"
    model: Model
    latent: torch.Tensor
    tiling: str = "auto"
    """``auto`` uses tiles if the whole does not fit in free memory."""
    tile: int = 256
    """Edge of a tile in pixels."""
    overlap: int = 64
    """Pixels that neighbouring tiles share and blend."""

    def __post_init__(self):
        check_latent(self.latent)
        check_tiles(self)


@dataclass(frozen=True)
class EncodeJob:
    """Encodes a video. The result is a latent ``[1, channels, latent frames, height/8, width/8]``, float32."""

    kind = "encode"
    model: Model
    pixels: torch.Tensor
    """``[frames, height, width, 3]`` in 0..1, with 4k+1 frames."""
    tiling: str = "auto"
    """This and the next two fields as in :class:`DecodeJob`."""
    tile: int = 256
    overlap: int = 64

    def __post_init__(self):
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3:
            raise RequestError(f"the video is {tuple(self.pixels.shape)}; it must be [frames, height, width, 3]")
        frames, height, width, _ = self.pixels.shape
        check_size(width, height, frames)
        check_tiles(self)


Job = SampleJob | WindowJob | DecodeJob | EncodeJob | UpscaleJob
JOBS: dict[str, type] = {job.kind: job for job in (SampleJob, LoadJob, WindowJob, DecodeJob, EncodeJob)}


@dataclass(frozen=True)
class Report:
    """What a job cost."""

    plan: str = "single"
    world_size: int = 1
    load_seconds: float = 0.0
    """Time to read and move weights; 0 if they were loaded already."""
    run_seconds: float = 0.0
    """Time from the start of the first step to the result, without loading."""
    step_seconds: tuple[float, ...] = ()
    """Time of each step, without reporting it to the caller."""
    peak_memory: tuple[int, ...] = ()
    """Bytes by rank: the GPU's peak during the job, or on the CPU the peak resident size of the process."""
    notes: tuple[str, ...] = ()
    """One line for each thing to know of the job; :mod:`.notes` says which are warnings."""


@dataclass(frozen=True)
class Result:
    """A job's tensor and its report."""

    tensor: torch.Tensor
    report: Report = field(default_factory=Report)
