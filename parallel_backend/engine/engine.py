"""Runs jobs on one rank: the same code in the caller's process and in every worker of a group."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..cogvideox import offload
from ..cogvideox.attention import choice
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.denoise import Callbacks, StepCallback, WindowCallback, denoise
from ..cogvideox.pipeline.forward import Runtime, predict_window
from ..cogvideox.pipeline.notes import notes
from ..cogvideox.vae import layers
from ..cogvideox.vae.frames import FramesListener
from ..cogvideox.vae.preview import PictureListener, Previews, why_none
from ..devices import current
from ..errors import OutOfMemory
from ..jobs import DecodeJob, EncodeJob, Job, LoadJob, Progress, Report, Result, SampleJob, WindowJob
from ..model import Model
from ..parallel.rank import RankContext
from .model_cache import ModelCache
from .vae_jobs import VaeJobs


@contextmanager
def exact_float32(dtype: torch.dtype):
    """Disables TF32 in float32 convolutions. It is torch's default on GPUs, and its error of 3e-4 would show between plans."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def go_on(*progress: Progress | int) -> bool:
    """The default callback of steps and windows: never stops the job."""
    return True


SHORT_SECONDS = 2.0
"""After a step this short the next step starts before this one is reported, so that the device does not idle. Then
cancelling takes one step more."""


