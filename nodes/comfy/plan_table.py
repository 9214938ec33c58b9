"""The planner's table for a model, a size and devices, and the values that *xDiT Backend* can have here."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...parallel_backend.cogvideox.checkpoint import published
from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.devices import Devices
from ...parallel_backend.errors import Failure, RequestError
from ...parallel_backend.executor.resolve import is_served, machine_of
from ...parallel_backend.jobs import SampleJob, UpscaleJob, empty_latent
from ...parallel_backend.model import Model, Windows
from ...parallel_backend.plan import AUTO
from ...parallel_backend.planner import hardware
from ...parallel_backend.planner.machine import CPU
from ...parallel_backend.planner.planner import approximations, choose, predictions
from ...parallel_backend.validation import check_size
from ...parallel_backend.workload import Workload
from .model_folders import NotDownloaded, find_model

CPU_PROCESSES = 2
"""Processes on the CPU that are suggested where there is no GPU."""
ROUNDING = ("quantize", "fp8", "attention")
"""Inputs of *Load CogVideoX* that change memory and seconds."""


def of_query(query: dict[str, str]) -> dict[str, Any]:
    """Returns the table for the fields ``model``, ``width``, ``height``, ``length``, ``batch``, ``cfg``, ``devices`` and ``kind``.

    ``quantize``, ``fp8`` and ``attention`` are those of *Load CogVideoX*.

    The table has plain values. ``rates`` says what it is predicted from, and whether that was measured; of a CPU nothing is
    known. For the kind ``upscale`` the size is that of a tile, and the seconds are of one of many tiles: how many there are is
    known once the video is. With ``window`` and ``overlap`` the memory is that of a window, and the seconds are of all of them.
    Replicas share them unless ``image``, a cache or a batch keeps them from it.

    Raises:
        RequestError: for a field that makes no sense.
    """
    checkpoint = checkpoint_of(query.get("model", "demo"))
    devices = hardware.fastest_first(Devices.parse(query.get("devices") or AUTO))
    is_tile = query.get("kind") == UpscaleJob.kind
    *size, batch = size_of_query(query, checkpoint)
    workload = workload_of_query(query, checkpoint, size, batch, is_tile=is_tile)
    machine, tiles = machine_of(devices), devices.count if is_tile else 1
    work = workload.work(devices.first)
    work = replace(work, pixels=math.prod(size)) if is_tile else work
    many = {"jobs": tiles * workload.jobs, "can_share": workload.can_share and not is_served(devices)}
    found = predictions(work, machine, devices.count, **many)
    found += [] if is_tile else [replace(each, rounds=workload.jobs) for each in approximations(work, machine, devices.count)]
    chosen, reason = choose(work, machine, devices.count, unit="tiles" if is_tile else workload.unit, **many)
    rows = [
        {
            "plan": str(each.plan),
            "devices": str(devices.first_of(each.plan.world_size)),
            "seconds": each.total / tiles if machine.knows_seconds else None,
            "relative": each.total / min(one.total for one in found),
            "memory": each.needed,
            "fits": bool(each.fits),
            "exact": each.plan.is_exact,
            "chosen": each.plan == chosen,
        }
        for each in sorted(found, key=lambda each: each.total)
    ]
    return {
        "model": checkpoint.name,
        "size": size,
        "kind": UpscaleJob.kind if is_tile else SampleJob.kind,
        "devices": str(devices),
        "free_memory": machine.free,
        "rates": None if machine.name == CPU.name else machine.describe,
        "reason": reason,
        "rows": rows,
    }


def size_of_query(query: dict[str, str], checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Returns width, height, frames and batch of a query, by default the checkpoint's own size, once.

    Raises:
        RequestError: for a field that makes no sense.
    """
    default = dict(zip(("width", "height", "length"), checkpoint.default_size)) | {"batch": 1}
    try:
        width, height, frames, batch = (int(query.get(name) or value) for name, value in default.items())
    except ValueError as error:
        raise RequestError(f"the size is no number: {error}") from None
    check_size(width, height, frames, batch, names={"frames": "length", "batch": "batch_size"})
    return width, height, frames, batch


def workload_of_query(
    query: dict[str, str], checkpoint: Checkpoint, size: Sequence[int], batch: int, *, is_tile: bool
) -> Workload:
    """Returns the workload of a query: that of a job without weights, prompts and images.

    Raises:
        RequestError: for a field that makes no sense.
    """
    width, height, frames = size
    numbers = {"cfg": checkpoint.default_cfg, "window": 0, "overlap": 0, "step_cache": 0, "guidance_cache": 0}
    try:
        cfg, window, overlap, step_cache, guidance_cache = (float(query.get(name) or value) for name, value in numbers.items())
        window, overlap, guidance_cache = map(int, (window, overlap, guidance_cache))
    except (ValueError, OverflowError) as error:  # no number, NaN, or infinite
        raise RequestError(f"cfg, the windows or a cache is no number: {error}") from None
    latent = empty_latent(width=width, height=height, frames=frames, batch=batch)
    windows = Windows(window, overlap) if window else None
    asked = {name: query[name] for name in ROUNDING if query.get(name)}
    model = Model(str(checkpoint.path), step_cache=step_cache, guidance_cache=guidance_cache, **asked)
    blank = checkpoint.blank_text()
    image = latent[:, :, :1] if query.get("image") else None
    job = SampleJob(model, blank, latent, blank, cfg=1.0 if is_tile else cfg, windows=windows, image=image)
    return Workload.of_job(job, checkpoint)


def choices_of_query(query: dict[str, str]) -> dict[str, list[str]]:
    """Returns devices that are here, and plans that fit the model, the size and the devices, the fastest first.

    Args:
        query: as of :func:`of_query`. If it makes no sense, the only plan is ``auto``.
    """
    try:
        table = of_query(query)
    except (RequestError, Failure):
        return {"devices": device_choices(), "plan": [AUTO]}
    together = None if query.get("devices", AUTO) == AUTO else table["devices"]
    rows = [row for row in table["rows"] if row["fits"] and together in (None, row["devices"])]
    return {
        "devices": device_choices(),
        "plan": [AUTO, *(row["plan"] for row in sorted(rows, key=lambda row: not row["exact"]))],
    }


def checkpoint_of(name: str) -> Checkpoint:
    """Returns the checkpoint of a model in the list, also of one that is not downloaded: a plan needs only its configuration."""
    try:
        return Checkpoint.open(find_model(name))
    except NotDownloaded as missing:
        return published.find(missing.short)


def device_choices() -> list[str]:
    """Returns devices that a group can have here: ``auto``, and the first GPUs, or processes on the CPU."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return [AUTO, "cpu", f"cpu:{CPU_PROCESSES}"]
    return [AUTO, *(",".join(map(str, range(count))) for count in range(1, gpus + 1))]
