"""Attention of a whole sequence: this pack's own kernels on Hopper GPUs, FlashAttention-3 where those cannot be made, else torch's own.

Tensors are ``[batch, tokens, heads, head_dim]``, as the projections give them. torch's own is cuDNN's on a Hopper GPU.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F

from ..kernels.block_torch import FP8, keep_kernels, quantize
from ..kernels.probe import is_near, once

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FLASH_3 = ("fa3_fwd_interface", "flash_attn_interface")
"""Modules with FlashAttention-3: PyPI's ``fa3-fwd``, and what its authors' repository builds. The first has no fp16."""
HEAD_DIM = 64
"""Of CogVideoX's heads."""
HEAD_DIMS = (32, HEAD_DIM)
"""Of heads that the kernels attend with; small models for tests have the former."""
NEAR = 0.02
"""How far the kernels may be from float32, relative, to be used; bf16 is about 0.004 from it."""
TOO_OFTEN = 0.05
"""Share of the work that may be done twice, more slowly: it costs as much then as a running maximum (7.6 ms to 6.85, NOTES), and a person
hears of it."""


@cache
def flash_3():
    """FlashAttention-3's function, or None."""
    for name in FLASH_3:
        try:
            return import_module(name).flash_attn_func
        except (ImportError, OSError):  # absent, or built for another torch
            continue
    return None


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is the kind of GPU that FlashAttention-3 and the kernels are made for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def uses_flash_3(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention of such tensors can be FlashAttention-3's."""
    return dtype == torch.bfloat16 and is_hopper(device) and flash_3() is not None


def is_for_own(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether such tensors are what the kernels are made for."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim in HEAD_DIMS and is_hopper(device)


def is_own(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention of such tensors is the kernels', which take their scores in base two; see :func:`factors`."""
    return is_for_own(device, dtype, head_dim) and _declined is None and why_not_own(device, dtype) is None


_declined: str | None = None
"""Why this process does without the kernels though they work here."""


def agree(device: torch.device, dtype: torch.dtype, head_dim: int, collect: Callable[[bool], list[bool]]) -> None:
    """Has all ranks use the kernels or none: queries that one has scaled for them, another attends to.

    Args:
        device, dtype, head_dim: of this rank's tensors.
        collect: gives every rank's answer; all of them must ask.
    """
    global _declined
    mine = is_own(device, dtype, head_dim)
    if not all(collect(mine)) and mine:
        _declined = "another rank cannot use them"


def factors(head_dim: int, *, base_two: bool, fp8: bool) -> tuple[float, float]:
    """What queries and keys are multiplied by before they are rounded, so that nothing is left to do with scores.

    FP8 has its precision where numbers of normalised heads then lie: 1 becomes 0.42, and below 0.037 it begins to lose bits.
    """
    whole = math.log2(math.e) / math.sqrt(head_dim) if base_two else 1.0
    return (math.sqrt(whole), math.sqrt(whole)) if fp8 else (whole, 1.0)


def flash_attention_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in bfloat16 and its log-sum-exp ``[batch, heads, tokens]``."""
    return flash_3()(query, key, value, return_attn_probs=True)[:2]


def in_fp8(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of scores in base two, in e4m3 with the factors for that."""
    _, root = factors(query.shape[-1], base_two=True, fp8=True)
    return quantize(query / root), quantize(key * root)


def rows_between(states: torch.Tensor) -> int | None:
    """Rows ``[heads * head_dim]`` from one sample to the next, or None where memory is laid out so that there is no saying."""
    batch, tokens, heads, features = states.shape
    aligned = 16 // states.itemsize
    if states.stride()[2:] != (features, 1) or states.stride(1) % aligned or states.storage_offset() % aligned:
        return None
    if batch == 1:
        return tokens
    between, rest = divmod(states.stride(0), states.stride(1))
    return None if rest else between


def in_tiles(states: torch.Tensor, between: int, rows: int):
    """What the copy engine needs to know to bring tiles of so many rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, tokens, heads, features = states.shape
    layout = NVMMASharedLayout(swizzle_byte_width=features * states.itemsize, element_bitwidth=8 * states.itemsize, rank=2)
    shape = [(batch - 1) * between + tokens, heads * features]
    return TensorDescriptor(states, shape, [states.stride(1), 1], [rows, features], layout)


class Pieces:
    """Pieces of 64 queries of a head that the kernels attended to on one device, since they were last counted."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):
            self.twice = torch.zeros(1, dtype=torch.int32, device=device)
            self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu)
        self.all = self._asked = 0
        self._copied = torch.cuda.Event() if on_gpu else None
        self.needs_maximum = False
        """Whether so many had to be attended to twice that a kernel with a running maximum is faster; for good."""

    def look(self) -> None:
        """Finds out, without waiting for the device, how it was a while ago."""
        if self._copied and not self._copied.query():
            return
        self.needs_maximum |= self._seen.item() > TOO_OFTEN * self._asked
        self._seen.copy_(self.twice, non_blocking=True)
        self._asked = self.all
        if self._copied:
            self._copied.record()

    def share_of_twice(self) -> float:
        """How many had to be attended to twice, of all; begins anew."""
        share = self.twice.item() / max(self.all, 1)
        self.twice.zero_()
        self._seen.zero_()
        self.all = 0
        return share


pieces_on = cache(Pieces)
"""By device."""


def note_of_twice(device: torch.device) -> str | None:
    """For a person: how much the kernels had to do twice since this was last asked, where that is worth a line."""
    share = pieces_on(device).share_of_twice() if is_hopper(device) else 0.0
    if share <= TOO_OFTEN:
        return None
    then = ", until one that can do with them took over" if pieces_on(device).needs_maximum else ""
    return f"{share:.0%} of attention was computed twice, as its scores are not what the fast kernel expects{then}: slower, no worse"


def attend_anew(query, key, value, result, log_sums, failed: torch.Tensor) -> None:
    """Attends again to the pieces of which some rows ``failed``, and counts them.

    Args:
        query, key, value, result, log_sums: of the first kernel, whichever that was.
        failed: rows of each piece, ``[batch * heads * pieces]``.
    """
    from ..kernels import attention_hopper as own

    batch, tokens, heads, features = query.shape
    pieces = pieces_on(query.device)
    pieces.all += len(failed)
    own.careful_kernel[(len(failed) // (batch * heads), heads, batch)](
        query, key, value, result, log_sums, failed, pieces.twice, tokens, key.shape[1], heads,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        FEATURES=features, ROWS=own.ROWS.value, KEYS=64, num_warps=4,
    )  # fmt: skip


def own_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by :mod:`parallel_backend.cogvideox.kernels.attention_hopper`.

    Args:
        query, key: in the dtype of ``value`` or e4m3, such that their product is a score in base two: see :func:`factors`.
        value: in bfloat16 or float16.
    Returns:
        In the dtype of ``value``, and the natural log-sum-exp ``[batch, heads, tokens]``.
    """
    import triton

    from ..kernels import attention_hopper as own

    pieces = pieces_on(query.device)
    if query.dtype == FP8:
        from . import attention_fp8

        if attention_fp8.why_not(query.device) is None:
            return attention_fp8.attend_in_fp8(query, key, value, raises=pieces.needs_maximum)
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
    attend_anew(query, key, value, result, log_sums, failed)
    return result, log_sums


@once
def why_not_own(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a Hopper GPU cannot attend with the kernels in bfloat16 or float16, in one line, or None: tried once with few tokens."""
    keep_kernels()
    generator = torch.Generator(device).manual_seed(0)
    states = [torch.randn(1, tokens, 2, HEAD_DIM, device=device, generator=generator) for tokens in (200, 300, 300)]
    exact = attend_torch(*states)
    for fp8 in (False, True):
        factor, _ = factors(HEAD_DIM, base_two=True, fp8=False)
        query, key = states[0] * factor, states[1]
        query, key = in_fp8(query, key) if fp8 else (query.to(dtype), key.to(dtype))
        found = attend_own(query, key, states[2].to(dtype))
        if not is_near(found, exact, (5 if fp8 else 1) * NEAR):
            return "its results are wrong with this version of Triton"
    return None


def prepare(device: torch.device, dtype: torch.dtype, head_dim: int, *, fp8: bool = False) -> None:
    """Tries, where such tensors are what the kernels are made for, whether they can be made: a few seconds that are better spent beside
    something else."""
    note(device, dtype, head_dim, fp8=fp8)


def attend_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The kernels' attention of every query to all keys, in FP8 where these are."""
    return own_attention(query, key, value)[0]


def attend_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """FlashAttention-3 of every query to all keys."""
    return flash_attention_3(query, key, value)[0]


def attend_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own attention."""
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def alone(attend: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The attention of one rank, which heads of ``[batch, 1, tokens, heads, head_dim]`` were spread to."""
    return attend(*(states.squeeze(1) for states in (query, key, value))).unsqueeze(1)


def attention_of(device: torch.device, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> Attention:
    """The attention for such tensors."""
    if is_own(device, dtype, head_dim):
        return attend_own
    return attend_flash if uses_flash_3(device, dtype) else attend_torch


def for_blocks(states: torch.Tensor, head_dim: int, *, fp8: bool) -> tuple[Attention, dict[str, bool]]:
    """The attention for the heads of a forward's ``states``, and what blocks are to know of it; see :func:`.block.forward`.

    ``fp8`` says whether to attend in FP8 where that can be done.
    """
    kind = states.device, states.dtype, head_dim
    own = is_own(*kind)
    if own:
        pieces_on(states.device).look()
    return attention_of(*kind), {"base_two": own, "fp8": own and fp8}


def note_of_values(device: torch.device) -> str | None:
    """For a person: why attention in FP8 has values in 16 bits, or None."""
    from . import attention_fp8

    reason = attention_fp8.why_not(device)
    return f"attention's values are not in FP8, which is slower: {reason}" if reason else None


def note(device: torch.device, dtype: torch.dtype, head_dim: int, *, fp8: bool) -> str | None:
    """For a person: what else attends where the kernels cannot, or None."""
    if is_own(device, dtype, head_dim):
        return note_of_values(device) if fp8 else None
    reason = (_declined or why_not_own(device, dtype)) if is_for_own(device, dtype, head_dim) else None
    if fp8:
        because = f": {reason}" if reason else ""
        return f"attention is not in FP8: that needs a Hopper GPU, bf16 or fp16, and Triton 3.6 or newer{because}"
    instead = "FlashAttention-3's" if uses_flash_3(device, dtype) else "torch's own"
    return f"attention is {instead}, which is slower than this pack's: {reason}" if reason else None
