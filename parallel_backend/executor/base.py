"""The interface of executors: what runs jobs for nodes, command line and benchmarks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.upscaling import tiles_of
from ..cogvideox.vae.frames import Assembly, FramesListener
from ..cogvideox.vae.preview import PictureListener
from ..errors import Cancelled, GroupFailure, RequestError
from ..jobs import DecodeJob, EncodeJob, Job, LoadJob, Report, Result, SampleJob, UpscaleJob
from ..plan import Plan
from ..system.read_ahead import read_ahead
from . import continuing, upscaling
from .prepare import CheckedJob, check_job

StepListener = Callable[[int, int], None]
"""Called after each step with the steps done and the steps to do."""
StopSignal = Callable[[], bool]
"""Called often; True once the caller wants the job to stop."""
DecodeOf = Callable[[int, Result], DecodeJob]
"""Returns the decoding job for a video's number and its sampled result."""
FramesOf = Callable[[int], FramesListener]
"""Returns what receives the frames of a video, by its number, while it is decoded."""
VideoListener = Callable[[int, Result, Result], None]
"""Called with each finished video: its number, the sampled result, the decoded result."""


def silent(step: int, steps: int) -> None:
    """A step listener that does nothing."""


def never() -> bool:
    """A stop signal that never stops."""
    return False


def steps_of(jobs: Sequence[Job]) -> int:
    """Returns the number of steps of all jobs together. A tile of an enlarged video is one."""
    tiles = sum(len(tiles_of(job)) for job in jobs if isinstance(job, UpscaleJob))
    return tiles + sum(job.steps_to_run for job in jobs if isinstance(job, SampleJob))


