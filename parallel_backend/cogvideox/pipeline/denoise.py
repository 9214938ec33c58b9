"""The one denoise loop: from text or with a condition, from noise or from a latent, guided or not.

It says what is computed. How a forward is split over ranks is the business of ``context``, whose
collectives vanish in a plan of ``single``.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange

from ...errors import Cancelled, NotFinite
from ...jobs import Progress, SampleJob, WindowJob
from ..checkpoint.checkpoint import Checkpoint
from . import conditions
from .conditions import COMFYUI_TO_DIFFUSERS
from .scheduler_step import advance
from .windows import Layout

DIFFUSERS_TO_COMFYUI = "batch frames channels height width -> batch channels frames height width"
StepCallback = Callable[[Progress, int], bool]
"""Called when a step has ended, with what is done and the steps to do; False asks the loop to stop."""
WindowCallback = Callable[[], bool]
"""Called between the windows of a step; False asks the loop to stop."""
Elsewhere = Callable[[list[torch.Tensor], list[torch.Tensor], int, float], list[torch.Tensor]]
"""What the windows of a step show, its prompts, the timestep and the guidance scale, to the predictions of all."""


def never() -> bool:
    """No step begins before the one before it is reported."""
    return False


class Ended:
    """A step that was asked of a device, which may be at it still.

    Args:
        progress: once it has ended.
        velocity: that it found.
    """

    def __init__(self, progress: Progress, velocity: torch.Tensor):
        self.progress = progress
        self._finite = velocity.isfinite().all()
        self._event: torch.cuda.Event | None = None
        if velocity.is_cuda:  # reading it from the device would wait for all that comes after it, too
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._finite, non_blocking=True)
            self._event = torch.cuda.current_stream(velocity.device).record_event()

    def is_finite(self) -> bool:
        """Whether all that it found is; waits for its end."""
        if self._event:
            self._event.synchronize()
        return bool(self._finite)


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


def starting_point(
    job: SampleJob, checkpoint: Checkpoint, layout: Layout, scheduler, generator, dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy latent ``[batch, frames, channels, height, width]`` and the timesteps to run, on the CPU.

    Noise is drawn on the CPU in the model's dtype, as diffusers' pipelines draw it for a CPU generator; for a job of one video
    of a batch all of the batch's, so that the video is the one that it would have been among the others.
    """
    _, channels, frames, height, width = job.latent.shape
    batch, own = job.drawn
    padding = checkpoint.padding_frames(frames)
    scheduler.set_timesteps(job.steps)
    for encoded in (job.image, job.latent if job.denoise < 1 else None):
        if encoded is not None:
            # diffusers samples the VAE's posterior with this generator before it draws the noise. We take the posterior's
            # mean, as the core's nodes do, and pass over its numbers, so that the noise of a seed is the same.
            torch.randn((batch, *encoded.shape[1:]), generator=generator, dtype=dtype)
    skipped = job.steps - job.steps_to_run
    timesteps = scheduler.timesteps[skipped:]
    noise = torch.randn((batch, frames + padding, channels, height, width), generator=generator, dtype=dtype)[own]
    if layout.shuffled:
        noise = noise[:, layout.noise_order(generator)]
    if job.denoise == 1:
        return noise * scheduler.init_noise_sigma, timesteps
    clean = rearrange(job.latent * checkpoint.scaling_factor, COMFYUI_TO_DIFFUSERS).to(dtype)
    return scheduler.add_noise(clean, noise, timesteps[:1]), timesteps


def prompts_of(job: SampleJob | WindowJob, numbers: tuple[int, int] = (0, 0)) -> list[torch.Tensor]:
    """The prompts that a step runs the model on: the negative one where it is guided, and the positive one.

    Args:
        job: with text states.
        numbers: of the two prompts, where there are several one after the other; see :meth:`SampleJob.prompts_of`.
    """
    sides = list(zip((job.negative, job.positive), numbers))
    return [text if text.ndim == 3 else text[:, number] for text, number in (sides if job.guided else sides[1:])]


def text_of(prompts: Sequence[torch.Tensor], videos: int) -> torch.Tensor:
    """States of each prompt for each video, ``[prompts * videos, tokens, features]``."""
    return torch.cat([prompt.expand(videos, -1, -1) for prompt in prompts])


def predict(
    transformer, seen: torch.Tensor, timestep, scale: float, *, text, rotary, ofs, context, prompts: int, cache
) -> torch.Tensor:
    """The velocity of the frames of one window, guided; float32. A unit of work: it depends on its arguments alone, of which ``cache`` remembers.

    Args:
        transformer: that says it.
        seen: noisy latents of the window with what is concatenated to them, ``[batch, frames, channels, height, width]``.
        timestep: where all frames stand; on the device, or it is waited for.
        scale: of the guidance; not used with one prompt.
        text: states of this rank's prompts, ``[prompts * batch, tokens, features]``.
        rotary: tables for so many frames.
        ofs: see :attr:`parallel_backend.cogvideox.checkpoint.checkpoint.Checkpoint.ofs`.
        context: how the work is shared.
        prompts: that all ranks together run: the negative and the positive one, or the positive one.
        cache: of this window, or None.
    """
    mine = len(text) // len(seen)
    predicted = transformer(
        hidden_states=torch.cat([seen] * mine),
        encoder_hidden_states=text,
        timestep=timestep.expand(len(text)).to(seen.device),
        ofs=ofs,
        image_rotary_emb=rotary,
        attention_kwargs={"cache": cache},
        return_dict=False,
    )[0]
    predicted = [half.float() for half in context.gather(predicted.chunk(mine), of=prompts)]
    if prompts == 1:
        return predicted[0]
    negative, positive = predicted
    return negative + scale * (positive - negative)


