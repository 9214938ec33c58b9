"""The executor that runs jobs in several groups: each replica takes the next video when it is free."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.denoise import Callbacks, denoise
from ..cogvideox.pipeline.forward import Runtime
from ..cogvideox.pipeline.notes import notes
from ..cogvideox.pipeline.upscaling import Mosaic, tiles_of
from ..cogvideox.vae.frames import FramesListener
from ..cogvideox.vae.preview import PictureListener
from ..devices import Devices
from ..errors import GroupFailure, GroupUnavailable, RequestError
from ..jobs import Job, Progress, Report, Result, SampleJob, UpscaleJob, WindowJob
from ..model import ControlNet
from ..parallel.rank import RankContext
from ..plan import Plan
from ..workload import has_windows_to_share
from .base import UNREACHABLE, DecodeOf, Executor, FramesOf, StepListener, StopSignal, VideoListener, never, silent
from .batch import cut, join
from .group import FAILED, GroupExecutor, state_of_several
from .scheduler import Pool, ReplicaResult, ReplicaScheduler


class ReplicasExecutor(Executor):
    """Runs jobs in several groups at once, one video in each.

    If a replica is lost, the others do its work. A replica of one device is also a group: a separate process, so that a failure
    does not affect the others.

    Args:
        plan: with ``replicas`` above 1. Each replica has the rest of the plan.
        devices: as many as the plan needs; the first ones belong to the first replica.
        replicas: the executors of the replicas; None for groups on this machine.
    Raises:
        RequestError, GroupUnavailable: when no such groups can run here. Nothing has been started.
    """

    def __init__(self, plan: Plan, devices: Devices, replicas: Sequence[Executor] | None = None):
        plan.check_world(devices.count)
        self.plan = plan
        self.devices = devices
        self.replicas = replicas or [GroupExecutor(plan.replica, share) for share in devices.shared_out(plan.replicas)]
        self._names = {
            replica: f"replica {place} of {plan.replicas} ({replica.devices})" for place, replica in enumerate(self.replicas, 1)
        }
        self._pool = Pool(self.replicas)
        self._closed = threading.Event()

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        if self.devices.on_ray:
            return (torch.device("cpu"),)  # none of this machine's GPUs holds weights
        return self.devices.torch_devices

    def start(self, expected: Checkpoint | None = None) -> None:
        """See :meth:`Executor.start`. Groups that are running are left alone.

        Raises:
            GroupUnavailable: when no group can start.
        """
        self._closed.clear()
        errors: list[GroupUnavailable] = []
        for replica in self.replicas:
            try:
                replica.start(expected if replica is self.replicas[0] else None)  # they read the same files
            except GroupUnavailable as error:
                errors.append(error)
        if len(errors) == len(self.replicas):
            raise errors[0]

    def _run(
        self,
        job: Job,
        on_step: StepListener,
        should_stop: StopSignal,
        on_picture: PictureListener | None = None,
        on_frames: FramesListener | None = None,
    ) -> Result:
        # A pipeline keeps keys and values of each window on the replica that predicted it, so windows cannot move.
        if isinstance(job, SampleJob) and self.plan.pipefusion == 1:
            checkpoint = Checkpoint.of(job.model)
            if has_windows_to_share(job, checkpoint):
                return self._share_windows(job, checkpoint, on_step, should_stop)
        return self._distribute([job], on_step, should_stop, on_picture)[0]

    def load(self, job: SampleJob, *, should_stop: StopSignal = never) -> Report:
        """See :meth:`Executor.load`. All replicas that are ready load at once; if one fails, the others still load."""
        ready = [replica for replica in self.replicas if replica.is_ready()]
        with ThreadPoolExecutor(len(self.replicas), thread_name_prefix="load") as threads:
            loading = [threads.submit(replica.load, job, should_stop=should_stop) for replica in ready]
        reports = [one.result() for one in loading if not isinstance(one.exception(), GroupFailure)]
        return max(reports, key=lambda report: report.load_seconds, default=Report())

    def _sample_all(self, jobs: Sequence[SampleJob], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        return self._distribute(jobs, on_step, should_stop)

    def _make_all(
        self,
        jobs: Sequence[SampleJob],
        decode: DecodeOf,
        on_video: VideoListener,
        on_step: StepListener,
        should_stop: StopSignal,
        frames_of: FramesOf | None = None,
    ) -> None:
        """Each replica samples and decodes whole videos. If there is only one video, its windows are shared, if it has several."""
        if len(jobs) == 1:
            super()._make_all(jobs, decode, on_video, on_step, should_stop, frames_of)
            return
        self._closed.clear()

        def next_job(number: int, results: list[ReplicaResult]) -> Job | None:
            if len(results) == 1:
                return decode(number, results[0][1])
            videos = [Result(one[1].tensor, self._report([one], scheduler.notes, one[1].report.run_seconds)) for one in results]
            on_video(number, *videos)
            return None

        scheduler = ReplicaScheduler(self._pool, self._names, jobs, self._closed.is_set, next_job)
        scheduler.run(on_step, should_stop)

    def _distribute(
        self, jobs: Sequence[Job], on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None
    ) -> list[Result]:
        """Runs each video of the jobs on a free replica. Results are in the order of the jobs."""
        self._closed.clear()
        batches = [cut(job) for job in jobs]
        began = time.perf_counter()
        videos = [video for batch in batches for video in batch]
        scheduler = ReplicaScheduler(self._pool, self._names, videos, self._closed.is_set)
        scheduler.run(on_step, should_stop, on_picture)
        seconds = time.perf_counter() - began
        results, first = [], 0
        for batch in batches:
            found = [scheduler.results[number][0] for number in range(first, first + len(batch))]
            first += len(batch)
            report = self._report(found, scheduler.notes, seconds if len(batch) > 1 else found[0][1].report.run_seconds)
            results.append(Result(join([result.tensor for _, result in found]), report))
        return results

    def _share_windows(self, job: SampleJob, checkpoint: Checkpoint, on_step: StepListener, should_stop: StopSignal) -> Result:
        """Samples a long video: replicas predict the windows of each step, this process does the rest of the step on the CPU."""
        self._closed.clear()
        scheduler = None
        predicted: list[ReplicaResult] = []
        steps: list[float] = []
        started = began = time.perf_counter()

        def elsewhere(
            parts: list[torch.Tensor],
            prompts: list[torch.Tensor],
            timestep: int,
            scale: float,
            nets: tuple[ControlNet, ...],
        ) -> list[torch.Tensor]:
            nonlocal scheduler
            *negative, positive = (prompt.contiguous() for prompt in prompts)
            about, given = (positive, timestep, scale, *negative), {"controlnets": nets, "riflex": job.riflex}
            jobs = [WindowJob(job.model, part.contiguous(), *about, **given) for part in parts]
            scheduler = ReplicaScheduler(self._pool, self._names, jobs, self._closed.is_set, after=scheduler)
            scheduler.run(silent, should_stop)
            results = [scheduler.results[number][0] for number in range(len(jobs))]
            predicted.extend((replica, replace(result, tensor=torch.empty(0))) for replica, result in results)
            return [result.tensor for _, result in results]

        def mark(progress: Progress, total: int) -> bool:
            nonlocal began
            steps.append(time.perf_counter() - began)
            on_step(progress.step, total)
            began = time.perf_counter()
            return not should_stop()

        cpu, dtype = torch.device("cpu"), checkpoint.dtype(job.model.dtype, self.devices.first)
        runtime, callbacks = Runtime(cpu, dtype, RankContext(cpu)), Callbacks(mark, lambda: not should_stop())
        latent = denoise(None, checkpoint, job, runtime, callbacks, caches=runtime.context.caches(job), elsewhere=elsewhere)
        if job.preview:
            scheduler.notes.append("no previews: replicas share the windows of each step")
        report = self._report(predicted, [*scheduler.notes, *notes(job, checkpoint)], time.perf_counter() - started)
        return Result(latent, replace(report, step_seconds=tuple(steps)))

    def _upscale(self, job: UpscaleJob, checkpoint: Checkpoint, on_step: StepListener, should_stop: StopSignal) -> Result:
        """Each tile is made by a replica that is free."""
        self._closed.clear()
        began, mosaic = time.perf_counter(), Mosaic(job)
        finished: dict[int, ReplicaResult] = {}

        def keep(number: int, results: list[ReplicaResult]) -> None:
            ((replica, result),) = results
            mosaic.add(number, result.tensor)
            finished[number] = replica, replace(result, tensor=torch.empty(0))

        tiles = [replace(job, place=place) for place in range(len(tiles_of(job)))]
        scheduler = ReplicaScheduler(self._pool, self._names, tiles, self._closed.is_set, keep)
        scheduler.run(on_step, should_stop)
        results = [finished[number] for number in range(len(tiles))]
        return Result(mosaic.video, self._report(results, scheduler.notes, time.perf_counter() - began))

    def _report(self, results: list[ReplicaResult], notes: list[str], seconds: float) -> Report:
        """Returns the report of a job that took ``seconds``. Ranks that took no part in it used no memory."""
        reports = [result.report for _, result in results]
        peaks: list[int] = []
        for replica in self.replicas:
            own = [result.report.peak_memory for where, result in results if where is replica]
            peaks += [max(sizes) for sizes in zip(*own)] if own else [0] * self.plan.replica_size
        loading = max(report.load_seconds for report in reports)
        return Report(
            plan=str(self.plan),
            world_size=self.plan.world_size,
            load_seconds=loading,
            run_seconds=max(seconds - loading, 0.0) if len(results) > 1 else seconds,
            step_seconds=tuple(step for report in reports for step in report.step_seconds),
            peak_memory=tuple(peaks),
            notes=tuple(dict.fromkeys([*notes, *(note for report in reports for note in report.notes)])),
        )

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`. The status of each replica is under ``replicas``."""
        replicas = [self._status_of(replica) for replica in self.replicas]
        return {
            "state": state_of_several(one["state"] for one in replicas),
            "plan": str(self.plan),
            "devices": str(self.devices),
            "world_size": self.plan.world_size,
            "model": next((one["model"] for one in replicas if one.get("model")), None),
            "held": sorted({part for one in replicas for part in one.get("held", ())}),
            "loads": sum(one.get("loads", 0) for one in replicas),
            "jobs": sum(one.get("jobs", 0) for one in replicas),
            "memory": [size for one in replicas for size in one.get("memory", ())],
            "replicas": replicas,
        }

    def _status_of(self, replica: Executor) -> dict[str, Any]:
        """Returns a replica's status. One that cannot answer is ``failed``, and the others are still asked."""
        try:
            return replica.status()
        except (GroupFailure, RequestError) as error:  # the latter where the Ray cluster is gone
            known = {"state": FAILED, "plan": str(replica.plan), "devices": replica.devices}
            return {**known, "last_error": error.summary}

    def is_usable(self) -> bool:
        """See :meth:`Executor.is_usable`."""
        return any(replica.is_usable() for replica in self.replicas)

    def stage(self) -> str | None:
        """See :meth:`Executor.stage`. It is the first replica's."""
        return self.replicas[0].stage()

    def free(self) -> None:
        """See :meth:`Executor.free`. If a replica fails, the others are still freed."""
        errors: list[Exception] = []
        for replica in self.replicas:
            try:
                replica.free()
            except UNREACHABLE as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        self._closed.set()
        for replica in self.replicas:
            replica.close()
