"""Attention by this pack's kernels for Hopper GPUs, in 16 bits or FP8."""

import torch

from ..kernels.block_torch import FP8
from . import hopper_fp8
from .operands import in_fp8, in_tiles, rows_between
from .recomputed_tiles import pieces_on, recompute


def own_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention with :mod:`parallel_backend.cogvideox.kernels.attention_hopper`.

    Args:
        query, key: in the dtype of ``value`` or e4m3, scaled for scores in base two; see :func:`.operands.factors`.
        value: in bfloat16 or float16.
    Returns:
        Attention in the dtype of ``value``, and the natural log-sum-exp ``[batch, heads, tokens]``.
    """
    import triton

    from ..kernels import attention_hopper as own

    pieces = pieces_on(query.device)
    if query.dtype == FP8 and hopper_fp8.why_not(query.device) is None:
        return hopper_fp8.attend_in_fp8(query, key, value, raises=pieces.needs_maximum)
    query = query.contiguous()
    batch, tokens, heads, features = query.shape
    between = rows_between(key)
    if between is None or rows_between(value) != between:
        key, value, between = key.contiguous(), value.contiguous(), key.shape[1]
    result = torch.empty_like(query, dtype=value.dtype)
    log_sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    rows, keys, groups = own.ROWS.value, own.KEYS.value, own.GROUPS.value
    programs = triton.cdiv(tokens, rows * groups)
    failed = query.new_empty(batch * heads * programs * groups, dtype=torch.int32)
    tiles = (
        in_tiles(query, tokens, rows),
        *(in_tiles(key, between, count) for count in (rows, keys)),
        in_tiles(value, between, keys),
    )
    own.optimistic_kernel[(programs, heads, batch)](
        *tiles, result, log_sums, failed, tokens, between, key.shape[1], heads,
        FEATURES=features, RUNNING=pieces.needs_maximum, num_warps=4,
    )  # fmt: skip
    recompute(query, key, value, result, log_sums, failed)
    return result, log_sums


def attend_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with the kernels, in FP8 if queries and keys are."""
    return own_attention(query, key, value)[0]


def own_in_ring(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention in FP8 and its log-sum-exp of queries and keys that came through a ring in 16 bits."""
    return own_attention(*in_fp8(query, key), value)
