"""Predicts the seconds that a rank computes in a step. Importable without torch.

Each constant names the measurement that it comes from: NOTES is benchmarks/NOTES.md, ``h100x2*.json`` and ``h200x2*.json`` are in
benchmarks/results.
"""

from ..plan import Plan
from .machine import Machine
from .work import VAE_OPERATIONS, Work, bubble_factor, plan_patches, stage_layers, states_bytes

MATRIX_SHARE = 0.94
"""Share of a large product's rate that products reach in a step: 745 TFLOP/s (NOTES: where a half goes) of the 790 that one reached on an H200."""
ATTENTION_SHARE = 0.88
"""Share of one attention's rate that attention reaches in a step: 572 of 651 TFLOP/s on an H100 (NOTES), 503 of 571 with
FlashAttention-3."""
BANDWIDTH_SHARE = 0.78
"""Share of the memory's bandwidth that kernels reach: 32 ms where moving the bytes once takes 25 (NOTES: where a half goes)."""
PASSES = 26
"""How often compiled kernels other than products and attention read or write tokens x features in a block: these are the 25 ms."""
EAGER_PASSES = 176
"""``PASSES`` without compilation: 0.19 s more for each half of guidance (NOTES: 0.774 and 0.581 s)."""
INT8_PASSES = 36
"""Additional passes of layers in int8, which round their inputs themselves, and of GELU, which no product absorbs: 64 ms for a half on an
H100 (NOTES). Counted they are 21: comfy-kitchen's rounding reaches a third of the memory's bandwidth there."""
ULYSSES_PASSES = 10
"""Additional passes with Ulysses: packing, copying the rank's own part, unpacking; counted in ``parallel/ulysses.py``."""
MERGE_PASSES, MERGE_SECONDS = 24, 0.9e-3
"""Additional passes for each rank's keys in a ring, as results are merged in float32, uncompiled; counted in xDiT's code. And the
additional seconds of each in a block: between ``ring2`` of 2b and 5b in h200x2-2026-11-28.json (0.6 ms), and in older runs and without
peer access (1.1)."""
PATCH_SECONDS = 0.35e-3
"""Additional seconds of each patch of a pipeline in each block, as its kernels are small: so that ``pipefusion2`` of 2b and 5b are
within 5 % of h200x2-2026-11-28.json. Older runs had 0.55 to 0.9 ms."""
LAUNCH_SECONDS = 1.1e-3
"""Seconds in which the host launches a block's kernels; they count only where the device takes less: 0.8 to 1.4 ms (NOTES). The same is
assumed for each exchange in a block; with two GPUs the device never took less."""
KEPT_PASSES = 4
"""Additional passes under ``pipefusion``: keys and values are kept, so they are read and written once more."""
VAE_SHARE = 0.54
"""Share of a large product's rate that the VAE reaches: a decode of 49x480x720 takes 0.77 s on an H100 (h100x2-2026-11-27.json). An encode
was not timed, and is assumed to reach the same."""
VAE_WHOLE = 0.25
"""Share of the VAE's seconds that more ranks do not shorten: the same decode takes 0.48 s on two."""


def computation(plan: Plan, work: Work, machine: Machine) -> float:
    """Returns the seconds that the slowest rank computes in a step, the pipeline's bubble included."""
    matrix, attention = machine.matrix * MATRIX_SHARE, machine.attention * ATTENTION_SHARE
    if work.dtype == "fp16" and work.quantize != "fp8" and machine.attention_fp16:  # products in FP8 return bf16
        attention = machine.attention_fp16 * ATTENTION_SHARE
    matrix *= {"fp8": machine.matrix_fp8, "int8": machine.matrix_int8}.get(work.quantize, 1.0)
    if work.attention_fp8:
        attention *= machine.attention_fp8
    is_compiled, patches = work.is_compiled(machine), plan_patches(plan, work)
    passes = (PASSES if is_compiled else EAGER_PASSES) + INT8_PASSES * (work.quantize == "int8")
    passes *= (1 + 1 / plan.tensor) / 2  # tensor parallelism splits about half of the passes: heads and hidden features
    passes += ULYSSES_PASSES * (plan.ulysses > 1) + MERGE_PASSES * (plan.ring - 1) + KEPT_PASSES * (plan.pipefusion > 1)
    others = MERGE_SECONDS * plan.ring if plan.ring > 1 else 0.0
    others += PATCH_SECONDS * patches if plan.pipefusion > 1 and is_compiled else 0.0
    layers = stage_layers(plan, work.layers)
    share = layers / work.layers / (plan.world_size // plan.pipefusion)  # the largest stage is the slowest
    device = (
        work.products * share / matrix
        + work.attention * share / attention
        + layers * passes * states_bytes(plan, work) / (machine.bandwidth * BANDWIDTH_SHARE)
        + layers * others
    )
    host = layers * (1 + exchanges_per_block(plan)) * patches * LAUNCH_SECONDS if is_compiled else 0.0
    return bubble_factor(plan, work) * max(device, host)


def vae_seconds(plan: Plan, work: Work, machine: Machine) -> float:
    """Returns the seconds of a step in which the VAE works. Each rank has a strip of rows."""
    share = VAE_WHOLE + (1 - VAE_WHOLE) / plan.world_size
    return share * VAE_OPERATIONS * work.pixels / (machine.matrix * VAE_SHARE)


def exchanges_per_block(plan: Plan) -> int:
    """Returns how often ranks exchange data in a block."""
    return 2 * (plan.tensor > 1) + (plan.ring if plan.ring > 1 else plan.ulysses > 1 or plan.pipefusion > 1)
