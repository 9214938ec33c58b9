"""Offloading: whether weights stay on the device or on the CPU between uses, and how much memory jobs need."""

import gc
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ..jobs import Job, SampleJob, UpscaleJob, WindowJob
from ..plan import Plan
from ..planner.cost_model import GATHERED, HEADROOM, kept_factor, working_factor
from ..planner.work import stage_layers
from ..system.limits import usable_memory
from .checkpoint import controlnet, shards
from .checkpoint.checkpoint import Checkpoint
from .pipeline.upscaling import blank_parts
from .pipeline.windows import Layout, forward_size
from .transformer import controlnet as control_branch
from .transformer import quantized_linear, step_cache
from .vae import tiling

OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory"
"""Messages of torch's plain RuntimeErrors on Apple's GPUs and on the CPU."""

PINNED_FACTOR = 2
"""Host memory that pinned weights take, relative to their bytes: torch rounds each weight up to a power of two."""

_allowed: int | None = None
"""The limit in bytes that :func:`allow` set for this process."""


def allow(device: torch.device, nbytes: int, *, enforced: bool = True) -> None:
    """Limits the GPU memory of this process's tensors to ``nbytes``.

    Args:
        device: the GPU.
        nbytes: the limit.
        enforced: whether torch fails beyond it; else the limit only counts when offload and tiles are chosen.
    """
    global _allowed
    _allowed = nbytes
    if enforced:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(nbytes / total, 1.0), device)


def api_of(device: torch.device):
    """Returns torch's module for a kind of GPU, such as ``torch.xpu``; None for the CPU and for kinds without one."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes available on a device: free memory and torch's unused cache, at most what :func:`allow` leaves.

    Practically infinite on the CPU, as weights cannot be offloaded further, and on devices that do not report it.
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
    """Returns the peak memory in bytes since :func:`reset_peak`.

    It is the current memory on Apple's GPUs and on the CPU, which track no peak.
    """
    api = api_of(device)
    if device.type == "mps":
        return api.driver_allocated_memory()
    return api.max_memory_allocated(device) if hasattr(api, "max_memory_allocated") else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Resets the peak of :func:`used_bytes`."""
    api = api_of(device)
    if hasattr(api, "reset_peak_memory_stats"):
        api.reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Frees unused cached memory, of the device and pinned; collects garbage first, as offload hooks are reference cycles."""
    gc.collect()
    empty_caches(device)


def empty_caches(device: torch.device) -> None:
    """Frees unused cached memory, of the device and pinned."""
    api = api_of(device)
    if hasattr(api, "empty_cache"):
        api.empty_cache()
    # a transformer offloaded by blocks would go on taking the host's memory
    if device.type == "cuda" and torch.cuda.is_initialized():
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty:  # torch 2.13 has the public one
            empty()


def synchronize(device: torch.device) -> None:
    """Waits until the device has completed all submitted work."""
    api = api_of(device)
    if device.type == "mps":
        api.synchronize()  # takes no device
    elif hasattr(api, "synchronize"):
        api.synchronize(device)


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Within the context, running out of memory raises torch.OutOfMemoryError on every device.

    Apple's GPUs and the CPU raise a plain RuntimeError otherwise.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not re.search(OUT_OF_MEMORY, str(error)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def bytes_on(device: torch.device, module: torch.nn.Module) -> int:
    """Returns the bytes of a module's weights that are on a device."""
    weights = map(shards.local, (*module.parameters(), *module.buffers()))
    return sum(weight.nbytes for weight in weights if weight.device.type == device.type)


def transformer_bytes(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, *, quantized: bool = False) -> int:
    """Returns the bytes of the transformer's weights that each rank of a plan keeps."""
    blocks = block_bytes(checkpoint, plan, dtype, quantized=quantized)
    rest = checkpoint.weight_bytes("transformer", dtype) - block_bytes(checkpoint, Plan(), dtype)
    return rest + blocks * stage_layers(plan, checkpoint.layers) // checkpoint.layers // plan.fsdp


