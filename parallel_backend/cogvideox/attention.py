"""Attention of a whole sequence: FlashAttention-3 where it is installed and the GPU is made for it, torch's own otherwise.

Tensors are ``[batch, tokens, heads, head_dim]``, as the projections give them. On a Hopper GPU torch's own is cuDNN's.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F

from .kernels import LARGEST, head_scales, largest_in_heads, quantize

Scales = list[torch.Tensor | None]
"""What queries, keys and values in FP8 are to be multiplied by: one number, one number, one a head ``[batch, heads]``."""
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scales], torch.Tensor]
FLASH_3 = ("fa3_fwd_interface", "flash_attn_interface")
"""Modules with FlashAttention-3: PyPI's ``fa3-fwd``, and what its authors' repository builds. The first has no fp16."""


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
    """Whether this is the kind of GPU that FlashAttention-3 is made for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def uses_flash_3(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention of such tensors is FlashAttention-3's."""
    return dtype == torch.bfloat16 and is_hopper(device) and flash_3() is not None


@torch.library.custom_op("cogvideox_xdit::flash_attention_3", mutates_args=())
def flash_attention_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in bfloat16 and its log-sum-exp ``[batch, heads, tokens]``; one operation to a compiler.

    ``scales`` are none, or those of query, key and value in FP8, each ``[batch, heads]``.
    """
    descale = dict(zip(("q_descale", "k_descale", "v_descale"), scales))
    return flash_3()(query, key, value, return_attn_probs=True, **descale)[:2]


@flash_attention_3.register_fake
def _(query, key, value, scales):
    batch, tokens, heads, _ = query.shape
    return torch.empty_like(query, dtype=torch.bfloat16), query.new_empty(batch, heads, tokens, dtype=torch.float32)


def bound(norm: torch.nn.LayerNorm) -> torch.Tensor:
    """The scale in FP8 of what a norm over ``n`` features gives, turned: a vector of length ``sqrt(n)`` before weight and bias.

    FP8 is a floating point, so the room that most numbers leave below the bound costs no precision.
    """
    weight, bias = (values.float().abs().max() for values in (norm.weight, norm.bias))
    return (norm.weight.numel() ** 0.5 * weight + 2**0.5 * bias) / LARGEST


def quantize_heads(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[batch, tokens, heads, head_dim]`` in FP8, and what each head is to be multiplied by, ``[batch, heads]``."""
    scales = head_scales(largest_in_heads(states))
    return quantize(states, scales[:, None, :, None]), scales


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-3, in FP8 where asked for, and its log-sum-exp."""
    if not fp8:
        return flash_attention_3(query, key, value, [])
    states, scales = zip(*(quantize_heads(states) for states in (query, key, value)))
    return flash_attention_3(*states, list(scales))


def attend_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: Scales) -> torch.Tensor:
    """FlashAttention-3 of every query to all keys, in FP8 where these are."""
    shape = query.shape[0], query.shape[2]
    descale = [] if scales[0] is None else [*(scale.expand(shape) for scale in scales[:2]), scales[2]]
    return flash_attention_3(query, key, value, descale)[0]


def attend_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: Scales) -> torch.Tensor:
    """torch's own attention."""
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def alone(attend: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The attention of one rank, which heads of ``[batch, 1, tokens, heads, head_dim]`` were spread to."""
    return attend(*(states.squeeze(1) for states in (query, key, value)), scales).unsqueeze(1)


def attention_of(device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention for such tensors: chosen outside of what is compiled, which cannot look for packages."""
    return attend_flash if uses_flash_3(device, dtype) else attend_torch
