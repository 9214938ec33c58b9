"""Predicts how a model fits into GPUs of one kind: plan, offload, tiles, and memory of GPU and host."""

from dataclasses import dataclass

import torch

from .cogvideox.checkpoint.checkpoint import Checkpoint
from .cogvideox.checkpoint.compression import SPATIAL, latent_frames_of
from .cogvideox.offload import choose_offload
from .cogvideox.vae import tiling
from .plan import IN_PARTS, Plan
from .planner.cost_model import HEADROOM, predict, weight_bytes, working_bytes
from .planner.machine import Machine
from .planner.planner import choose
from .planner.work import Work

PROCESS_BYTES = 3 * 2**30
"""Host memory of a process beside weights: Python's modules, CUDA's context, pinned buffers. Assumed."""


@dataclass(frozen=True)
class Fit:
    """What ``auto`` would do with a model on GPUs of one kind, predicted."""

    plan: Plan
    offload: str
    """Of the transformer's weights: ``none``, ``model``, ``group`` or ``sequential``."""
    fits: bool
    """Whether the forward pass fits with that offload."""
    seconds: float | None
    """Seconds of a step; None where weights come from the host in parts, as the host's memory decides then."""
    peak: int
    """Peak bytes on each GPU while it samples."""
    is_tiled: bool
    """Whether the decode works in tiles."""
    host: int
    """Peak bytes of host memory, of all processes."""


def fit(checkpoint: Checkpoint, work: Work, machine: Machine, count: int, *, size: tuple[int, int, int]) -> Fit:
    """Predicts how a model fits into ``count`` GPUs.

    Args:
        checkpoint: the model.
        work: one step of it.
        machine: one of the GPUs, with its free memory.
        count: number of GPUs.
        size: width and height in pixels, and frames.
    """
    plan, _ = choose(work, machine, count)
    found = predict(plan, work, machine)
    dtype = torch.float32 if work.itemsize == 4 else torch.bfloat16
    weights, vae = weight_bytes(plan, work), checkpoint.weight_bytes("vae", dtype)
    working = working_bytes(plan, work)
    mode, _ = choose_offload(
        "auto",
        weights=weights,
        working=working,
        others=vae,
        layers=work.layers,
        free=machine.free,
        in_parts=plan.can_offload("group"),
    )
    resident = {"none": weights, "model": weights, "group": 2 * weights // work.layers, "sequential": 0}[mode]
    fits = resident + working <= HEADROOM * machine.free
    peak = found.peak if mode not in IN_PARTS else found.peak - weights + resident
    text = checkpoint.weight_bytes("text_encoder", dtype)
    is_tiled, makes_room = decode_way(size, dtype, machine.free - vae, weights if mode == "none" else 0, plan.world_size)
    kept = weights * plan.world_size if mode != "none" or makes_room else 0
    return Fit(
        plan,
        mode,
        fits,
        seconds=found.seconds if mode not in IN_PARTS else None,
        peak=peak,
        is_tiled=is_tiled,
        host=text + kept + PROCESS_BYTES * plan.world_size,
    )


def decode_way(size: tuple[int, int, int], dtype: torch.dtype, free: int, weights: int, ranks: int) -> tuple[bool, bool]:
    """Returns whether a decode works in tiles, and whether the transformer is moved to the CPU for it.

    Args:
        size: width and height in pixels, and frames.
        dtype: of the VAE.
        free: bytes of each GPU without the transformer.
        weights: bytes of the transformer on each GPU.
        ranks: GPUs, of which each decodes a strip of rows if that fits once the transformer has made room.
    """
    width, height, frames = size
    need = tiling.decode_bytes((1, 16, latent_frames_of(frames), height // SPATIAL, width // SPATIAL), dtype)
    strip = tiling.STRIP_MARGIN * need / ranks
    if ranks > 1 and strip <= HEADROOM * free:
        return False, strip > HEADROOM * (free - weights)
    return need > HEADROOM * (free - weights), False
