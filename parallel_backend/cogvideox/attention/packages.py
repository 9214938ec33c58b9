"""Attention of packages that are used where they are installed. Each is imported when it is first called."""

from functools import cache
from importlib import import_module

import torch

FLASH_3 = ("fa3_fwd_interface", "flash_attn_interface")
"""Modules of FlashAttention-3: PyPI's ``fa3-fwd``, and the build from its authors' repository. The first has no fp16."""


@cache
def flash_3():
    """Returns FlashAttention-3's function.

    Raises:
        ImportError: if there is none, or it was built for another torch.
    """
    for name in FLASH_3:
        try:
            return import_module(name).flash_attn_func
        except (ImportError, OSError) as error:
            reason = error
    raise ImportError(reason)


def flash_3_with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp with FlashAttention-3."""
    return flash_3()(query, key, value, return_attn_probs=True)[:2]


def attend_flash_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with FlashAttention-3."""
    return flash_3_with_sums(query, key, value)[0]


def flash_2_with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp with the package of FlashAttention-2."""
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value, return_attn_probs=True)[:2]


def attend_flash_2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with the package of FlashAttention-2."""
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value)


def attend_int8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with all operands and probabilities in int8, by comfy-kitchen."""
    from comfy_kitchen import int8_attention

    return int8_attention(*(states.transpose(1, 2) for states in (query, key, value))).transpose(1, 2)


def attend_sage(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with queries and keys in int8, by SageAttention 1 or 2.

    The mean of the keys is taken out of them here: version 1 does it in the caller's tensor, and a pipeline keeps its keys.
    """
    from sageattention import sageattn

    return sageattn(query, key - key.mean(1, keepdim=True), value, tensor_layout="NHD", smooth_k=False)
