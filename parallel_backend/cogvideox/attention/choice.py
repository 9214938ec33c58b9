"""Chooses the attention of a full sequence: this pack's kernels on Hopper GPUs, else FlashAttention-3, else torch's.

Tensors are ``[batch, tokens, heads, head_dim]``, the layout of the projections' outputs.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

from . import hopper_fp8
from .hopper import attend_own, why_not_own
from .recomputed_tiles import TOO_OFTEN, pieces_on
from .torch_attention import HEAD_DIM, Attention, attend_torch

FLASH_3 = ("fa3_fwd_interface", "flash_attn_interface")
"""Modules of FlashAttention-3: PyPI's ``fa3-fwd``, and the build from its authors' repository. The first has no fp16."""
HEAD_DIMS = (32, HEAD_DIM)
"""Head dimensions that the kernels support; small test models have the first."""


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
    """Returns whether the kernels compute attention of such tensors. They take scores in base two; see :func:`.operands.factors`."""
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


def flash_attention_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention in bfloat16, and the log-sum-exp ``[batch, heads, tokens]``."""
    return flash_3()(query, key, value, return_attn_probs=True)[:2]


def note_of_twice(device: torch.device) -> str | None:
    """Returns a note for the user if the kernels recomputed much since the last call, else None."""
    share = pieces_on(device).share_of_twice() if is_hopper(device) else 0.0
    if share <= TOO_OFTEN:
        return None
    then = ", until the kernel for such scores took over" if pieces_on(device).needs_maximum else ""
    return f"{share:.0%} of attention was computed twice, as its scores are out of the fast kernel's range{then}: slower, but as accurate"


def prepare(device: torch.device, dtype: torch.dtype, head_dim: int, *, fp8: bool = False) -> None:
    """Compiles and tests the kernels if they support such tensors.

    It takes a few seconds, best spent while something else runs.
    """
    note(device, dtype, head_dim, fp8=fp8)


def attend_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with FlashAttention-3."""
    return flash_attention_3(query, key, value)[0]


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
    reason = hopper_fp8.why_not(device)
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
