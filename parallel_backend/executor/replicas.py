"""Several groups that share videos: each takes the next one when it is free, and one that is lost is missed by nobody."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.denoise import denoise
from ..cogvideox.transformer.step_cache import StepCaches
from ..cogvideox.vae.preview import PictureListener
from ..devices import Devices
from ..errors import GroupFailure, GroupUnavailable
from ..jobs import Job, Progress, Report, Result, SampleJob, WindowJob
from ..parallel.rank import RankContext
from ..plan import Plan
from ..workload import has_windows_to_share
from .base import DecodeOf, Executor, StepListener, StopSignal, VideoListener, never, silent
from .batch import cut, join
from .group import GroupExecutor
from .scheduler import Made, Pool, ReplicaScheduler


class ReplicasExecutor(Executor):
    """Runs jobs in several groups at once, one video in each.

    A replica of one device is a group too: a process of its own, so that it can fail alone.

    Args:
        plan: with ``replicas`` above 1; each has the rest of it.
        devices: as many as the plan needs; the first are the first replica's.
    Raises:
        RequestError, GroupUnavailable: when no such groups can be here; nothing has been started.
    """

    def __init__(self, plan: Plan, devices: Devices):
        plan.check_world(devices.count)
        self.plan = plan
        self.devices = devices
        self.replicas = [GroupExecutor(plan.replica, share) for share in devices.shared_out(plan.replicas)]
        self._names = {
            replica: f"replica {place} of {plan.replicas} ({replica.devices})" for place, replica in enumerate(self.replicas, 1)
        }
        self._pool = Pool(self.replicas)
        self._closed = threading.Event()

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """See :meth:`Executor.torch_devices`."""
        return self.devices.torch_devices

    def start(self) -> None:
        """Starts the groups that are not there, without waiting for them.

        Raises:
            GroupUnavailable: when none can start.
        """
        self._closed.clear()
        errors: list[GroupUnavailable] = []
        for replica in self.replicas:
            try:
                replica.start()
            except GroupUnavailable as error:
                errors.append(error)
        if len(errors) == len(self.replicas):
            raise errors[0]

    def _run(
        self, job: Job, on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None
    ) -> Result:
        # What a pipeline keeps of a window is where that was predicted.
        if isinstance(job, SampleJob) and self.plan.pipefusion == 1:
            checkpoint = Checkpoint.open(job.model.path)
            if has_windows_to_share(job, checkpoint):
                return self._share_windows(job, checkpoint, on_step, should_stop)
        return self._spread([job], on_step, should_stop, on_picture)[0]

    def load(self, job: SampleJob, *, should_stop: StopSignal = never) -> Report:
        """See :meth:`Executor.load`: all replicas read at once, and one that cannot is in no other's way."""
        with ThreadPoolExecutor(len(self.replicas), thread_name_prefix="load") as threads:
            loading = [threads.submit(replica.load, job, should_stop=should_stop) for replica in self.replicas]
        reports = [one.result() for one in loading if not isinstance(one.exception(), GroupFailure)]
        return max(reports, key=lambda report: report.load_seconds, default=Report())

    def _sample_all(self, jobs: Sequence[SampleJob], on_step: StepListener, should_stop: StopSignal) -> list[Result]:
        return self._spread(jobs, on_step, should_stop)

    def _make_all(
        self,
        jobs: Sequence[SampleJob],
        decode: DecodeOf,
        on_video: VideoListener,
        on_step: StepListener,
        should_stop: StopSignal,
    ) -> None:
        """Each replica decodes what it has sampled, while the others go on. Of a single video the windows are shared, if it has some."""
        if len(jobs) == 1:
            super()._make_all(jobs, decode, on_video, on_step, should_stop)
            return
        self._closed.clear()

        def follow(number: int, made: list[Made]) -> Job | None:
            if len(made) == 1:
                return decode(number, made[0][1])
            results = [Result(one[1].tensor, self._report([one], spread.notes, one[1].report.run_seconds)) for one in made]
            on_video(number, *results)
            return None

        spread = ReplicaScheduler(self._pool, self._names, jobs, self._closed.is_set, follow)
        spread.run(on_step, should_stop)

    def _spread(
        self, jobs: Sequence[Job], on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None
    ) -> list[Result]:
        """Runs every video of the jobs where a replica is free. Results come in the jobs' order."""
        self._closed.clear()
        pieces = [cut(job) for job in jobs]
        began = time.perf_counter()
        spread = ReplicaScheduler(self._pool, self._names, [piece for part in pieces for piece in part], self._closed.is_set)
        spread.run(on_step, should_stop, on_picture)
        seconds = time.perf_counter() - began
        results, first = [], 0
        for part in pieces:
            made = [spread.results[number][0] for number in range(first, first + len(part))]
            first += len(part)
            report = self._report(made, spread.notes, seconds if len(part) > 1 else made[0][1].report.run_seconds)
            results.append(Result(join([result.tensor for _, result in made]), report))
        return results

    def _share_windows(self, job: SampleJob, checkpoint: Checkpoint, on_step: StepListener, should_stop: StopSignal) -> Result:
        """Does the steps of a long video here, on the CPU, and has each step's windows predicted where a replica is free."""
        self._closed.clear()
        spread = None
        made: list[Made] = []
        steps: list[float] = []
        started = began = time.perf_counter()

        def elsewhere(
            parts: list[torch.Tensor], prompts: list[torch.Tensor], timestep: int, scale: float
        ) -> list[torch.Tensor]:
            nonlocal spread
            *negative, positive = (prompt.contiguous() for prompt in prompts)
            jobs = [WindowJob(job.model, part.contiguous(), positive, timestep, scale, *negative) for part in parts]
            spread = ReplicaScheduler(self._pool, self._names, jobs, self._closed.is_set, after=spread)
            spread.run(silent, should_stop)
            results = [spread.results[number][0] for number in range(len(jobs))]
            made.extend((replica, replace(result, tensor=torch.empty(0))) for replica, result in results)
            return [result.tensor for _, result in results]

        def mark(progress: Progress, total: int) -> bool:
            nonlocal began
            steps.append(time.perf_counter() - began)
            on_step(progress.step, total)
            began = time.perf_counter()
            return not should_stop()

        place = {"device": torch.device("cpu"), "dtype": checkpoint.dtype(job.model.dtype, self.devices.first)}
        callbacks = {"on_step": mark, "on_window": lambda: not should_stop(), "elsewhere": elsewhere}
        caches, context = StepCaches(0.0, lambda change: change), RankContext(place["device"])
        latent = denoise(None, checkpoint, job, **place, context=context, caches=caches, **callbacks)
        if job.preview:
            spread.notes.append("no previews: replicas share the windows of each step")
        report = self._report(made, spread.notes, time.perf_counter() - started)
        return Result(latent, replace(report, step_seconds=tuple(steps)))

    def _report(self, made: list[Made], notes: list[str], seconds: float) -> Report:
        """What one job cost; a rank that had no part in it used no memory for it."""
        reports = [result.report for _, result in made]
        peaks: list[int] = []
        for replica in self.replicas:
            own = [result.report.peak_memory for where, result in made if where is replica]
            peaks += [max(sizes) for sizes in zip(*own)] if own else [0] * self.plan.replica_size
        loading = max(report.load_seconds for report in reports)
        return Report(
            plan=str(self.plan),
            world_size=self.plan.world_size,
            load_seconds=loading,
            run_seconds=max(seconds - loading, 0.0) if len(made) > 1 else seconds,
            step_seconds=tuple(step for report in reports for step in report.step_seconds),
            peak_memory=tuple(peaks),
            notes=tuple(dict.fromkeys([*notes, *(note for report in reports for note in report.notes)])),
        )

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`; what each replica says is under ``replicas``."""
        said = [self._status_of(replica) for replica in self.replicas]
        states = {one["state"] for one in said}
        return {
            "state": next(state for state in ("busy", "ready", "starting", "absent") if state in states),
            "plan": str(self.plan),
            "devices": str(self.devices),
            "world_size": self.plan.world_size,
            "model": next((one["model"] for one in said if one.get("model")), None),
            "held": sorted({part for one in said for part in one.get("held", ())}),
            "loads": sum(one.get("loads", 0) for one in said),
            "jobs": sum(one.get("jobs", 0) for one in said),
            "memory": [size for one in said for size in one.get("memory", ())],
            "replicas": said,
        }

    def _status_of(self, replica: GroupExecutor) -> dict[str, Any]:
        """One that does not come up is absent, and in no other's way."""
        try:
            return replica.status()
        except GroupFailure as error:
            absent = {"state": "absent", "plan": str(replica.plan), "devices": replica.devices}
            return {**absent, "last_error": error.summary}

    def free(self) -> None:
        """See :meth:`Executor.free`. A replica that cannot is in no other's way."""
        errors: list[Exception] = []
        for replica in self.replicas:
            try:
                replica.free()
            except (GroupFailure, OSError, EOFError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._closed.set()
        for replica in self.replicas:
            replica.close()
