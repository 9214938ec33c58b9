"""Who runs a job for a caller. Nodes and the command line know only this."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cogvideox import checks
from .cogvideox.checkpoint import Checkpoint
from .jobs import DecodeJob, EncodeJob, Job, Result, SampleJob
from .plans import Plan

StepListener = Callable[[int, int], None]
"""Told after each step: steps done, steps to do."""
StopSignal = Callable[[], bool]
"""Asked often; True once the caller wants the job to stop."""


def silent(step: int, steps: int) -> None:
    """A listener that does nothing."""


def never() -> bool:
    """A stop signal that is never given."""
    return False


def steps_of(jobs: Sequence[Job]) -> int:
    """Steps that jobs run together."""
    return sum(job.steps_to_run for job in jobs if isinstance(job, SampleJob))


class Executor(ABC):
    """One interface for this process and for a group of them."""

    plan = Plan()

    def sample(self, job: SampleJob, *, on_step: StepListener = silent, should_stop: StopSignal = never) -> Result:
        """Denoises a latent.

        Args:
            job: what to sample.
            on_step: told after each step, in the caller's thread.
            should_stop: asked between steps or more often.
        Returns:
            The latent, as :class:`parallel_backend.jobs.SampleJob` says, and what it cost.
        Raises:
            RequestError: before anything is loaded.
            Cancelled: within a step of ``should_stop``.
            GroupUnavailable: when the group's processes did not come up.
            GroupError: when a worker failed.
        """
        return self.run(job, on_step, should_stop)

    def decode(self, job: DecodeJob, *, should_stop: StopSignal = never) -> Result:
        """Decodes a latent to frames; raises as :meth:`sample` does."""
        return self.run(job, should_stop=should_stop)

    def encode(self, job: EncodeJob, *, should_stop: StopSignal = never) -> Result:
        """Encodes frames to a latent; raises as :meth:`sample` does."""
        return self.run(job, should_stop=should_stop)

    def sample_all(
        self, jobs: Sequence[SampleJob], *, on_step: StepListener = silent, should_stop: StopSignal = never
    ) -> list[Result]:
        """Denoises several latents, and tells steps of all of them together; raises as :meth:`sample` does."""
        return self._run_all(jobs, on_step, should_stop)

    def decode_all(self, jobs: Sequence[DecodeJob], *, should_stop: StopSignal = never) -> list[Result]:
        """Decodes several latents; raises as :meth:`sample` does."""
        return self._run_all(jobs, silent, should_stop)

    def check(self, job: Job) -> None:
        """Raises RequestError when the checkpoint or the plan cannot do the job."""
        checkpoint = Checkpoint.open(job.model.path)
        checks.check(checkpoint, job)
        checks.check_plan(checkpoint, self.plan, job)

    def run(self, job: Job, on_step: StepListener = silent, should_stop: StopSignal = never) -> Result:
        """Runs a job of any kind; raises as :meth:`sample` does."""
        self.check(job)
        return self._run(job, on_step, should_stop)

    def _run_all(self, jobs: Sequence[Job], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        """Runs jobs one after the other, once all of them are checked."""
        for job in jobs:
            self.check(job)
        total = steps_of(jobs)
        results: list[Result] = []
        for place, job in enumerate(jobs):
            before = steps_of(jobs[:place])
            results.append(self._run(job, lambda step, _, before=before: on_step(before + step, total), should_stop))
        return results

    def start(self) -> None:
        """Begins whatever takes time before the first job, without waiting for it."""

    def is_usable(self) -> bool:
        """Whether another job may be asked of it; False once what it was attached to has ended."""
        return True

    @property
    @abstractmethod
    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices that hold its weights, as this process numbers them."""

    @abstractmethod
    def _run(self, job: Job, on_step: StepListener, should_stop: StopSignal) -> Result:
        """Runs a job that was checked."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """State, plan, model, loads and memory, in plain values."""

    @abstractmethod
    def free(self) -> None:
        """Lets go of all weights; the next job loads again."""

    @abstractmethod
    def close(self) -> None:
        """Ends what was started. Further calls do nothing."""
