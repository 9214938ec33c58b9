"""The state of a sampling job between steps: latents, random generator, scheduler and condition."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange

from ...jobs import Progress, SampleJob
from ...model import ControlNet
from ..checkpoint.checkpoint import Checkpoint
from . import conditions
from .conditions import COMFYUI_TO_DIFFUSERS
from .forward import Runtime
from .scheduler_step import Noise, Step, advance
from .windows import Layout

DIFFUSERS_TO_COMFYUI = "batch frames channels height width -> batch channels frames height width"


def guidance(job: SampleJob, timestep: int, steps: int) -> float:
    """Returns the guidance scale at a timestep; with ``dynamic_cfg`` it is diffusers' cosine schedule.

    Args:
        job: with its ``cfg``.
        timestep: of the scheduler.
        steps: number of steps that are run.
    """
    if not job.dynamic_cfg:
        return job.cfg
    progress = (steps - timestep) / steps
    return 1 + job.cfg * (1 - math.cos(math.pi * progress**5.0)) / 2


def starting_point(
    job: SampleJob, checkpoint: Checkpoint, layout: Layout, scheduler, generator: torch.Generator, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the noisy latent ``[batch, frames, channels, height, width]``, the timesteps to run, and the noise, on the CPU.

    Noise is drawn on the CPU in the model's dtype, as diffusers' pipelines do with a CPU generator. If the job is one video of a
    batch, noise is drawn for the entire batch, so the video is the same as in the batch.
    """
    _, channels, frames, height, width = job.latent.shape
    batch, own = job.drawn
    padding = checkpoint.padding_frames(frames)
    scheduler.set_timesteps(job.steps)
    for encoded in (job.image, job.end_image, job.latent if job.denoise < 1 else None):
        if encoded is not None:
            # diffusers samples the VAE's posterior with this generator before it draws the noise. ComfyUI and this pack use the
            # posterior's mean. The numbers are drawn and discarded, so that a seed gives the same noise.
            torch.randn((batch, *encoded.shape[1:]), generator=generator, dtype=dtype)
    skipped = job.steps - job.steps_to_run
    timesteps = (torch.tensor(job.timesteps) if job.timesteps else scheduler.timesteps)[skipped:]
    noise = torch.randn((batch, frames + padding, channels, height, width), generator=generator, dtype=dtype)[own]
    if job.noise is not None:  # padding frames keep noise from the seed
        noise[:, padding:] = rearrange(job.noise, COMFYUI_TO_DIFFUSERS).to(dtype)
    elif layout.shuffled:
        noise = noise[:, layout.noise_order(generator)]
    if job.denoise == 1:
        return noise * scheduler.init_noise_sigma, timesteps, noise
    clean = rearrange(job.latent * checkpoint.scaling_factor, COMFYUI_TO_DIFFUSERS).to(dtype)
    return scheduler.add_noise(clean, noise, timesteps[:1]), timesteps, noise


