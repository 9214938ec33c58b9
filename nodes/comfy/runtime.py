"""Everything of ComfyUI's that the nodes touch: progress, interrupts, memory, and who runs jobs; folders are in :mod:`.model_folders`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import comfy.model_management as management
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy.cli_args import args as settings
from PIL import Image

from ...parallel_backend.cogvideox.offload import working_bytes
from ...parallel_backend.cogvideox.pipeline.upscaling import counted
from ...parallel_backend.cogvideox.vae.frames import FramesListener
from ...parallel_backend.devices import Devices
from ...parallel_backend.errors import Cancelled, GroupUnavailable, RequestError
from ...parallel_backend.executor.base import Executor
from ...parallel_backend.executor.feasible import check_feasible
from ...parallel_backend.executor.local import LocalExecutor
from ...parallel_backend.executor.prepare import CheckedJob, PreparedJob, check_job, prepare
from ...parallel_backend.executor.resolve import SET_BY_USER
from ...parallel_backend.group.fork_server_client import ForkServerProcess
from ...parallel_backend.group.preflight import check_possible
from ...parallel_backend.jobs import Job, Report, Result, SampleJob, UpscaleJob
from ...parallel_backend.notes import is_warning
from ...parallel_backend.plan import AUTO, Plan
from ...parallel_backend.planner.cost_model import HEADROOM
from . import lines
from .executors import chosen as _chosen
from .executors import close_if_replaced
from .executors import groups as _groups
from .executors import held as _held
from .executors import local_executors as _local
from .model_folders import (  # noqa: F401 - nodes ask the host for these
    controlnets,
    find_controlnet,
    find_lora,
    find_model,
    lora_files,
    model_names,
)
from .model_patcher import HeldWeights
from .progress import jobs, shown_steps
from .stage_watch import StageWatch

logger = logging.getLogger(__name__)

SLACK = 0.02
"""Of weights: ComfyUI makes room for a tenth more of them, a job leaves a tenth of what is free, which is a little more than that."""


def text_device() -> torch.device:
    """Where ComfyUI wants text encoders to run."""
    return management.text_encoder_device()


def torch_device() -> torch.device:
    """Where ComfyUI wants models to run."""
    return management.get_torch_device()


def make_room(size: int, device: torch.device) -> None:
    """Asks ComfyUI to unload models until so many bytes are free."""
    if device.type != "cpu":
        management.free_memory(size / HEADROOM + SLACK * size, device)


def say(line: str, node_id: str | None = None, *, level: int = logging.INFO) -> None:
    """One line to the user: in the log, and in the node, by default the one that is executing."""
    logger.log(level, line)
    lines.show(line, level, node_id)


def is_wanted() -> bool:
    """Whether the user has not cancelled what runs."""
    return not management.processing_interrupted()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, what stops because the user cancelled it ends as ComfyUI's own interruption does."""
    try:
        yield
    except Cancelled:
        management.throw_exception_if_processing_interrupted()
        raise


def local(device: torch.device | None = None) -> LocalExecutor:
    """The executor of this process, on ComfyUI's device or the one given."""
    device = device or management.get_torch_device()
    if device not in _local:
        _local[device] = LocalExecutor(device, owns_process=False)
    return _local[device]


def local_for(checked: CheckedJob, device: torch.device | None) -> LocalExecutor:
    """The executor of this process for a job.

    Raises:
        RequestError: when the CPU has too little memory for it. The system would kill ComfyUI for that.
    """
    executor = local(device)
    if executor.torch_devices[0].type == "cpu":
        prepared = PreparedJob(checked.job, checked.checkpoint, Plan(), Devices("cpu"), SET_BY_USER)
        check_feasible(prepared, alone=False)
    return executor


def counted_on(executor: Executor) -> torch.device:
    """The device whose memory ComfyUI counts an executor's weights against: its own, where the executor uses that."""
    own = management.get_torch_device()
    return own if own in executor.torch_devices else executor.torch_devices[0]


def run(
    job: Job,
    backend=None,
    node_id: str | None = None,
    device: torch.device | None = None,
    on_frames: FramesListener | None = None,
) -> Result:
    """Runs a job for a node: on its backend, or in this process if it has none or no group can start.

    Args:
        job: what to do.
        backend: a :class:`.types.BackendHandle`, or None for this process.
        node_id: the node that shows progress and notes; None for the one that is executing.
        device: for this process; None for ComfyUI's.
        on_frames: receives the frames of a decoding job; see :meth:`.Executor.decode`.
    Raises:
        RequestError: when the job cannot be done. No group has been touched.
        InterruptProcessingException: ComfyUI's own, when the user cancelled.
    """
    if isinstance(job, SampleJob):
        job = replace(job, preview=settings.preview_method != LatentPreviewMethod.NoPreviews)
    checked = check_job(job)
    try:
        executor = executor_for(backend, checked, node_id) if backend else local_for(checked, device)
        return run_on(executor, checked, node_id, on_frames)
    except GroupUnavailable as error:
        say(f"no group: {error.summary}; working in this process", node_id, level=logging.WARNING)
        if error.details:
            logger.info(error.details)
    return run_on(local_for(checked, device), checked, node_id, on_frames)


def warm_up(devices: str, plan: str) -> None:
    """Starts the imports of a group that a backend is going to need, without waiting for them.

    Args:
        devices, plan: the backend's.
    """
    try:
        found = Devices.parse(devices)
        if found.on_ray:
            return
        needs_group = found.count > 1 if plan == AUTO else Plan.parse(plan).world_size > 1
        if needs_group:
            check_possible(None, found)
            ForkServerProcess.get(found.kind)
    except (GroupUnavailable, RequestError) as error:
        logger.debug("no imports are started yet; the job is going to say why: %s", error)


