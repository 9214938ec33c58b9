"""The denoise loop, for every kind of job: from text or with a condition, from noise or from a latent, guided or not.

How a forward pass is split over ranks is hidden in the runtime's ``context``; with plan ``single`` its collectives do nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ...errors import Cancelled, NotFinite
from ...jobs import Progress, SampleJob
from ...model import ControlNet
from ..checkpoint.checkpoint import Checkpoint
from .forward import Forward, Runtime, Text, guide, prompts_of
from .sampling import Sampling
from .windows import Window

StepCallback = Callable[[Progress, int], bool]
"""Called after each step with the progress and the total number of steps; False cancels."""
WindowCallback = Callable[[], bool]
"""Called between the windows of a step; False cancels."""
Elsewhere = Callable[[list[torch.Tensor], list[torch.Tensor], int, float, tuple[ControlNet, ...]], list[torch.Tensor]]
"""Predicts all windows of a step in other processes, given their model inputs, the prompts, the timestep, the guidance scale and the
ControlNets as they are in this step."""


def never() -> bool:
    """The default for :attr:`Callbacks.may_begin`."""
    return False


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls on every rank; all ranks must return the same values."""

    on_step: StepCallback
    on_window: WindowCallback
    may_begin: Callable[[], bool] = never
    """Whether a step may begin before the previous one is complete and reported, so the device does not idle meanwhile."""


class Ended:
    """A step whose work was submitted to the device, which may still be running.

    Args:
        progress: after the step.
        velocity: that the step predicted.
    """

    def __init__(self, progress: Progress, velocity: torch.Tensor):
        self.progress = progress
        self._finite = velocity.isfinite().all()
        self._event: torch.cuda.Event | None = None
        if velocity.is_cuda:  # reading it directly would wait for later work as well
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._finite, non_blocking=True)
            self._event = torch.cuda.current_stream(velocity.device).record_event()

    def is_finite(self) -> bool:
        """Waits for the step to complete and returns whether its velocity is finite."""
        if self._event:
            self._event.synchronize()
        return bool(self._finite)


class LocalWindows:
    """Predicts the windows of each step with this rank's transformer.

    Args:
        transformer: on the runtime's device, or with hooks that move it there.
        sampling: the job's state.
        caches: of the job's windows; see :meth:`parallel_backend.parallel.rank.RankContext.caches`.
    """

    def __init__(self, transformer, sampling: Sampling, caches):
        job, latents, runtime = sampling.job, sampling.latents, sampling.runtime
        # All prompts and timesteps are copied before the loop: a copy within a step would synchronize with the device.
        self._text = {
            (numbers, spared): Text.of(prompts_of(job, numbers), len(latents), runtime, spared=spared)
            for numbers in set(sampling.numbers)
            for spared in ((False, True) if job.model.guidance_cache else (False,))
        }
        self._timesteps = sampling.timesteps.to(runtime.device)
        window = latents[:, : sampling.layout.length]
        self._forward = Forward.of(transformer, sampling.checkpoint, job, window, runtime)
        self._sampling, self._caches = sampling, caches

    def predict(self, windows: Sequence[Window], parts: Sequence[torch.Tensor], scale: float) -> Iterable[torch.Tensor]:
        """Yields the velocity of each window of the next step.

        Args:
            windows: of the step.
            parts: model inputs ``[batch, frames, channels, height, width]`` of the windows.
            scale: guidance scale.
        """
        step = self._sampling.done
        timestep, nets = self._timesteps[step], self._sampling.controlnets(step)
        for window, part in zip(windows, parts):
            guidance = self._caches.guidance(window.frames)
            spared = guidance is not None and guidance.begin(step, int(self._sampling.timesteps[step]))
            text, cache = self._text[self._sampling.numbers[step], spared], self._caches.of(window.frames, spared=spared)
            halves = self._forward.predict(part, timestep, text, nets=nets, cache=cache)
            yield guide(guidance.halves(halves) if guidance else halves, scale)


@torch.inference_mode()
def denoise(
    transformer,
    checkpoint: Checkpoint,
    job: SampleJob,
    runtime: Runtime,
    callbacks: Callbacks,
    *,
    caches,
    elsewhere: Elsewhere | None = None,
) -> torch.Tensor:
    """Runs a job's steps.

    Args:
        transformer: see :class:`LocalWindows`; not used with ``elsewhere``.
        checkpoint: that the transformer was loaded from.
        job: to sample.
        runtime: what this rank computes with.
        callbacks: for progress and cancellation.
        caches: of the job's windows; see :meth:`parallel_backend.parallel.rank.RankContext.caches`.
        elsewhere: predicts the windows instead of ``transformer``.
    Returns:
        The unscaled latent ``[batch, channels, frames, height, width]``, float32, on the CPU.
    Raises:
        Cancelled: if a callback returned False.
        NotFinite: after the first step whose velocity is not finite.
    """
    sampling = Sampling(job, checkpoint, runtime)
    local = None if elsewhere else LocalWindows(transformer, sampling, caches)
    unreported: Ended | None = None
    while sampling.done < sampling.total:
        step = sampling.done
        if sampling.turns(step):
            caches.expire()
        seen, scale, windows = sampling.model_input(), sampling.guidance_scale(), sampling.layout.at(step)
        parts = [seen[:, window.frames] for window in windows]
        if elsewhere:
            prompts = prompts_of(job, sampling.numbers[step])
            predictions = elsewhere(parts, prompts, int(sampling.timesteps[step]), scale, sampling.controlnets(step))
        else:
            predictions = local.predict(windows, parts, scale)
        velocity = blend(sampling, windows, predictions, callbacks.on_window)
        ended = Ended(sampling.advance(velocity), velocity)
        if unreported:
            report(unreported, sampling, callbacks.on_step)
        unreported = ended
        if len(windows) > 1 or not callbacks.may_begin():
            report(unreported, sampling, callbacks.on_step)
            unreported = None
    if unreported:
        report(unreported, sampling, callbacks.on_step)
    return sampling.result()


def blend(
    sampling: Sampling, windows: Sequence[Window], predictions: Iterable[torch.Tensor], on_window: WindowCallback
) -> torch.Tensor:
    """Returns the weighted sum of the windows' predictions, float32.

    Raises:
        Cancelled: if ``on_window`` returned False between two windows.
    """
    velocity = torch.zeros_like(sampling.latents, dtype=torch.float32)
    for window, predicted in zip(windows, predictions):
        velocity[:, window.frames] += window.weigh(predicted)
        if window is not windows[-1] and not on_window():
            raise Cancelled(f"stopped after step {sampling.done} of {sampling.total}")
    return velocity


def report(ended: Ended, sampling: Sampling, on_step: StepCallback) -> None:
    """Waits for a step to complete and reports it.

    Raises:
        NotFinite: if its velocity is not finite.
        Cancelled: if ``on_step`` returned False.
    """
    step = f"step {ended.progress.step} of {sampling.total}"
    if not ended.is_finite():
        raise NotFinite(f"{step} is not finite in {sampling.runtime.dtype}; use dtype bf16 or fp32")
    if not on_step(ended.progress, sampling.total):
        raise Cancelled(f"stopped after {step}")