class Engine:
    """Runs jobs one after the other and keeps the weights between them.

    Args:
        context: the rank, its device and its share of each forward.
    """

    def __init__(self, context: RankContext):
        self.context = context
        self.device = context.device
        self.together = False
        """Whether the ranks exchange data in this job: if one fails alone, the others hang in a collective."""
        self.model: Model | None = None
        self.cache = ModelCache(context, self._note, self._set_stage)
        self.vae_jobs = VaeJobs(context, self.cache, self._note)
        self.stage = ""
        """What it does before the first step, for the user who waits. Any thread may read it."""
        self.on_stage: Callable[[str], None] | None = None
        """Called with each new stage, in the thread that runs the job."""
        self._notes: list[str] = []
        self._status: dict[str, Any] = {}
        self._describe()

    def run(
        self,
        job: Job,
        on_step: StepCallback = go_on,
        on_window: WindowCallback = go_on,
        on_picture: PictureListener | None = None,
        on_frames: FramesListener | None = None,
    ) -> Result:
        """Runs one job.

        Args:
            job: validated against its checkpoint by the caller.
            on_step, on_window: see :func:`parallel_backend.cogvideox.pipeline.denoise.denoise`.
            on_picture: called on rank 0 with each preview, if the job asks for previews.
            on_frames: called on rank 0 with the frames of a decoding job, whose result is then empty.
        Returns:
            The job's tensor, on the CPU, and this rank's report.
        Raises:
            Cancelled: when ``on_step`` or ``on_window`` returned False.
        """
        checkpoint = Checkpoint.of(job.model)
        dtype = checkpoint.dtype(job.model.dtype, self.device)
        self.model, self._notes, self.stage = job.model, [], ""
        self.together = isinstance(job, SampleJob | WindowJob)
        offload.reset_peak(self.device)
        run = {
            SampleJob: partial(self._sample, on_picture=on_picture),
            LoadJob: self._load_only,
            WindowJob: self._window,
            DecodeJob: partial(self._use_vae, on_frames=on_frames),
            EncodeJob: self._use_vae,
        }[type(job)]
        try:
            with current(self.device), exact_float32(dtype):
                result = run(job, checkpoint, dtype, on_step, on_window)
        finally:
            self._describe()
        report = replace(
            result.report,
            plan=str(self.context.plan),
            world_size=self.context.plan.world_size,
            peak_memory=(offload.used_bytes(self.device) + self.context.outside_bytes,),
            notes=tuple(self._notes),
        )
        return replace(result, report=report)

    def _set_stage(self, stage: str) -> None:
        if stage != self.stage:
            self.stage = stage
            if self.on_stage:
                self.on_stage(stage)

    def free(self) -> None:
        """Frees all weights."""
        self.cache.free()
        self.model = None
        self._describe()

    def status(self) -> dict[str, Any]:
        """Returns the held parts, their bytes on the device, the number of loads, and the memory in use, as plain values.

        Any thread may call it. The held parts are those at the end of the last job.
        """
        return {**self._status, "memory": offload.used_bytes(self.device)}

    def _describe(self) -> None:
        """Updates the status for other threads, which must not read weights while this thread changes them."""
        self._status = {
            "model": self.model.path if self.model else None,
            "held": sorted(self.cache.held),
            "weights": {part: offload.bytes_on(self.device, module) for part, (_, module) in self.cache.held.items()},
            "loads": self.cache.loads,
        }

    @property
    def _advice(self) -> str:
        """What the user can change to free memory for a job."""
        if not self.context.plan.can_offload("group"):
            return f"quantize 'fp8' or 'int8', or more {'fsdp' if self.context.plan.fsdp > 1 else 'pipefusion'}"
        return f"offload 'group' (now '{self.cache.offload}')"

    def _note(self, line: str | None) -> None:
        if line:
            self._notes.append(line)

    def _sample(self, job: SampleJob, checkpoint: Checkpoint, dtype, on_step, on_window, on_picture) -> Result:
        started = time.perf_counter()
        transformer = self.cache.transformer(job, checkpoint, dtype, on_window)
        self._set_stage("first step")
        previews = self._previews(job, checkpoint, dtype, on_picture, on_window)
        self.context.synchronize()
        loaded = time.perf_counter()
        if not job.guided and self.context.plan.cfg > 1:
            self._note(f"cfg is {job.cfg}: both halves of plan '{self.context.plan}' compute the same")
        self._notes += notes(job, checkpoint)
        steps: list[float] = []
        began, ahead = loaded, False

        def mark(progress: Progress, total: int) -> bool:
            nonlocal began, ahead
            ended = time.perf_counter()
            steps.append(ended - began)
            under_way = ahead
            short = self.device.type == "cuda" and steps[-1] < SHORT_SECONDS
            go_on = on_step(progress, total)
            if previews and go_on:
                is_last = progress.step == total  # its latents are the result, which need not be what it took for clean
                previews.look(progress.latents if is_last else progress.clean, is_last=is_last)
                go_on = on_window()
            go_on, ahead = self.context.agree(go_on, short)
            began = ended if under_way else time.perf_counter()  # a report that the device waits for is not part of a step
            return go_on

        caches = self.context.caches(job)
        if job.progress is not None and caches.restarted:
            self._note(f"{caches.restarted}, so this is not quite the video of an undisturbed run")
        callbacks = Callbacks(mark, partial(self._may_go_on, on_window), may_begin=lambda: ahead)
        try:
            with offload.one_kind_of_error():
                latent = denoise(transformer, checkpoint, job, self._runtime(dtype), callbacks, caches=caches)
        except torch.OutOfMemoryError as error:
            where = f"a step after {len(steps)}" if steps else "step 1"
            raise self._out_of_memory(where, job, checkpoint, dtype) from error
        finally:
            if self.cache.offload == "model":
                self.cache.make_room()
        self._notes += caches.notes
        self._note(previews and previews.note)
        self._note(choice.note_of_twice(self.device))
        return Result(
            latent,
            Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded, step_seconds=tuple(steps)),
        )

    def _runtime(self, dtype: torch.dtype) -> Runtime:
        """Returns what this rank computes with, once its transformer is loaded."""
        return Runtime(self.device, dtype, self.context, self.cache.attention, self.cache.branches)

    def _previews(
        self, job: SampleJob, checkpoint: Checkpoint, dtype, show: PictureListener | None, go_on: WindowCallback
    ) -> Previews | None:
        """Returns what makes a job's previews; None if they are not wanted here, or cannot be made."""
        if not job.preview or show is None:
            return None
        if "vae" not in checkpoint.elements:
            self._note("no previews: the model has no VAE")
            return None
        if self.cache.offload != "none":
            self._note(
                f"no previews: offload is '{self.cache.offload}', and they need the VAE and the transformer on the device"
            )
            return None
        try:
            module = self.cache.vae(checkpoint, dtype)
        except Exception as error:  # sampling needs no VAE, so it must not fail because of one, least of all on one rank alone
            self.cache.held.pop("vae", None)
            self.cache.has_failed = True
            self._note(why_none(error))
            return None
        module.disable_tiling()
        layers.use(module, compiled=False)
        skipped = checkpoint.padding_frames(job.latent.shape[2])
        return Previews(module, scaling=checkpoint.scaling_factor, skipped=skipped, show=show, go_on=go_on)

    def _load_only(self, job: LoadJob, checkpoint: Checkpoint, dtype, on_step, on_window) -> Result:
        """Loads what a sampling job needs. Notes are left to that job."""
        started = time.perf_counter()
        self.cache.transformer(job, checkpoint, dtype, on_window)
        self.context.synchronize()
        self._notes.clear()
        return Result(torch.empty(0), Report(load_seconds=time.perf_counter() - started))

    def _window(self, job: WindowJob, checkpoint: Checkpoint, dtype, on_step, on_window) -> Result:
        started = time.perf_counter()
        transformer = self.cache.transformer(job, checkpoint, dtype, on_window)
        if self.stage:  # weights were read
            self._set_stage("first step")
        self.context.synchronize()
        loaded = time.perf_counter()
        try:
            with offload.one_kind_of_error():
                predicted = predict_window(transformer, checkpoint, job, self._runtime(dtype))
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory("a window", job, checkpoint, dtype) from error
        return Result(predicted, Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded))

    def _out_of_memory(self, what: str, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype) -> OutOfMemory:
        """Returns the error for a forward pass that does not fit."""
        free, need = offload.free_bytes(self.device), offload.working_bytes(job, checkpoint, self.context.plan, dtype)
        return OutOfMemory(
            f"{what} ran out of memory on {self.device}: it needs about {need / 2**30:.1f} GiB in addition to the weights, and "
            f"{free / 2**30:.1f} GiB are free; use {self._advice}, a smaller size, or a plan with more ulysses, ring or tensor"
            + (", or turn previews off" if isinstance(job, SampleJob) and job.preview else "")
        )

    def _may_go_on(self, on_window: WindowCallback) -> bool:
        """Returns whether the job is still wanted; rank 0 decides if the ranks work together."""
        self.context.synchronize()  # else all of the work would be queued before the first window has run
        return self.context.agree(on_window())[0] if self.together else on_window()

    def _use_vae(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype, on_step, on_window, on_frames=None) -> Result:
        started = time.perf_counter()
        strips = self.vae_jobs.rows_shared(job, checkpoint, dtype)
        self.together = strips is not None
        if not self.together and self.context.rank != 0:
            return Result(torch.empty(0))
        module = self.vae_jobs.module(job, checkpoint, dtype, shared=self.together)
        loaded = time.perf_counter()
        tensor = self.vae_jobs.compute(job, dtype, module, strips, partial(self._may_go_on, on_window), on_frames)
        return Result(tensor, Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded))
