"""One step of a scheduler, without making the device wait for noise from the CPU."""

from dataclasses import dataclass

import torch

from ..checkpoint.facts import SCHEDULER_CLASSES
from ..checkpoint.libraries import member


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


@dataclass(frozen=True)
class Step:
    """The timesteps of a step and of its neighbours."""

    timestep: int
    after: int
    """Where it ends; negative for the clean latents."""
    before: int | None = None
    """Of the previous step; None in the first one."""

    @classmethod
    def of(cls, scheduler, timesteps: torch.Tensor, index: int, *, by_hand: bool) -> "Step":
        """Returns a step of several.

        Args:
            scheduler: whose own steps end an equal distance on, as in diffusers.
            timesteps: of all steps, on the CPU.
            index: of the step.
            by_hand: steps end where the next one starts, and the last one at the clean latents.
        """
        timestep = int(timesteps[index])
        before = int(timesteps[index - 1]) if index else None
        if by_hand:
            return cls(timestep, int(timesteps[index + 1]) if index + 1 < len(timesteps) else -1, before)
        return cls(timestep, timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps, before)


def advance(scheduler, velocity, clean, step: Step, latents: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one step of either scheduler.

    Args:
        scheduler: predicting velocities.
        velocity: at the step's timestep.
        clean: the clean latents that the previous step predicted; None in the first step.
        step: its timesteps.
        latents: at the step's timestep.
        noise: for schedulers that add some.
    Returns:
        The next latents, and the predicted clean latents.
    """
    if isinstance(scheduler, member("diffusers", SCHEDULER_CLASSES["dpm"])):
        return dpm_step(scheduler, velocity, clean, step, latents, noise)
    return ddim_step(scheduler, velocity, step, latents)


def alphas_of(scheduler, step: Step):
    """Returns the cumulative alphas at a step and where it ends."""
    return scheduler.alphas_cumprod[step.timestep], (
        scheduler.alphas_cumprod[step.after] if step.after >= 0 else scheduler.final_alpha_cumprod
    )


def ddim_step(scheduler, velocity, step: Step, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes ``CogVideoXDDIMScheduler.step`` for a step that ends anywhere. Arguments and result as for :func:`advance`."""
    alpha, alpha_after = alphas_of(scheduler, step)
    clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * velocity
    of_latents = ((1 - alpha_after) / (1 - alpha)) ** 0.5
    return of_latents * latents + (alpha_after**0.5 - alpha**0.5 * of_latents) * clean, clean


def dpm_step(
    scheduler, velocity, history, step: Step, latents: torch.Tensor, noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes ``CogVideoXDPMScheduler.step`` from that scheduler's own coefficients.

    The original draws noise on the CPU and copies it after the forward pass, while the device waits (benchmarks/NOTES.md). Here
    noise is drawn while the device is busy.

    Args:
        scheduler: predicting velocities.
        velocity: at the step's timestep.
        history: the clean latents that the previous step predicted; None in the first step.
        step: its timesteps.
        latents: at the step's timestep.
        noise: of the job.
    Returns:
        The next latents, and the predicted clean latents.
    """
    alpha, alpha_after = alphas_of(scheduler, step)
    alpha_before = None if step.before is None else scheduler.alphas_cumprod[step.before]
    clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * velocity
    length, ratio, *_ = scheduler.get_variables(alpha, alpha_after, alpha_before)
    of_latents, of_clean, *of_both = scheduler.get_mult(length, ratio, alpha, alpha_after, alpha_before)
    of_noise = (1 - alpha_after) ** 0.5 * (1 - (-2 * length).exp()) ** 0.5
    drawn, towards = noise.draw(latents), clean
    if history is not None and step.after >= 0:
        drawn = noise.draw(latents)  # the original draws twice here and discards the first
        towards = of_both[0] * clean - of_both[1] * history
    drawn = drawn.to(latents.device, non_blocking=drawn.is_pinned())
    return of_latents * latents - of_clean * towards + of_noise * drawn, clean