@dataclass(frozen=True)
class Kept:
    """Frames that a job does not make. Before each step they are put in with as much noise as the others have."""

    clean: torch.Tensor
    """Scaled, ``[batch, frames, channels, height, width]``."""
    noise: torch.Tensor
    """Shaped like ``clean``."""
    place: slice
    """Of the frames in the latents, after padding frames."""

    @classmethod
    def of(cls, job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor, noise: torch.Tensor) -> "Kept":
        """Returns those of a job, for its noisy latents and their noise."""
        padding = checkpoint.padding_frames(job.latent.shape[2])
        place = slice(padding, padding + job.kept.shape[2])
        return cls(conditions.fit(job.kept * checkpoint.scaling_factor, latents), noise[:, place].to(latents), place)

    def put_into(self, latents: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Returns latents with these frames, at a cumulative alpha of the scheduler."""
        noisy = (alpha**0.5 * self.clean + (1 - alpha) ** 0.5 * self.noise).to(latents.dtype)
        return torch.cat([latents[:, : self.place.start], noisy, latents[:, self.place.stop :]], dim=1)


class Sampling:
    """The state of a job between steps. A resumed job starts from its ``progress``.

    Args:
        job: to sample.
        checkpoint: of the model.
        runtime: what this rank computes with.
    """

    def __init__(self, job: SampleJob, checkpoint: Checkpoint, runtime: Runtime):
        self.job, self.checkpoint, self.runtime = job, checkpoint, runtime
        self.layout = Layout.of(job, checkpoint)
        self._scheduler = checkpoint.make_scheduler(job.scheduler)
        generator = torch.Generator("cpu").manual_seed(job.seed)
        start = starting_point(job, checkpoint, self.layout, self._scheduler, generator, runtime.dtype)
        latents, self.timesteps, noise = start
        self.latents = latents.to(runtime.device)
        """Noisy latents ``[batch, frames, channels, height, width]``."""
        self._noise = Noise(generator, job.drawn)
        self._kept = None if job.kept is None else Kept.of(job, checkpoint, self.latents, noise)
        self._condition_at = conditions.make(job, checkpoint, self.latents)
        self._videos = None if job.controlnet_videos is None else conditions.fit(job.controlnet_videos, self.latents)
        self.numbers = [job.prompts_of(step) for step in range(self.total)]
        """For each step the indices of its negative and positive prompts."""
        self.done = 0
        """Number of completed steps."""
        self._clean: torch.Tensor | None = None
        if job.progress is not None:
            self._resume(job.progress)

    def _resume(self, progress: Progress) -> None:
        self.done, self.latents = progress.step, progress.latents.to(self.latents)
        self._clean = None if progress.clean is None else progress.clean.to(self.runtime.device)
        self._noise.generator.set_state(progress.generator)

    @property
    def total(self) -> int:
        """Number of steps to run, including completed ones."""
        return len(self.timesteps)

    def model_input(self) -> torch.Tensor:
        """Returns the latents of the next step, concatenated with the condition and the encoded control videos, if any."""
        if self._kept:
            self.latents = self._kept.put_into(self.latents, self._scheduler.alphas_cumprod[self.timesteps[self.done]])
        parts = [self.latents, self._condition_at(self.done / self.total), self._videos]
        return torch.cat([part for part in parts if part is not None], dim=2)

    def controlnets(self, step: int) -> tuple[ControlNet, ...]:
        """Returns the ControlNets as they are in a step."""
        return tuple(net.at(step / self.total) for net in self.job.controlnets)

    def turns(self, step: int) -> bool:
        """Returns whether a step has another prompt, condition or ControlNet than the one before, so that earlier steps predict nothing."""
        before = max(step - 1, 0)
        return (
            self.numbers[step] != self.numbers[before]
            or self.controlnets(step) != self.controlnets(before)
            or self._condition_at(step / self.total) is not self._condition_at(before / self.total)
        )

    def guidance_scale(self) -> float:
        """Returns the guidance scale of the next step."""
        return guidance(self.job, self.timesteps[self.done].item(), self.total)

    def advance(self, velocity: torch.Tensor) -> Progress:
        """Completes the next step with the velocity that was predicted for it."""
        step = Step.of(self._scheduler, self.timesteps, self.done, by_hand=bool(self.job.timesteps))
        self.latents, self._clean = advance(self._scheduler, velocity, self._clean, step, self.latents, self._noise)
        self.latents = self.latents.to(self.runtime.dtype)
        self.done += 1
        return Progress(self.done, self.latents, self._noise.generator.get_state(), self._clean)

    def result(self) -> torch.Tensor:
        """Returns the unscaled latent ``[batch, channels, frames, height, width]``, float32, on the CPU."""
        padding = self.checkpoint.padding_frames(self.job.latent.shape[2])
        latents = self._kept.put_into(self.latents, torch.tensor(1.0)) if self._kept else self.latents
        result = rearrange(latents[:, padding:], DIFFUSERS_TO_COMFYUI).float() / self.checkpoint.scaling_factor
        return result.cpu().contiguous()