def has_group() -> bool:
    """Whether a group is kept, or was."""
    return _groups.executor is not None


def begin(handle, backend, latent: torch.Tensor | None, cfg: float, node_id: str | None) -> None:
    """Starts the group that a sampling job is going to need, without waiting for it.

    Call it only if :func:`has_group` is False: a group that is kept would be replaced by one that the job, once it is checked,
    may not need.

    Args:
        handle: a :class:`.types.ModelHandle`.
        backend, node_id: see :func:`run`.
        latent: the job's; None for an empty one, which is as good for any plan but ``auto``.
        cfg: the job's.
    """
    checkpoint, blank = handle.checkpoint, handle.checkpoint.blank_text()
    try:
        latent = checkpoint.empty_latent() if latent is None else latent
        job = SampleJob(handle.model, blank, latent, blank, cfg=cfg, windows=handle.windows)
        executor_for(backend, CheckedJob(job, checkpoint), node_id)  # not checked: text and images are still missing
    except (GroupUnavailable, RequestError, ValueError) as error:
        logger.debug("no group is started yet; the job is going to say why: %s", error)


def executor_for(backend, checked: CheckedJob, node_id: str | None) -> Executor:
    """Returns the executor for a job of a node. A group starts, and is not waited for.

    Raises:
        RequestError: when plan, devices and job do not fit each other.
        GroupUnavailable: when the backend cannot start here.
    """
    among = Devices.parse(backend.devices)
    # A warm group is used even if another plan would be faster, as with cfg 1: a new group costs more than it saves.
    if backend.plan == AUTO and (warm := _groups.on(among, checked.workload())):
        if warm in _chosen:
            say(_chosen[warm], node_id)
        return warm
    prepared = prepare(checked, backend.plan, backend.devices)
    check_feasible(prepared, alone=False)
    plan, devices = prepared.plan, prepared.devices
    if plan.world_size == 1 and not devices.on_ray:
        report_plan(prepared, node_id)
        return local(None if backend.devices == AUTO and devices.indices == (0,) else devices.first)
    executor = _groups.get(plan, devices, among=among if backend.plan == AUTO else None)
    executor.start(checked.checkpoint)
    for replaced in set(_held) - {executor, *_local.values()}:
        _held.pop(replaced, None)  # its group has ended, and ComfyUI must not count it; the panel may have removed it meanwhile
    if line := report_plan(prepared, node_id):
        _chosen[executor] = line
    return executor


def report_plan(prepared: PreparedJob, node_id: str | None) -> str | None:
    """Says which plan is used and why, and returns that line. A plan that the user has set is only logged."""
    line = f"plan {prepared.plan} on {prepared.devices}: {prepared.reason}"
    if prepared.reason == SET_BY_USER:
        logger.info(line)
        return None
    say(line, node_id)
    return line


def run_on(executor: Executor, checked: CheckedJob, node_id: str | None, on_frames: FramesListener | None = None) -> Result:
    """Runs a job with ComfyUI's progress bar and cancel button."""
    steps = shown_steps(checked.job)
    bar = comfy.utils.ProgressBar(steps, node_id) if steps else None

    def on_step(step: int, steps: int) -> None:
        watch.stop()
        progress.on_step(step, steps)
        if not management.processing_interrupted():
            bar.update_absolute(step, steps)

    def on_picture(picture: torch.Tensor) -> None:
        if not management.processing_interrupted():
            bar.update_absolute(bar.current, bar.total, ("JPEG", Image.fromarray(picture.numpy()), settings.preview_size))

    def should_stop() -> bool:
        if not management.processing_interrupted():
            watch.show_share()
        return management.processing_interrupted()

    held = make_room_for(executor, checked)
    node_id = node_id or lines.executing().node_id
    with interruptible(), jobs.running(executor, checked.job, node_id) as progress, StageWatch(executor, node_id) as watch:
        try:
            result = executor.run_checked(checked, on_step, should_stop, on_picture, on_frames)
        except Exception:
            held.forget()
            raise
        finally:
            close_if_replaced(executor)
    say(summary(checked.job, result.report), node_id)
    for note in result.report.notes:
        say(note, node_id, level=logging.WARNING if is_warning(note) else logging.INFO)
    return result


def make_room_for(executor: Executor, checked: CheckedJob) -> HeldWeights:
    """Has ComfyUI unload other models until a job fits. Returns what the executor holds, as ComfyUI counts it."""
    held = _held.setdefault(executor, HeldWeights(executor, counted_on(executor)))
    held.recount()
    held.expect(checked.job)
    checkpoint, job = checked.checkpoint, checked.job
    dtype = checkpoint.dtype(job.model.dtype, held.load_device)
    working = working_bytes(job, checkpoint, executor.plan, dtype)
    if isinstance(job, SampleJob):  # offload "auto" keeps weights on the device only if the VAE fits too
        working += checkpoint.weight_bytes("vae", dtype)
    if executor not in _local.values():
        management.soft_empty_cache()  # another process cannot take what this process's allocator keeps
    management.load_models_gpu([held], memory_required=working / HEADROOM + SLACK * held.model_size())
    return held


def summary(job: Job, report: Report) -> str:
    """What a job cost, in one line."""
    done, pace, steps = len(report.step_seconds), median(report.step_seconds or (1.0,)), ""
    if isinstance(job, UpscaleJob):
        steps = f"{counted(done)}, {pace:.2f} s a tile, "
    elif done:
        steps = f"{done} step{'s' * (done != 1)}, {1 / pace:.2f} steps/s, "
    peak = max(report.peak_memory) / 2**30
    return f"{job.kind}: plan {report.plan}, {steps}load {report.load_seconds:.2f} s, run {report.run_seconds:.2f} s, peak {peak:.1f} GiB"
