"""The operands of this pack's attention kernels: scaling, FP8, memory layout and TMA descriptors.

Tensors are ``[batch, tokens, heads, head_dim]``, the layout of the projections' outputs.
"""

import math

import torch

from ..kernels.block_torch import quantize


def factors(head_dim: int, *, base_two: bool, fp8: bool) -> tuple[float, float]:
    """Returns the factors of queries and keys, applied before they are rounded so that scores need no scaling.

    In FP8 the factor is split between both: for normalised heads, 1 becomes 0.42, within FP8's most precise range. Below 0.037,
    FP8 starts to lose bits.
    """
    whole = math.log2(math.e) / math.sqrt(head_dim) if base_two else 1.0
    return (math.sqrt(whole), math.sqrt(whole)) if fp8 else (whole, 1.0)


def in_fp8(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts queries and keys, scaled for scores in base two, to e4m3 with the factors for FP8."""
    _, root = factors(query.shape[-1], base_two=True, fp8=True)
    return quantize(query / root), quantize(key * root)


def rows_between(states: torch.Tensor) -> int | None:
    """Returns the distance between samples in rows of ``[heads * head_dim]``.

    None if a TMA descriptor cannot address the memory layout.
    """
    batch, tokens, heads, features = states.shape
    aligned = 16 // states.itemsize
    if states.stride()[2:] != (features, 1) or states.stride(1) % aligned or states.storage_offset() % aligned:
        return None
    if batch == 1:
        return tokens
    between, rest = divmod(states.stride(0), states.stride(1))
    return None if rest else between


def in_tiles(states: torch.Tensor, between: int, rows: int):
    """Returns a TMA descriptor that loads tiles of ``rows`` tokens.

    Args:
        states: ``[batch, tokens, heads, head_dim]``.
        between: see :func:`rows_between`.
        rows: tokens per tile.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, tokens, heads, features = states.shape
    layout = NVMMASharedLayout(swizzle_byte_width=features * states.itemsize, element_bitwidth=8 * states.itemsize, rank=2)
    shape = [(batch - 1) * between + tokens, heads * features]
    return TensorDescriptor(states, shape, [states.stride(1), 1], [rows, features], layout)
