"""Who runs a job for a caller. Nodes and the command line know only this."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline import validation
from ..cogvideox.vae.preview import PictureListener
from ..jobs import DecodeJob, EncodeJob, Job, LoadJob, Report, Result, SampleJob
from ..plan import Plan

StepListener = Callable[[int, int], None]
"""Told after each step: steps done, steps to do."""
StopSignal = Callable[[], bool]
"""Asked often; True once the caller wants the job to stop."""


DecodeOf = Callable[[int, Result], DecodeJob]
"""What is to be decoded of a sampled video, by its place."""
VideoListener = Callable[[int, Result, Result], None]
"""Told of a video that is done: its place, what was sampled, what was decoded."""


def silent(step: int, steps: int) -> None:
    """A listener that does nothing."""


def never() -> bool:
    """A stop signal that is never given."""
    return False


def steps_of(jobs: Sequence[Job]) -> int:
    """Steps that jobs run together."""
    return sum(job.steps_to_run for job in jobs if isinstance(job, SampleJob))


def within(jobs: Sequence[SampleJob], place: int, on_step: StepListener) -> StepListener:
    """A listener to one of several jobs, for one who hears of them all together."""
    before, total = steps_of(jobs[:place]), steps_of(jobs)
    return lambda step, _: on_step(before + step, total)


class Executor(ABC):
    """One interface for this process and for a group of them."""

    plan = Plan()

    def sample(
        self,
        job: SampleJob,
        *,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        on_picture: PictureListener | None = None,
    ) -> Result:
        """Denoises a latent.

        Args:
            job: what to sample.
            on_step: called after each step, in the caller's thread.
            should_stop: asked between steps or more often.
            on_picture: called now and then with a picture of what a step takes for the clean video, in the caller's thread.
        Returns:
            The latent, as :class:`parallel_backend.jobs.SampleJob` says, and what it cost.
        Raises:
            RequestError: before anything is loaded.
            Cancelled: within a step of ``should_stop``.
            GroupUnavailable: when the group's processes did not come up.
            GroupError: when a worker failed.
        """
        return self.run(replace(job, preview=on_picture is not None), on_step, should_stop, on_picture)

    def decode(self, job: DecodeJob, *, should_stop: StopSignal = never) -> Result:
        """Decodes a latent to frames; raises as :meth:`sample` does."""
        return self.run(job, should_stop=should_stop)

    def encode(self, job: EncodeJob, *, should_stop: StopSignal = never) -> Result:
        """Encodes frames to a latent; raises as :meth:`sample` does."""
        return self.run(job, should_stop=should_stop)

    def load(self, job: SampleJob, *, should_stop: StopSignal = never) -> Report:
        """Reads the weights that a sampling job needs, for while its text is encoded; raises as :meth:`sample` does."""
        return self.run(LoadJob.of(job), should_stop=should_stop).report

    def sample_all(
        self, jobs: Sequence[SampleJob], *, on_step: StepListener = silent, should_stop: StopSignal = never
    ) -> list[Result]:
        """Denoises several latents, and reports steps of all of them together; raises as :meth:`sample` does."""
        for job in jobs:
            self.check(job)
        return self._sample_all(jobs, on_step, should_stop)

    def make_all(
        self,
        jobs: Sequence[SampleJob],
        decode: DecodeOf,
        on_video: VideoListener,
        *,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
    ) -> None:
        """Samples and decodes videos; raises as :meth:`sample` does.

        Args:
            jobs: of one video each.
            decode: the decoding job for a place in ``jobs`` and what was sampled there.
            on_video: called with a place, what was sampled and what was decoded, as soon as both are there. Maybe in another
                thread, of several at once; the next video waits meanwhile, so that frames do not fill memory.
            on_step, should_stop: see :meth:`sample`; steps are those of all videos together.
        """
        for job in jobs:
            self.check(job)
        self._make_all(jobs, decode, on_video, on_step, should_stop)

    def check(self, job: Job) -> None:
        """Raises RequestError when the checkpoint or the plan cannot do the job."""
        checkpoint = Checkpoint.open(job.model.path)
        validation.check(checkpoint, job)
        validation.check_plan(checkpoint, self.plan, job)

    def run(
        self,
        job: Job,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        on_picture: PictureListener | None = None,
    ) -> Result:
        """Runs a job of any kind; raises as :meth:`sample` does."""
        self.check(job)
        return self._run(job, on_step, should_stop, on_picture)

    def _sample_all(self, jobs: Sequence[SampleJob], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        """Runs jobs that were checked, one after the other."""
        return [self._run(job, within(jobs, place, on_step), should_stop) for place, job in enumerate(jobs)]

    def _make_all(
        self,
        jobs: Sequence[SampleJob],
        decode: DecodeOf,
        on_video: VideoListener,
        on_step: StepListener,
        should_stop: StopSignal,
    ) -> None:
        """Runs jobs that were checked and decodes what they give, one after the other."""
        for place, job in enumerate(jobs):
            sampled = self._run(job, within(jobs, place, on_step), should_stop)
            on_video(place, sampled, self.decode(decode(place, sampled), should_stop=should_stop))

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
    def _run(
        self, job: Job, on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None
    ) -> Result:
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
