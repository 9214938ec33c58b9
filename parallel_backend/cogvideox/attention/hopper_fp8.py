"""Attention with both matrix products in e4m3, by :mod:`parallel_backend.cogvideox.kernels.attention_hopper_fp8`."""

import torch

from ..kernels.block_torch import FP8, LARGEST, SMALLEST, keep_kernels
from ..kernels.probe import is_near, once
from .operands import factors, in_fp8, in_tiles, rows_between
from .recomputed_tiles import recompute
from .torch_attention import HEAD_DIM, NEAR, attend_torch, few_states

ROWS, STEPS = 64, 8
"""Tokens per iteration of the survey kernel, and iterations per program."""


def in_places(value: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises and transposes values for the second product.

    Args:
        value: ``[batch, tokens, heads, head_dim]``; heads and features must be contiguous.
        keys: tokens per tile.
    Returns:
        Values in e4m3, ``[batch, heads, head_dim, tokens padded to tiles]``; their scales and their offsets, both
        ``[batch, heads, head_dim]``.
    """
    import triton

    from ..kernels.attention_hopper_fp8 import settle_kernel, survey_kernel, transpose_kernel

    batch, tokens, heads, features = value.shape
    tiles, parts = triton.cdiv(tokens, keys), triton.cdiv(tokens, ROWS * STEPS)
    found = value.new_empty(batch, heads, parts, 3, features, dtype=torch.float32)
    survey_kernel[(parts, heads, batch)](
        value, found, tokens, heads, *value.stride()[:2], FEATURES=features, ROWS=ROWS, STEPS=STEPS, num_warps=4
    )
    scales, centers = (value.new_empty(batch, heads, features, dtype=torch.float32) for _ in range(2))
    settle_kernel[(batch * heads,)](
        found, scales, centers, tokens, parts,
        FEATURES=features, PARTS=triton.next_power_of_2(parts), LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=4,
    )  # fmt: skip
    result = value.new_empty(batch, heads, features, tiles * keys, dtype=FP8)
    transpose_kernel[(tiles, heads, batch)](
        value, result, scales, centers, tokens, heads, *value.stride()[:2], tiles * keys,
        FEATURES=features, KEYS=keys, LARGEST=LARGEST, num_warps=4,
    )  # fmt: skip
    return result, scales, centers


def in_tiles_of(places: torch.Tensor, keys: int):
    """Returns a TMA descriptor that loads tiles of values from :func:`in_places`."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    rows, features = places.flatten(0, 2), places.shape[2]
    layout = NVMMASharedLayout(swizzle_byte_width=min(keys, 128), element_bitwidth=8, rank=2)
    return TensorDescriptor(rows, list(rows.shape), [rows.stride(0), 1], [features, keys], layout)


def attend_in_fp8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, raises: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp; see :func:`.hopper.own_attention`.

    Args:
        query, key: in e4m3.
        value: in bfloat16 or float16.
        raises: whether the softmax's reference may rise during the loop; for inputs where a fixed one is often too low.
    """
    import triton

    from ..kernels import attention_hopper_fp8 as kernels

    query = query.contiguous()
    batch, tokens, heads, features = query.shape
    between = rows_between(key)
    if between is None:
        key, between = key.contiguous(), key.shape[1]
    if rows_between(value) is None:
        value = value.contiguous()
    rows, keys, groups = kernels.ROWS.value, kernels.KEYS.value, kernels.GROUPS.value
    places, scales, centers = in_places(value, keys)
    result = torch.empty_like(query, dtype=value.dtype)
    log_sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    programs = triton.cdiv(tokens, rows * groups)
    failed = query.new_empty(batch * heads * programs * groups, dtype=torch.int32)
    of_keys = (in_tiles(key, between, count) for count in (rows, keys))
    tiles = (in_tiles(query, tokens, rows), *of_keys, in_tiles_of(places, keys))
    kernels.fp8_kernel[(programs, heads, batch)](
        *tiles, result, log_sums, failed, scales, centers, tokens, between, key.shape[1], heads,
        FEATURES=features, RAISES=raises, num_warps=4,
    )  # fmt: skip
    recompute(query, key, value, result, log_sums, failed)
    return result, log_sums


@once
def why_not(device: torch.device) -> str | None:
    """Returns why a Hopper GPU cannot compute attention with values in e4m3, in one line, or None.

    Tested once with a few tokens.
    """
    keep_kernels()
    states = few_states(device, HEAD_DIM)
    exact = attend_torch(*states)
    factor, _ = factors(HEAD_DIM, base_two=True, fp8=False)
    for raises in (False, True):
        found, _ = attend_in_fp8(*in_fp8(states[0] * factor, states[1]), states[2].bfloat16(), raises=raises)
        if not is_near(found, exact, 6 * NEAR):
            return "its results are wrong with this version of Triton"
    return None
