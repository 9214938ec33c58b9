"""The one denoise loop: from text or with a condition, from noise or from a latent, guided or not.

It says what is computed. How a forward is split over ranks is the business of ``split``, whose
collectives vanish in a plan of ``single``.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange

from ..errors import Cancelled
from ..jobs import SampleJob
from . import conditions
from .checkpoint import Checkpoint
from .conditions import COMFYUI_TO_DIFFUSERS

DIFFUSERS_TO_COMFYUI = "batch frames channels height width -> batch channels frames height width"
StepCallback = Callable[[int, int], bool]
"""Called after each step with the steps done and the steps to do; False asks the loop to stop."""


def rotary_tables(checkpoint: Checkpoint, frames: int, height: int, width: int, device: torch.device):
    """Cosines and sines ``[video tokens, head_dim]`` for a latent of this size, or None for sincos models."""
    if not checkpoint.rotary:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    config = checkpoint.transformer
    patch = config.get("patch_size", 2)
    grid = (height // patch, width // patch)
    base_width, base_height = config.get("sample_width", 90) // patch, config.get("sample_height", 60) // patch
    common = {"embed_dim": checkpoint.head_dim, "grid_size": grid, "device": device}
    if checkpoint.patch_size_t is None:
        crops = get_resize_crop_region_for_grid(grid, base_width, base_height)
        return get_3d_rotary_pos_embed(crops_coords=crops, temporal_size=frames, **common)
    return get_3d_rotary_pos_embed(
        crops_coords=None,
        temporal_size=frames // checkpoint.patch_size_t,
        grid_type="slice",
        max_size=(base_height, base_width),
        **common,
    )


def guidance(job: SampleJob, timestep: int, steps: int) -> float:
    """The guidance scale at a timestep; the dynamic one is diffusers' cosine of timestep and steps that are run."""
    if not job.dynamic_cfg:
        return job.cfg
    progress = (steps - timestep) / steps
    return 1 + job.cfg * (1 - math.cos(math.pi * progress**5.0)) / 2


def starting_point(job: SampleJob, checkpoint: Checkpoint, scheduler, generator, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy latent ``[batch, frames, channels, height, width]`` and the timesteps to run, on the CPU.

    Noise is drawn on the CPU in the model's dtype, as diffusers' pipelines draw it for a CPU generator.
    """
    batch, channels, frames, height, width = job.latent.shape
    padding = checkpoint.padding_frames(frames)
    scheduler.set_timesteps(job.steps)
    for encoded in (job.image, job.latent if job.denoise < 1 else None):
        if encoded is not None:
            # diffusers samples the VAE's posterior with this generator before it draws the noise. We take the posterior's
            # mean, as the core's nodes do, and pass over its numbers, so that the noise of a seed is the same.
            torch.randn((batch, *encoded.shape[1:]), generator=generator, dtype=dtype)
    skipped = job.steps - int(job.steps * job.denoise)
    timesteps = scheduler.timesteps[skipped:]
    noise = torch.randn((batch, frames + padding, channels, height, width), generator=generator, dtype=dtype)
    if job.denoise == 1:
        return noise * scheduler.init_noise_sigma, timesteps
    clean = rearrange(job.latent * checkpoint.scaling_factor, COMFYUI_TO_DIFFUSERS).to(dtype)
    return scheduler.add_noise(clean, noise, timesteps[:1]), timesteps


@torch.inference_mode()
def denoise(
    transformer, checkpoint: Checkpoint, job: SampleJob, *, device, dtype, split, on_step: StepCallback
) -> torch.Tensor:
    """Runs a job's steps.

    Args:
        transformer: on ``device`` or with hooks that bring it there.
        checkpoint: that the transformer was loaded from.
        job: what to sample.
        device: where latents live.
        dtype: of latents and text states.
        split: how the work is shared; see :class:`parallel_backend.parallel.split.Split`.
        on_step: called on every rank after each step; must answer the same on all of them.
    Returns:
        The unscaled latent ``[batch, channels, frames, height, width]``, float32, on the CPU.
    Raises:
        Cancelled: when ``on_step`` asked to stop.
        FloatingPointError: when the result is not finite.
    """
    scheduler = checkpoint.make_scheduler(job.scheduler)
    generator = torch.Generator("cpu").manual_seed(job.seed)
    latents, timesteps = starting_point(job, checkpoint, scheduler, generator, dtype)
    latents = latents.to(device)
    batch, frames, _, height, width = latents.shape
    prompts = [job.negative, job.positive] if job.guided else [job.positive]
    mine = split.share(prompts)
    text = torch.cat([prompt.expand(batch, -1, -1) for prompt in mine]).to(device=device, dtype=dtype)
    rotary = rotary_tables(checkpoint, frames, height, width, device)
    condition_at = conditions.make(job, checkpoint, latents)
    ofs = None if checkpoint.ofs is None else latents.new_tensor([checkpoint.ofs])
    history = None  # what the DPM scheduler carries from step to step

    for index, timestep in enumerate(timesteps):
        condition = condition_at(index / len(timesteps))
        seen = latents if condition is None else torch.cat([latents, condition], dim=2)
        predicted = transformer(
            hidden_states=torch.cat([seen] * len(mine)),
            encoder_hidden_states=text,
            timestep=timestep.expand(len(text)).to(device),
            ofs=ofs,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        predicted = [half.float() for half in split.gather(predicted.chunk(len(mine)), of=len(prompts))]
        if job.guided:
            negative, positive = predicted
            velocity = negative + guidance(job, timestep.item(), len(timesteps)) * (positive - negative)
        else:
            (velocity,) = predicted
        latents, history = advance(scheduler, velocity, history, timesteps, index, latents, generator)
        latents = latents.to(dtype)
        split.synchronize()
        if not on_step(index + 1, len(timesteps)):
            raise Cancelled(f"stopped after step {index + 1} of {len(timesteps)}")

    padding = checkpoint.padding_frames(job.latent.shape[2])
    result = rearrange(latents[:, padding:], DIFFUSERS_TO_COMFYUI).float() / checkpoint.scaling_factor
    if not result.isfinite().all():
        raise FloatingPointError(f"the latent is not finite after {len(timesteps)} steps in {dtype}; use dtype bf16 or fp32")
    return result.cpu().contiguous()


def advance(scheduler, velocity, history, timesteps, index, latents, generator):
    """One step of either scheduler. Returns the latents and what the next step needs of this one."""
    from diffusers import CogVideoXDPMScheduler

    timestep = timesteps[index]
    if not isinstance(scheduler, CogVideoXDPMScheduler):
        return scheduler.step(velocity, timestep, latents, return_dict=False)[0], None
    before = timesteps[index - 1] if index > 0 else None
    return scheduler.step(velocity, history, timestep, before, latents, generator=generator, return_dict=False)
