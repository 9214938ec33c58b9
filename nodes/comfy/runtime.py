"""Everything of ComfyUI's that the nodes touch: progress, interrupts, memory, and who runs jobs; folders are in :mod:`.model_folders`."""

import atexit
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import comfy.model_management as management
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy.cli_args import args as settings
from PIL import Image

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.offload import working_bytes
from ...parallel_backend.cogvideox.pipeline import validation
from ...parallel_backend.devices import Devices
from ...parallel_backend.errors import Cancelled, GroupUnavailable, RequestError
from ...parallel_backend.executor.base import Executor
from ...parallel_backend.executor.batch import has_windows_to_share, windows_of
from ...parallel_backend.executor.factory import AS_ASKED, ExecutorCache, resolve
from ...parallel_backend.executor.local import LocalExecutor
from ...parallel_backend.jobs import DecodeJob, Job, Report, Result, SampleJob
from ...parallel_backend.plan import AUTO, Plan
from ...parallel_backend.planner.cost_model import HEADROOM
from ...parallel_backend.workload import work_of, work_of_job
from . import lines
from .model_folders import find_lora, find_model, lora_files, model_names  # noqa: F401 - nodes ask the host for these
from .model_patcher import HeldWeights

logger = logging.getLogger(__name__)

SLACK = 0.02
"""Of weights: ComfyUI makes room for a tenth more of them, a job leaves a tenth of what is free, which is a little more than that."""

_groups = ExecutorCache()
_held: dict[Executor, HeldWeights] = {}
_local: dict[torch.device, LocalExecutor] = {}
atexit.register(_groups.close)


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
    return _local.setdefault(device, LocalExecutor(device))


def counted_on(executor: Executor) -> torch.device:
    """The device whose memory ComfyUI counts an executor's weights against: its own, where the executor uses that."""
    own = management.get_torch_device()
    return own if own in executor.torch_devices else executor.torch_devices[0]


def run(job: Job, backend=None, node_id: str | None = None, device: torch.device | None = None) -> Result:
    """Runs a job for a node: on its backend, or in this process where it has none or no group can start.

    Args:
        job: what to do.
        backend: a :class:`.types.BackendHandle`, or None for this process.
        node_id: where to say what is done, and where progress is shown.
        device: for this process; None for ComfyUI's.
    Raises:
        RequestError: for what makes no sense; no group has been touched.
        InterruptProcessingException: ComfyUI's own, when the person cancelled.
    """
    checkpoint = Checkpoint.open(job.model.path)
    validation.check(checkpoint, job)
    try:
        executor = executor_for(backend, checkpoint, job, node_id) if backend else local(device)
        return run_on(executor, job, node_id)
    except GroupUnavailable as error:
        say(f"no group: {error.summary}; working in this process", node_id, level=logging.WARNING)
        if error.details:
            logger.info(error.details)
    return run_on(local(device), job, node_id)


def has_group() -> bool:
    """Whether a group is kept, or was."""
    return _groups.executor is not None


def begin(handle, backend, latent: torch.Tensor | None, cfg: float, node_id: str | None) -> None:
    """Has the group start that a sampling job is going to need, without waiting for it. To be asked only where :func:`has_group` says no:
    what is kept would have to give way to a group that the job, once it is checked, may not get.

    Args:
        handle: a :class:`.types.ModelHandle`.
        backend, node_id: see :func:`run`.
        latent: of the job; any will do with a plan that is not ``auto``.
        cfg: of the job.
    """
    checkpoint, blank = handle.checkpoint, handle.checkpoint.blank_text()
    try:
        latent = checkpoint.empty_latent() if latent is None else latent
        job = SampleJob(handle.model, blank, latent, blank, cfg=cfg, windows=handle.windows)
        executor_for(backend, checkpoint, job, node_id)
    except (GroupUnavailable, RequestError, ValueError) as error:
        logger.debug("no group is started yet; the job is going to say why: %s", error)


