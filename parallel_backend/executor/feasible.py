"""Refuses what cannot work on the devices, with the planner's numbers, before anything is started."""

import torch

from ..cogvideox.pipeline.upscaling import tiles_of
from ..errors import RequestError
from ..jobs import SampleJob, UpscaleJob
from ..plan import Plan
from ..planner import hardware
from ..planner.cost_model import predict, weight_bytes, working_bytes
from ..planner.machine import CPU
from ..system.limits import usable_cores, usable_memory, whole_memory
from .base import steps_of
from .prepare import PreparedJob
from .resolve import check_cores

GIB, DAY = 2**30, 24 * 3600
CPU_CORES = 2
"""Cores that the planner's assumed rates of a CPU are about those of."""
MOST_DAYS = 7
"""On the CPU, days of predicted work above which a job is refused. The rates are assumed, so this is far from what anyone waits."""


def size_and_advice(job: SampleJob | UpscaleJob) -> tuple[str, str]:
    """Returns what one step of a job makes, and what makes it smaller, for a message."""
    if isinstance(job, UpscaleJob):
        frames, height, width = tiles_of(job)[0].size
        return f"a tile of {width}x{height} with {frames} frames", "use smaller tiles, fewer frames in a tile, or more devices"
    _, _, frames, height, width = job.latent.shape
    advice = "use a smaller size, fewer frames, context windows, or more devices"
    return f"a step at {width * 8}x{height * 8} with {frames * 4 - 3} frames", advice


def check_feasible(prepared: PreparedJob, *, alone: bool = True) -> None:
    """Checks that the devices have the cores, the memory and the speed for a job.

    On a GPU only the least that a step takes counts: that of compiled blocks, without weights, which may be offloaded, and without what
    other programs use now.

    Args:
        prepared: the job.
        alone: whether nothing of it is in main memory yet, as before the only job of a command. If not, all of main memory counts as free.
    Raises:
        RequestError: if they have not.
    """
    plan, devices, job = prepared.plan, prepared.devices, prepared.job
    check_cores(devices)
    if not isinstance(job, SampleJob | UpscaleJob) or devices.on_ray:
        return  # memory and cores of the cluster's nodes are known only to them
    workload = prepared.workload()
    work, windows = workload.work(devices.first), workload.jobs if workload.unit == "windows" else 1
    (size, advice), steps = size_and_advice(job), steps_of([job])
    what = f"{size} is predicted to"
    need = working_bytes(plan.replica, work, compiled=devices.kind != "cpu")
    if devices.kind == "cpu":
        need = (need + weight_bytes(plan.replica, work)) * devices.count
        free, where = usable_memory() if alone else whole_memory(), "of main memory"
        days = predict(Plan(), work, CPU).seconds * windows * CPU_CORES / usable_cores() * steps / DAY
    else:
        sizes = [torch.cuda.get_device_properties(device).total_memory for device in devices.torch_devices]
        free, where, days = hardware.allowed(min(sizes)), "on each GPU, without weights", 0
    if need > free:
        raise RequestError(
            f"{what} need {need / GIB:.1f} GiB {where} with plan '{plan}', and {free / GIB:.1f} GiB are there; {advice}"
        )
    if days > MOST_DAYS:
        hours = days * 24 / steps
        raise RequestError(
            f"{what} take about {hours:.0f} hours on {usable_cores()} cores, and {steps} steps {days:.0f} days; {advice}"
        )