@torch.inference_mode()
def denoise(
    transformer,
    checkpoint: Checkpoint,
    job: SampleJob,
    *,
    device,
    dtype,
    context,
    caches,
    on_step: StepCallback,
    on_window: WindowCallback,
    may_begin: Callable[[], bool] = never,
    elsewhere: Elsewhere | None = None,
) -> torch.Tensor:
    """Runs a job's steps.

    Args:
        transformer: on ``device`` or with hooks that bring it there.
        checkpoint: that the transformer was loaded from.
        job: what to sample.
        device: where latents live.
        dtype: of latents and text states.
        context: how the work is shared; see :class:`parallel_backend.parallel.rank.RankContext`.
        caches: of the job's windows, from :meth:`parallel_backend.parallel.rank.RankContext.caches`.
        elsewhere: predicts the windows in the place of ``transformer``, which is None then.
        on_step, on_window: called on every rank after each step, and between its windows; must answer the same on all of them.
        may_begin: whether a step may begin before the one before it has ended and is reported, so that the device does not wait for
            the report; must answer the same on every rank.
    Returns:
        The unscaled latent ``[batch, channels, frames, height, width]``, float32, on the CPU.
    Raises:
        Cancelled: when ``on_step`` or ``on_window`` asked to stop.
        NotFinite: at the first step that is not finite.
    """
    scheduler = checkpoint.make_scheduler(job.scheduler)
    generator = torch.Generator("cpu").manual_seed(job.seed)
    layout = Layout.of(job, checkpoint)
    latents, timesteps = starting_point(job, checkpoint, layout, scheduler, generator, dtype)
    latents = latents.to(device)
    batch, _, _, height, width = latents.shape
    numbers = [job.prompts_of(step) for step in range(len(timesteps))]
    prompts = {which: prompts_of(job, which) for which in set(numbers)}
    text = {
        which: text_of(context.share(states), batch).to(device=device, dtype=dtype) for which, states in prompts.items()
    }  # all at once, as the host waits for the device with whatever it sends it in a step
    rotary = rotary_tables(checkpoint, layout.length, height, width, device)
    condition_at = conditions.make(job, checkpoint, latents)
    ofs = None if checkpoint.ofs is None else latents.new_tensor([checkpoint.ofs])
    done, clean = 0, None
    if job.progress is not None:
        done, latents = job.progress.step, job.progress.latents.to(latents)
        clean = None if job.progress.clean is None else job.progress.clean.to(device)
        generator.set_state(job.progress.generator)
    there = timesteps.to(device)  # likewise
    forward = partial(predict, transformer, rotary=rotary, ofs=ofs, context=context, prompts=2 if job.guided else 1)
    unreported: Ended | None = None

    def report(step: Ended) -> None:
        which = f"step {step.progress.step} of {len(timesteps)}"
        if not step.is_finite():
            raise NotFinite(f"{which} is not finite in {dtype}; use dtype bf16 or fp32")
        if not on_step(step.progress, len(timesteps)):
            raise Cancelled(f"stopped after {which}")

    for index, timestep in enumerate(timesteps[done:], start=done):
        which = numbers[index]
        if which != numbers[max(index - 1, 0)]:
            caches.expire()
        condition = condition_at(index / len(timesteps))
        seen = latents if condition is None else torch.cat([latents, condition], dim=2)
        scale = guidance(job, timestep.item(), len(timesteps))
        velocity = torch.zeros_like(latents, dtype=torch.float32)
        windows = layout.at(index)
        parts = [seen[:, window.frames] for window in windows]
        about = {"timestep": there[index], "scale": scale, "text": text[which]}
        in_turn = (forward(part, **about, cache=caches.of(window.frames)) for window, part in zip(windows, parts))
        predictions = elsewhere(parts, prompts[which], int(timestep), scale) if elsewhere else in_turn
        for window, predicted in zip(windows, predictions):
            velocity[:, window.frames] += window.weigh(predicted)
            if window is not windows[-1] and not on_window():
                raise Cancelled(f"stopped after step {index} of {len(timesteps)}")
        latents, clean = advance(scheduler, velocity, clean, timesteps, index, latents, generator, job.drawn)
        latents = latents.to(dtype)
        ended = Ended(Progress(index + 1, latents, generator.get_state(), clean), velocity)
        if unreported:
            report(unreported)
        unreported = ended
        if len(windows) > 1 or not may_begin():
            report(unreported)
            unreported = None
    if unreported:
        report(unreported)

    padding = checkpoint.padding_frames(job.latent.shape[2])
    result = rearrange(latents[:, padding:], DIFFUSERS_TO_COMFYUI).float() / checkpoint.scaling_factor
    return result.cpu().contiguous()


@torch.inference_mode()
def predict_window(transformer, checkpoint: Checkpoint, job: WindowJob, *, device, dtype, context) -> torch.Tensor:
    """Runs one window's forward for a loop that is elsewhere; see :func:`predict`."""
    seen = job.seen.to(device=device, dtype=dtype)
    prompts = prompts_of(job)
    text = text_of(context.share(prompts), len(seen)).to(device=device, dtype=dtype)
    rotary = rotary_tables(checkpoint, seen.shape[1], *seen.shape[3:], device)
    ofs = None if checkpoint.ofs is None else seen.new_tensor([checkpoint.ofs])
    about = {"text": text, "rotary": rotary, "ofs": ofs, "context": context, "prompts": len(prompts), "cache": None}
    return predict(transformer, seen, torch.tensor(job.timestep), job.scale, **about).cpu()