def job_weight_bytes(job: SampleJob | WindowJob | UpscaleJob, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> int:
    """Returns the bytes of the transformer's weights that each rank of a plan keeps for a job, and of the job's ControlNets."""
    quantized = job.model.quantization != "off"
    own = transformer_bytes(checkpoint, plan, dtype, quantized=quantized)
    return own + controlnet.weight_bytes(getattr(job, "controlnets", ()), dtype)


def block_bytes(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, *, quantized: bool = False) -> int:
    """Returns the bytes of all blocks' weights on a rank, with whole blocks as FSDP gathers them."""
    vectors, matrices = block_parts(checkpoint, dtype, quantized=quantized)
    return vectors + matrices // plan.tensor


def block_parts(checkpoint: Checkpoint, dtype: torch.dtype, *, quantized: bool = False) -> tuple[int, int]:
    """Returns the bytes of all blocks' vectors, and of their matrices before tensor parallelism splits them."""
    inside = {name: where.shape for name, where in checkpoint.stored.items() if name.startswith(shards.BLOCKS)}
    matrices = sum(math.prod(shape) for shape in inside.values() if len(shape) > 1)
    vectors = sum(map(math.prod, inside.values())) - matrices
    saved = quantized_linear.saved_bytes(checkpoint, dtype) if quantized else 0
    return vectors * dtype.itemsize, matrices * dtype.itemsize - saved


def working_bytes(job: Job, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> int:
    """Estimates the memory in bytes that a job needs on each rank of a plan, excluding weights."""
    if isinstance(job, UpscaleJob):
        return max(working_bytes(part, checkpoint, plan, dtype) for part in blank_parts(job, checkpoint))
    if not isinstance(job, SampleJob | WindowJob):
        return tiling.working_bytes(job, dtype)
    batch, frames, height, width = forward_size(job, checkpoint)
    windows = 0 if isinstance(job, WindowJob) else len(Layout.of(job, checkpoint).starts(job.steps_to_run))
    if plan.replicas > 1:
        batch = 1  # each replica has one video at a time
    halves = 2 // plan.cfg if job.guided else 1
    tokens = (checkpoint.tokens(frames, height, width) + checkpoint.text_tokens) // plan.sequence
    kept = kept_factor(plan, checkpoint.layers) + (step_cache.STATES if job.model.step_cache else 0)
    if job.model.step_cache and job.model.guidance_cache and job.guided:
        kept += step_cache.STATES / halves  # of the passes with one prompt
    factor = working_factor(plan) + windows * kept + control_branch.STATES * len(job.controlnets)
    states = int(factor * batch * halves * tokens * checkpoint.heads * checkpoint.head_dim * dtype.itemsize)
    if plan.fsdp == 1:
        return states
    blocks = block_bytes(checkpoint, plan, dtype, quantized=job.model.quantization != "off")
    return states + GATHERED * blocks // checkpoint.layers


def choose_offload(
    asked: str, *, weights: int, working: int, others: int, layers: int, free: int, in_parts: bool = True
) -> tuple[str, str | None]:
    """Chooses the offload mode of the transformer's weights.

    Args:
        asked: ``auto``, or a mode, which is returned as is.
        weights: bytes of the transformer.
        working: bytes that a forward pass needs in addition.
        others: bytes of what else should stay on the device between jobs (the VAE).
        layers: number of blocks.
        free: bytes available on the device without either.
        in_parts: whether weights can be moved in parts; False with FSDP, which does so itself, and PipeFusion, which cannot
            wait.
    Returns:
        The mode, and a note for the user if ``auto`` chose a slower one.
    """
    if asked != "auto":
        return asked, None
    budget = int(free * HEADROOM)
    say = f"transformer {weights / 2**30:.1f} GiB and {working / 2**30:.1f} GiB of working memory, {free / 2**30:.1f} GiB free"
    if weights + working + others <= budget:
        return "none", None
    if weights + working <= budget:
        return "model", f"offload 'model': weights leave the GPU after each job ({say})"
    if not in_parts:
        return (
            "model",
            f"even one rank's share of the weights does not fit, so this may run out of memory: use more fsdp or pipefusion ({say})",
        )
    if 2 * weights // layers + working <= budget:
        return "group", f"offload 'group': weights stay on the CPU and are loaded block by block ({say})"
    return "sequential", f"offload 'sequential': weights are loaded layer by layer, which is slow ({say})"


def place(module: torch.nn.Module, mode: str, device: torch.device, *, ranks: int = 1) -> str | None:
    """Moves a transformer to the device, or adds hooks that move it in parts.

    ``none`` and ``model`` move it to the device; ``group`` and ``sequential`` leave it on the CPU.

    Args:
        module: the transformer, on the CPU if it is to stay there.
        mode: as :func:`choose_offload` returns it.
        device: to run on.
        ranks: processes that do so at the same time with the same host memory.
    Returns:
        A note for the user if the copies to the device are slower than they could be.
    """
    if device.type == "cpu" or mode in ("none", "model"):
        module.to(device)
        return None
    if mode == "sequential":
        from accelerate import cpu_offload

        cpu_offload(module, execution_device=device)
        return None
    uses_stream = device.type in ("cuda", "xpu")  # diffusers supports streams on no other device
    need, free = PINNED_FACTOR * bytes_on(torch.device("cpu"), module) * ranks, usable_memory()
    stays_pinned = need <= free * HEADROOM
    module.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=uses_stream,
        low_cpu_mem_usage=not stays_pinned,
    )
    if stays_pinned or not uses_stream:
        return None
    return (
        "offload 'group': each block is copied into pinned memory whenever it is used, which is slower: keeping all of them pinned takes "
        f"{need / 2**30:.0f} GiB of host memory, {free / 2**30:.0f} are free"
    )
