"""Attention of a full sequence: this pack's kernels on Hopper GPUs, FlashAttention-3 if those cannot be compiled, else torch's.

Tensors are ``[batch, tokens, heads, head_dim]``, the layout of the projections' outputs. torch's attention on a Hopper GPU
is cuDNN's.
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
"""Modules of FlashAttention-3: PyPI's ``fa3-fwd``, and the build from its authors' repository. The first has no fp16."""
HEAD_DIM = 64
"""CogVideoX's head dimension."""
HEAD_DIMS = (32, HEAD_DIM)
"""Head dimensions that the kernels support; small test models have the first."""
NEAR = 0.02
"""Largest relative error, compared with float32, at which the kernels are used; that of bf16 is about 0.004."""
TOO_OFTEN = 0.05
"""Fraction of the work that may be recomputed. At this fraction, a running maximum is as fast (7.6 ms to 6.85, NOTES), and
the user is notified."""


@cache
def flash_3():
    """Returns FlashAttention-3's function, or None."""
    for name in FLASH_3:
        try:
            return import_module(name).flash_attn_func
        except (ImportError, OSError):  # absent, or built for another torch
            continue
    return None


@cache
def is_hopper(device: torch.device) -> bool:
    """Returns whether this is a GPU that FlashAttention-3 and the kernels are written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def uses_flash_3(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether FlashAttention-3 supports such tensors here."""
    return dtype == torch.bfloat16 and is_hopper(device) and flash_3() is not None


