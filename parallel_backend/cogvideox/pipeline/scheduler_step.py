"""One step of a scheduler, on a device that does not wait for the CPU's noise."""

import torch


def advance(scheduler, velocity, clean, timesteps, index, latents, generator, drawn):
    """One step of either scheduler. Returns the latents, and the clean ones that are predicted, as the step before gave them."""
    from diffusers import CogVideoXDPMScheduler

    timestep = timesteps[index]
    if not isinstance(scheduler, CogVideoXDPMScheduler):
        made = scheduler.step(velocity, timestep, latents)
        return made.prev_sample, made.pred_original_sample
    before = timesteps[index - 1] if index > 0 else None
    return dpm_step(scheduler, velocity, clean, timestep, before, latents, generator=generator, drawn=drawn)


def dpm_step(
    scheduler, velocity, history, timestep, before, latents, *, generator: torch.Generator, drawn: tuple[int, slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``CogVideoXDPMScheduler.step`` computes, by that scheduler's own factors. Its own step draws noise on the CPU and sends it while
    the device, done with the forward, waits for it (benchmarks/NOTES.md); here it is drawn while the device is busy.

    Args:
        scheduler: that predicts velocities.
        velocity: at ``timestep``.
        history: the clean latents that the step before predicted at the timestep ``before``, or None.
        latents: at ``timestep``.
        generator: on the CPU.
        drawn: see :attr:`parallel_backend.jobs.SampleJob.drawn`.
    Returns:
        The next latents, and the clean ones that are predicted.
    """
    after = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha = scheduler.alphas_cumprod[timestep]
    alpha_after = scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod
    alpha_before = None if before is None else scheduler.alphas_cumprod[before]
    clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * velocity
    step, ratio, *_ = scheduler.get_variables(alpha, alpha_after, alpha_before)
    of_latents, of_clean, *of_both = scheduler.get_mult(step, ratio, alpha, alpha_after, alpha_before)
    of_noise = (1 - alpha_after) ** 0.5 * (1 - (-2 * step).exp()) ** 0.5
    noise, towards = draw(latents, generator, drawn), clean
    if history is not None and after >= 0:
        noise = draw(latents, generator, drawn)  # that scheduler draws again, so the first is passed over
        towards = of_both[0] * clean - of_both[1] * history
    return of_latents * latents - of_clean * towards + of_noise * noise.to(
        latents.device, non_blocking=noise.is_pinned()
    ), clean


def draw(like: torch.Tensor, generator: torch.Generator, drawn: tuple[int, slice]) -> torch.Tensor:
    """Noise for latents, on the CPU, ready to be sent to their device while it is busy."""
    batch, own = drawn
    noise = torch.randn((batch, *like.shape[1:]), generator=generator, dtype=like.dtype)[own]
    return noise.pin_memory() if like.is_cuda else noise
