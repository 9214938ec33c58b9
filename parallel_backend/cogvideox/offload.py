"""Where weights wait between uses: on the device, or on the CPU, whole or in parts."""

import gc
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ..jobs import Job, SampleJob, WindowJob
from ..plan import Plan
from ..planner.cost_model import GATHERED, HEADROOM, kept_factor, working_factor
from ..planner.work import stage_layers
from .checkpoint import shards
from .checkpoint.checkpoint import Checkpoint
from .pipeline.windows import Layout, forward_size
from .transformer import fp8_linear as quantized
from .transformer import step_cache
from .vae import codec

OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory"
"""What torch says of a Mac's GPU, and of the CPU."""

_allowed: int | None = None
"""Bytes that :func:`allow` leaves this process."""


def allow(device: torch.device, nbytes: int) -> None:
    """Lets this process's tensors have no more of a GPU than so many bytes."""
    global _allowed
    _allowed = nbytes
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(nbytes / total, 1.0), device)


def api_of(device: torch.device):
    """torch's module for a GPU of this kind, such as ``torch.xpu``; None for the CPU, and for a kind that has none."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def free_bytes(device: torch.device) -> int:
    """Bytes the device can still give: what the driver has and what torch holds unused, or what is allowed where that is less.

    Endless on the CPU, as weights have nowhere else to wait, and on a device that does not say.
    """
    api = api_of(device)
    if device.type == "mps":  # shares the CPU's memory, up to what macOS lets a GPU have
        free = min(api.recommended_max_memory() - api.driver_allocated_memory(), psutil.virtual_memory().available)
        return max(free, 0) + api.driver_allocated_memory() - api.current_allocated_memory()
    if not hasattr(api, "mem_get_info"):
        return 2**62
    free, allocated = api.mem_get_info(device)[0], api.memory_allocated(device)
    unused = free + api.memory_reserved(device) - allocated
    return unused if _allowed is None else min(unused, _allowed - allocated)


def used_bytes(device: torch.device) -> int:
    """Peak bytes since :func:`reset_peak`. A Mac's GPU and the CPU know no peak: what is held now."""
    api = api_of(device)
    if device.type == "mps":
        return api.driver_allocated_memory()
    return api.max_memory_allocated(device) if hasattr(api, "max_memory_allocated") else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Starts a new peak for :func:`used_bytes`."""
    api = api_of(device)
    if hasattr(api, "reset_peak_memory_stats"):
        api.reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Gives what is held unused back to the driver; offload hooks are reference cycles, so those are collected."""
    gc.collect()
    api = api_of(device)
    if hasattr(api, "empty_cache"):
        api.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    api = api_of(device)
    if device.type == "mps":
        api.synchronize()  # there is but one
    elif hasattr(api, "synchronize"):
        api.synchronize(device)


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Within, memory that runs out is a torch.OutOfMemoryError on every device; a Mac's GPU and the CPU raise a plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not re.search(OUT_OF_MEMORY, str(error)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def bytes_on(device: torch.device, module: torch.nn.Module) -> int:
    """Bytes of a module's weights that lie on a device now."""
    weights = map(shards.local, (*module.parameters(), *module.buffers()))
    return sum(weight.nbytes for weight in weights if weight.device.type == device.type)


