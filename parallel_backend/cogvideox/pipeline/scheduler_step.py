"""One step of a scheduler, without making the device wait for noise from the CPU."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Noise:
    """The noise of a job's video or videos."""

    generator: torch.Generator
    """On the CPU."""
    drawn: tuple[int, slice]
    """Number of videos that noise is drawn for, and those of this job; see :attr:`parallel_backend.jobs.SampleJob.drawn`."""

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Draws noise for latents on the CPU, in pinned memory if they are on a GPU."""
        batch, own = self.drawn
        noise = torch.randn((batch, *like.shape[1:]), generator=self.generator, dtype=like.dtype)[own]
        return noise.pin_memory() if like.is_cuda else noise


def advance(
    scheduler, velocity, clean, timesteps: torch.Tensor, index: int, latents: torch.Tensor, noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one step of either scheduler.

    Args:
        scheduler: predicting velocities.
        velocity: at the step's timestep.
        clean: the clean latents that the previous step predicted; None in the first step.
        timesteps: of all steps.
        index: of the step.
        latents: at the step's timestep.
        noise: for schedulers that add some.
    Returns:
        The next latents, and the predicted clean latents.
    """
    from diffusers import CogVideoXDPMScheduler

    timestep = timesteps[index]
    if not isinstance(scheduler, CogVideoXDPMScheduler):
        made = scheduler.step(velocity, timestep, latents)
        return made.prev_sample, made.pred_original_sample
    before = timesteps[index - 1] if index > 0 else None
    return dpm_step(scheduler, velocity, clean, timestep, before, latents, noise)


def dpm_step(
    scheduler, velocity, history, timestep, before, latents: torch.Tensor, noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes ``CogVideoXDPMScheduler.step`` from that scheduler's own coefficients.

    The original draws noise on the CPU and copies it after the forward pass, while the device waits (benchmarks/NOTES.md). Here
    noise is drawn while the device is busy.

    Args:
        scheduler: predicting velocities.
        velocity: at ``timestep``.
        history: the clean latents that the previous step predicted, at timestep ``before``; None in the first step.
        timestep: of this step.
        before: timestep of the previous step, or None.
        latents: at ``timestep``.
        noise: of the job.
    Returns:
        The next latents, and the predicted clean latents.
    """
    after = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha = scheduler.alphas_cumprod[timestep]
    alpha_after = scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod
    alpha_before = None if before is None else scheduler.alphas_cumprod[before]
    clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * velocity
    step, ratio, *_ = scheduler.get_variables(alpha, alpha_after, alpha_before)
    of_latents, of_clean, *of_both = scheduler.get_mult(step, ratio, alpha, alpha_after, alpha_before)
    of_noise = (1 - alpha_after) ** 0.5 * (1 - (-2 * step).exp()) ** 0.5
    drawn, towards = noise.draw(latents), clean
    if history is not None and after >= 0:
        drawn = noise.draw(latents)  # the original draws twice here and discards the first
        towards = of_both[0] * clean - of_both[1] * history
    drawn = drawn.to(latents.device, non_blocking=drawn.is_pinned())
    return of_latents * latents - of_clean * towards + of_noise * drawn, clean