def is_for_own(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether the kernels are written for such tensors."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim in HEAD_DIMS and is_hopper(device)


def is_own(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether the kernels compute attention of such tensors. They take scores in base two; see :func:`factors`."""
    return is_for_own(device, dtype, head_dim) and _declined is None and why_not_own(device, dtype) is None


_declined: str | None = None
"""Why this process does not use the kernels although they work here."""


def agree(device: torch.device, dtype: torch.dtype, head_dim: int, collect: Callable[[bool], list[bool]]) -> None:
    """Makes all ranks use the kernels, or none: queries that one rank scales for the kernels may be attended to on another.

    Args:
        device, dtype, head_dim: of this rank's tensors.
        collect: gathers a value from every rank; a collective.
    """
    global _declined
    mine = is_own(device, dtype, head_dim)
    if not all(collect(mine)) and mine:
        _declined = "another rank cannot use them"


def factors(head_dim: int, *, base_two: bool, fp8: bool) -> tuple[float, float]:
    """Returns the factors of queries and keys, applied before they are rounded so that scores need no scaling.

    In FP8 the factor is split between both: for normalised heads, 1 becomes 0.42, within FP8's most precise range. Below 0.037,
    FP8 starts to lose bits.
    """
    whole = math.log2(math.e) / math.sqrt(head_dim) if base_two else 1.0
    return (math.sqrt(whole), math.sqrt(whole)) if fp8 else (whole, 1.0)


def flash_attention_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention in bfloat16, and the log-sum-exp ``[batch, heads, tokens]``."""
    return flash_3()(query, key, value, return_attn_probs=True)[:2]


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


class Pieces:
    """Counts the tiles of 64 queries of a head that the kernels computed on a device, and how many of them were recomputed."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):
            self.twice = torch.zeros(1, dtype=torch.int32, device=device)
            self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu)
        self.all = self._asked = 0
        self._copied = torch.cuda.Event() if on_gpu else None
        self.needs_maximum = False
        """Whether recomputation was so frequent that a kernel with a running maximum is faster. It stays set."""

    def look(self) -> None:
        """Updates :attr:`needs_maximum` from an earlier count, without synchronizing with the device."""
        if self._copied and not self._copied.query():
            return
        self.needs_maximum |= self._seen.item() > TOO_OFTEN * self._asked
        self._seen.copy_(self.twice, non_blocking=True)
        self._asked = self.all
        if self._copied:
            self._copied.record()

    def share_of_twice(self) -> float:
        """Returns the fraction of tiles that were recomputed, and resets the counts."""
        share = self.twice.item() / max(self.all, 1)
        self.twice.zero_()
        self._seen.zero_()
        self.all = 0
        return share


pieces_on = cache(Pieces)
"""By device."""


def note_of_twice(device: torch.device) -> str | None:
    """Returns a note for the user if the kernels recomputed much since the last call, else None."""
    share = pieces_on(device).share_of_twice() if is_hopper(device) else 0.0
    if share <= TOO_OFTEN:
        return None
    then = ", until the kernel for such scores took over" if pieces_on(device).needs_maximum else ""
    return f"{share:.0%} of attention was computed twice, as its scores are out of the fast kernel's range{then}: slower, but as accurate"


def attend_anew(query, key, value, result, log_sums, failed: torch.Tensor) -> None:
    """Recomputes the tiles that have ``failed`` rows with a running maximum, and counts them.

    Args:
        query, key, value, result, log_sums: of the first kernel.
        failed: number of failed rows of each tile, ``[batch * heads * tiles]``.
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
    """Computes attention with :mod:`parallel_backend.cogvideox.kernels.attention_hopper`.

    Args:
        query, key: in the dtype of ``value`` or e4m3, scaled for scores in base two; see :func:`factors`.
        value: in bfloat16 or float16.
    Returns:
        Attention in the dtype of ``value``, and the natural log-sum-exp ``[batch, heads, tokens]``.
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
    """Returns why the kernels do not work on a Hopper GPU in this dtype, in one line, or None.

    Tested once with a few tokens.
    """
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
    """Compiles and tests the kernels if they support such tensors.

    It takes a few seconds, best spent while something else runs.
    """
    note(device, dtype, head_dim, fp8=fp8)


def attend_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with the kernels, in FP8 if queries and keys are."""
    return own_attention(query, key, value)[0]


def attend_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with FlashAttention-3."""
    return flash_attention_3(query, key, value)[0]


def attend_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with torch."""
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def alone(attend: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention on one rank, for tensors ``[batch, 1, tokens, heads, head_dim]`` in the layout for several ranks."""
    return attend(*(states.squeeze(1) for states in (query, key, value))).unsqueeze(1)


def attention_of(device: torch.device, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> Attention:
    """Returns the attention function for such tensors."""
    if is_own(device, dtype, head_dim):
        return attend_own
    return attend_flash if uses_flash_3(device, dtype) else attend_torch


def for_blocks(states: torch.Tensor, head_dim: int, *, fp8: bool) -> tuple[Attention, dict[str, bool]]:
    """Returns the attention function of a forward pass, and the related arguments of :func:`.block.forward`.

    Args:
        states: of the forward pass, for device and dtype.
        head_dim: of the model.
        fp8: whether to use FP8 if it is supported.
    """
    kind = states.device, states.dtype, head_dim
    own = is_own(*kind)
    if own:
        pieces_on(states.device).look()
    return attention_of(*kind), {"base_two": own, "fp8": own and fp8}


def note_of_values(device: torch.device) -> str | None:
    """Returns a note for the user if FP8 attention keeps values in 16 bits, else None."""
    from . import attention_fp8

    reason = attention_fp8.why_not(device)
    return f"attention's values are not in FP8, which is slower: {reason}" if reason else None


def note(device: torch.device, dtype: torch.dtype, head_dim: int, *, fp8: bool) -> str | None:
    """Returns a note for the user if another attention replaces the kernels or FP8, else None."""
    if is_own(device, dtype, head_dim):
        return note_of_values(device) if fp8 else None
    reason = (_declined or why_not_own(device, dtype)) if is_for_own(device, dtype, head_dim) else None
    if fp8:
        because = f": {reason}" if reason else ""
        return f"attention is not in FP8: that needs a Hopper GPU, bf16 or fp16, and Triton 3.6 or newer{because}"
    instead = "FlashAttention-3's" if uses_flash_3(device, dtype) else "torch's own"
    return f"attention is {instead}, which is slower than this pack's: {reason}" if reason else None