def transformer_bytes(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Bytes of the transformer's weights that each rank of a plan keeps."""
    blocks = block_bytes(checkpoint, plan, dtype, fp8=fp8)
    rest = checkpoint.weight_bytes("transformer", dtype) - block_bytes(checkpoint, Plan(), dtype)
    return rest + blocks * stage_layers(plan, checkpoint.layers) // checkpoint.layers // plan.fsdp


def block_bytes(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Bytes of all blocks' weights on a rank of a plan, whole blocks as ``fsdp`` gathers them."""
    vectors, matrices = block_parts(checkpoint, dtype, fp8=fp8)
    return vectors + matrices // plan.tensor


def block_parts(checkpoint: Checkpoint, dtype: torch.dtype, *, fp8: bool = False) -> tuple[int, int]:
    """Bytes of all blocks' vectors, and of their matrices, which ``tensor`` splits, all of them."""
    inside = {name: where.shape for name, where in checkpoint.stored.items() if name.startswith(shards.BLOCKS)}
    matrices = sum(math.prod(shape) for shape in inside.values() if len(shape) > 1)
    vectors = sum(map(math.prod, inside.values())) - matrices
    saved = quantized.saved_bytes(checkpoint, dtype) if fp8 else 0
    return vectors * dtype.itemsize, matrices * dtype.itemsize - saved


def working_bytes(job: Job, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> int:
    """Estimated bytes that a job needs beside the weights, on each rank of a plan."""
    if not isinstance(job, SampleJob | WindowJob):
        return codec.working_bytes(job, dtype)
    batch, frames, height, width = forward_size(job, checkpoint)
    windows = 0 if isinstance(job, WindowJob) else len(Layout.of(job, checkpoint).starts(job.steps_to_run))
    if plan.replicas > 1:
        batch = 1  # each replica has one video at a time
    halves = 2 // plan.cfg if job.guided else 1
    tokens = (checkpoint.tokens(frames, height, width) + checkpoint.text_tokens) // plan.sequence
    kept = kept_factor(plan, checkpoint.layers) + (step_cache.STATES if job.model.step_cache else 0)
    factor = working_factor(plan) + windows * kept
    states = int(factor * batch * halves * tokens * checkpoint.heads * checkpoint.head_dim * dtype.itemsize)
    if plan.fsdp == 1:
        return states
    return states + GATHERED * block_bytes(checkpoint, plan, dtype, fp8=job.model.fp8 != "off") // checkpoint.layers


def choose_offload(
    asked: str, *, weights: int, working: int, others: int, layers: int, free: int, in_parts: bool = True
) -> tuple[str, str | None]:
    """How the transformer's weights are kept.

    Args:
        asked: ``auto`` or a mode, which is then taken as it is.
        weights: bytes of the transformer.
        working: bytes of one forward beside them.
        others: bytes of what else wants to stay on the device between jobs (the VAE).
        layers: blocks of the transformer.
        free: bytes the device can give when neither is on it.
        in_parts: whether they can come in parts at all, which ``fsdp`` does by itself and ``pipefusion`` cannot wait for.
    Returns:
        The mode, and a line for the user where ``auto`` had to give up speed.
    """
    if asked != "auto":
        return asked, None
    room = int(free * HEADROOM)
    say = f"transformer {weights / 2**30:.1f} GiB and {working / 2**30:.1f} GiB to work in, {free / 2**30:.1f} GiB free"
    if weights + working + others <= room:
        return "none", None
    if weights + working <= room:
        return "model", f"offload 'model': weights leave the GPU after each job ({say})"
    if not in_parts:
        return (
            "model",
            f"even a share of the weights does not fit, so this may run out of memory: more fsdp helps, or more pipefusion ({say})",
        )
    if 2 * weights // layers + working <= room:
        return "group", f"offload 'group': weights stay on the CPU and come block by block ({say})"
    return "sequential", f"offload 'sequential': weights come layer by layer, slowly ({say})"


def place(module: torch.nn.Module, mode: str, device: torch.device) -> None:
    """Puts a transformer where its mode wants it, or hooks it to come in parts.

    ``none`` and ``model`` move it to the device; ``group`` and ``sequential`` leave it on the CPU.
    """
    if device.type == "cpu" or mode in ("none", "model"):
        module.to(device)
    elif mode == "group":
        module.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type in ("cuda", "xpu"),  # diffusers knows those of no other device
            low_cpu_mem_usage=True,
        )
    else:
        from accelerate import cpu_offload

        cpu_offload(module, execution_device=device)