def executor_for(backend, checkpoint: Checkpoint, job: Job, node_id: str | None) -> Executor:
    """Who runs a job for a node. A group begins to start.

    Raises:
        RequestError: when plan, devices and model do not fit.
        GroupUnavailable: when the backend cannot start here.
    """
    samples = isinstance(job, SampleJob)
    wants = {"heads": checkpoint.heads, "offload": job.model.offload if samples else "auto"}
    windows = windows_of(job) if samples and has_windows_to_share(job) else 1
    among, videos = Devices.parse(backend.devices), max(job.latent.shape[0], windows) if samples else None
    if backend.plan == AUTO and (warm := _groups.on(among, videos=videos, **wants)):
        return warm  # even where cfg is 1 and another plan would be faster: a new group costs more than it saves
    work = partial(work_of_job, job, checkpoint) if samples else partial(work_of, checkpoint)
    guided = job.guided if samples else True
    spread = samples and not job.model.step_cache  # with which a batch is not quite its videos made apart
    wants |= {"jobs": windows, "pieces": "windows" if windows > 1 else "videos", "spread": spread, "layers": checkpoint.layers}
    plan, devices, reason = resolve(backend.plan, backend.devices, guided=guided, work=work, **wants)
    validation.check_plan(checkpoint, plan, job)
    if plan.world_size == 1:
        report_plan(plan, devices, reason, node_id)
        return local(None if backend.devices == AUTO and devices.indices == (0,) else devices.first)
    executor = _groups.get(plan, devices, among=among if backend.plan == AUTO else None)
    executor.start()
    for replaced in [held for held in _held if held not in (executor, *_local.values())]:
        del _held[replaced]  # its group has ended, and ComfyUI must not count it
    report_plan(plan, devices, reason, node_id)
    return executor


def report_plan(plan: Plan, devices: Devices, reason: str, node_id: str | None) -> None:
    """Says which plan is used and why; one that the user has set is only logged."""
    line = f"plan {plan} on {devices}: {reason}"
    if reason == AS_ASKED:
        logger.info(line)
    else:
        say(line, node_id)


def run_on(executor: Executor, job: Job, node_id: str | None) -> Result:
    """Runs a job with ComfyUI's progress bar and cancel button."""
    bar = comfy.utils.ProgressBar(job.steps, node_id) if isinstance(job, SampleJob) else None

    def on_step(step: int, steps: int) -> None:
        if not management.processing_interrupted():
            bar.update_absolute(step, steps)

    def on_picture(picture: torch.Tensor) -> None:
        if not management.processing_interrupted():
            bar.update_absolute(bar.current, bar.total, ("JPEG", Image.fromarray(picture.numpy()), settings.preview_size))

    held = _held.setdefault(executor, HeldWeights(executor, counted_on(executor)))
    held.recount()
    held.expect(job)
    checkpoint = Checkpoint.open(job.model.path)
    dtype = checkpoint.dtype(job.model.dtype, held.load_device)
    working = working_bytes(job, checkpoint, executor.plan, dtype)
    pictures = isinstance(job, SampleJob) and settings.preview_method != LatentPreviewMethod.NoPreviews
    if isinstance(job, SampleJob):  # which decides by the room for the VAE, too, where its weights are to wait
        working += checkpoint.weight_bytes("vae", dtype)
    if executor not in _local.values():
        management.soft_empty_cache()  # what this process keeps, another one cannot take
    management.load_models_gpu([held], memory_required=working / HEADROOM + SLACK * held.model_size())
    stop = management.processing_interrupted
    with interruptible():
        try:
            if isinstance(job, SampleJob):
                result = executor.sample(job, on_step=on_step, should_stop=stop, on_picture=on_picture if pictures else None)
            elif isinstance(job, DecodeJob):
                result = executor.decode(job, should_stop=stop)
            else:
                result = executor.encode(job, should_stop=stop)
        except Exception:
            held.forget()
            raise
    say(summary(job, result.report), node_id)
    for note in result.report.notes:
        say(note, node_id, level=logging.WARNING)
    return result


def summary(job: Job, report: Report) -> str:
    """What a job cost, in one line."""
    steps = f"{len(report.step_seconds)} steps, {1 / median(report.step_seconds):.2f} steps/s, " if report.step_seconds else ""
    peak = max(report.peak_memory) / 2**30
    return f"{job.kind}: plan {report.plan}, {steps}load {report.load_seconds:.1f} s, run {report.run_seconds:.1f} s, peak {peak:.1f} GiB"


def devices_exist(devices: str) -> None:
    """Raises RequestError for devices this machine lacks."""
    Devices.parse(devices)