def within(jobs: Sequence[SampleJob], place: int, on_step: StepListener) -> StepListener:
    """Returns a step listener for one of several jobs that reports the steps of all jobs together."""
    before, total = steps_of(jobs[:place]), steps_of(jobs)
    own = steps_of([jobs[place]])
    return lambda step, steps: on_step(before + step * own // steps, total)  # a job of several windows has the steps of all


UNREACHABLE = (GroupFailure, RequestError, OSError, EOFError)
"""What an executor's status or free raises if its group is lost, or its Ray cluster is gone."""


class Executor(ABC):
    """Runs jobs, in this process or in a group of processes."""

    plan = Plan()
    is_replaced = False
    """Whether it becomes ready again by itself after it was lost."""
    is_owner = True
    """Whether :meth:`close` ends what runs its jobs; if not, that is another process's."""

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
            should_stop: called at least once a step.
            on_picture: called in the caller's thread with previews of the clean video, at most one a step.
        Returns:
            The latent, see :class:`parallel_backend.jobs.SampleJob`, and the report.
        Raises:
            RequestError: when the job cannot be done. Nothing has been loaded.
            Cancelled: within one step after ``should_stop`` returned True.
            GroupUnavailable: when the group did not start.
            GroupError: when a rank failed.
        """
        return self.run(replace(job, preview=on_picture is not None), on_step, should_stop, on_picture)

    def decode(self, job: DecodeJob, *, should_stop: StopSignal = never, on_frames: FramesListener | None = None) -> Result:
        """Decodes a latent to frames; raises as :meth:`sample` does.

        Args:
            job: what to decode.
            should_stop: see :meth:`sample`.
            on_frames: called with the frames of the result as they are decoded, where the executor can; see :class:`.Assembly`.
        """
        return self.run_checked(check_job(job), should_stop=should_stop, on_frames=on_frames)

    def encode(self, job: EncodeJob, *, should_stop: StopSignal = never) -> Result:
        """Encodes frames to a latent; raises as :meth:`sample` does."""
        return self.run(job, should_stop=should_stop)

    def load(self, job: SampleJob, *, should_stop: StopSignal = never) -> Report:
        """Loads the weights that a sampling job needs, while its text is being encoded; raises as :meth:`sample` does."""
        return self.run(LoadJob.of(job), should_stop=should_stop).report

    def sample_all(
        self, jobs: Sequence[SampleJob], *, on_step: StepListener = silent, should_stop: StopSignal = never
    ) -> list[Result]:
        """Denoises several latents and reports the steps of all together; raises as :meth:`sample` does."""
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
        frames_of: FramesOf | None = None,
    ) -> None:
        """Samples and decodes videos; raises as :meth:`sample` does.

        Args:
            jobs: one video each.
            decode: returns the decoding job of each sampled video.
            on_video: called with each video once it is decoded, maybe in other threads and several at once. The thread makes no
                other video meanwhile, so that frames do not fill memory.
            on_step, should_stop: see :meth:`sample`; steps count all videos together.
            frames_of: returns the listener of each video's frames; not called where replicas make whole videos.
        """
        for job in jobs:
            self.check(job)
        self._make_all(jobs, decode, on_video, on_step, should_stop, frames_of)

    def check(self, job: Job) -> None:
        """Raises RequestError when the checkpoint or the plan cannot do the job."""
        check_job(job).check_plan(self.plan)

    def run(
        self,
        job: Job,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        on_picture: PictureListener | None = None,
    ) -> Result:
        """Runs a job of any kind; raises as :meth:`sample` does."""
        return self.run_checked(check_job(job), on_step, should_stop, on_picture)

    def run_checked(
        self,
        checked: CheckedJob,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        on_picture: PictureListener | None = None,
        on_frames: FramesListener | None = None,
    ) -> Result:
        """Runs a job that was checked against its checkpoint; raises as :meth:`sample` does. For ``on_frames`` see :meth:`decode`."""
        checked.check_plan(self.plan)
        job = checked.job
        if isinstance(job, DecodeJob):
            return self._decode(job, should_stop, on_frames)
        if isinstance(job, UpscaleJob):
            return upscaling.without_repetition(self._upscale(job, checked.checkpoint, on_step, should_stop))
        if not continuing.is_continued(job, checked.checkpoint):
            return self._run(job, on_step, should_stop, on_picture)
        windows = [job] * len(continuing.spans_of(job))

        def run_part(part: Job, place: int | None = None) -> Result:
            if place is None:
                return self._run_part(part, should_stop)
            return self._run(part, within(windows, place, on_step), should_stop, on_picture)

        try:
            return continuing.sample(job, run_part)
        except GroupFailure as error:
            error.progress = None  # it is that of one window; the whole job begins again
            raise

    def _decode(self, job: DecodeJob, should_stop: StopSignal, on_frames: FramesListener | None = None) -> Result:
        """Runs a checked decoding job and puts its frames together."""
        whole = Assembly(job.latent, on_frames)
        result = self._run(job, silent, should_stop, None, whole.add)
        return result if whole.videos is None else replace(result, tensor=whole.videos)

    def _run_part(self, part: Job, should_stop: StopSignal) -> Result:
        """Runs a job that a larger one is made of, without reporting its steps."""
        return self._decode(part, should_stop) if isinstance(part, DecodeJob) else self._run(part, silent, should_stop)

    def _upscale(self, job: UpscaleJob, checkpoint: Checkpoint, on_step: StepListener, should_stop: StopSignal) -> Result:
        """Makes the tiles of a checked job one after the other."""
        total, done = steps_of([job]), 0

        def run_part(part: Job) -> Result:
            if should_stop():
                raise Cancelled(f"stopped after tile {done} of {total}")
            return self._run_part(part, should_stop)

        def on_tile(number: int) -> None:
            nonlocal done
            done = number
            on_step(done, total)

        made = upscaling.upscale(job, checkpoint, run_part, on_tile)
        notes = upscaling.without_effect(job, self.plan)
        return replace(made, report=replace(made.report, notes=(*made.report.notes, *notes)))

    def _sample_all(self, jobs: Sequence[SampleJob], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        """Runs checked jobs one after the other."""
        return [self.run(job, within(jobs, place, on_step), should_stop) for place, job in enumerate(jobs)]

    def _make_all(
        self,
        jobs: Sequence[SampleJob],
        decode: DecodeOf,
        on_video: VideoListener,
        on_step: StepListener,
        should_stop: StopSignal,
        frames_of: FramesOf | None = None,
    ) -> None:
        """Runs checked jobs and decodes their latents, one after the other."""
        for place, job in enumerate(jobs):
            sampled = self.run(job, within(jobs, place, on_step), should_stop)
            on_frames = frames_of and frames_of(place)
            on_video(place, sampled, self.decode(decode(place, sampled), should_stop=should_stop, on_frames=on_frames))

    def start(self, expected: Checkpoint | None = None) -> None:
        """Starts what the first job needs, without waiting for it.

        Args:
            expected: the checkpoint of that job, whose transformer the system reads meanwhile.
        """
        if expected:
            read_ahead(expected.files("transformer"))

    def is_usable(self) -> bool:
        """Whether it can run another job; False once the group that it was attached to has ended."""
        return True

    def is_ready(self) -> bool:
        """Whether it can begin a job; False while a cluster has no node for it."""
        return True

    def is_there(self) -> bool:
        """Whether what runs its jobs is running, even if it does not answer yet."""
        return True

    def stage(self) -> str | None:
        """Returns what goes on before the first step of a job, for the user who waits; None if it is unknown. Any thread may call it."""
        return None

    @property
    @abstractmethod
    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices that hold its weights, by this process's numbers."""

    @abstractmethod
    def _run(
        self,
        job: Job,
        on_step: StepListener,
        should_stop: StopSignal,
        on_picture: PictureListener | None = None,
        on_frames: FramesListener | None = None,
    ) -> Result:
        """Runs a checked job. If ``on_frames`` receives the frames of a decoding job, its result is empty."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Returns state, plan, model, loads and memory as plain values."""

    @abstractmethod
    def free(self) -> None:
        """Frees all weights; the next job loads them again."""

    @abstractmethod
    def close(self) -> None:
        """Ends what was started. More calls do nothing."""
