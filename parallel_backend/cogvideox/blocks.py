"""CogVideoX's blocks on the joint sequence of text and video tokens, all of it or one rank's chunk, and the same compiled.

diffusers' block keeps text and video apart and joins them anew for every layer. Here they stay joined, with diffusers' modules
and weights: one tensor in, one out, whatever a chunk holds of each. Compiled, what is between the matrix products becomes a
few kernels; batch and tokens stay open, so that a size is compiled once and for all.
"""

from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F

from ..errors import first_line
from . import kernels
from .attention import factors
from .fp8 import Fp8Linear
from .step_cache import StepCache
from .trials import once

WORTH_COMPILING = 2**30
"""Bytes of a transformer whose steps are long enough for the seconds that compiling takes."""


def modulate(norm, tokens: torch.Tensor, temb: torch.Tensor, is_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises, scales and shifts tokens by what ``temb`` says of their kind; also the gate of what is made of them."""
    parts = [part[:, None] for part in norm.linear(norm.silu(temb)).chunk(6, dim=1)]
    shift, scale, gate = (torch.where(is_text[:, None], text, video) for video, text in zip(parts[:3], parts[3:]))
    return norm.norm(tokens) * (1 + scale) + shift, gate


@torch.library.custom_op("cogvideox_xdit::linear_gelu", mutates_args=(), device_types="cuda")
def linear_gelu(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer and GELU (tanh) of ``[batch, tokens, features]`` in one kernel, which a compiler would take apart."""
    product = torch.ops.aten._addmm_activation(bias, tokens.flatten(0, 1), weight.t(), use_gelu=True)
    return product.unflatten(0, tokens.shape[:2])


@linear_gelu.register_kernel("cpu")
def _(tokens, weight, bias):
    return F.gelu(F.linear(tokens, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(tokens, weight, bias):
    return tokens.new_empty(*tokens.shape[:2], weight.shape[0])


def feed_forward(layers, tokens: torch.Tensor) -> torch.Tensor:
    """A block's feed-forward; compiled, GELU is one kernel with the product before it, or with the rounding to FP8 after it."""
    first, second = layers.net[0], layers.net[2]
    if not torch.compiler.is_compiling() or first.approximate != "tanh" or first.proj.bias is None:
        return layers(tokens)
    if type(second) is Fp8Linear:
        rows, scales = kernels.gelu_quantize(first.proj(tokens).flatten(0, 1))
        return second(rows.unflatten(0, tokens.shape[:2]), scales)
    if type(first.proj) is torch.nn.Linear:
        return second(linear_gelu(tokens, first.proj.weight, first.proj.bias))
    return layers(tokens)


def normal_heads(norm, states: torch.Tensor, tables, factor: float, fp8: bool, ranks: int) -> torch.Tensor:
    """Queries or keys ``[batch, tokens, heads, head_dim]``, normalised, rotated, times ``factor``, in FP8 if so, and spread."""
    function = kernels.norm_rotate if torch.compiler.is_compiling() else kernels.norm_rotate_in_steps
    return function(states, norm.weight, norm.bias, norm.eps, list(tables or ()), factor, fp8, ranks)


def swap(states: torch.Tensor) -> torch.Tensor:
    """``[batch, first, second, features]`` as ``[batch, second, first, features]``."""
    if 1 in states.shape[1:3]:
        return states.reshape(states.shape[0], states.shape[2], states.shape[1], -1)
    return kernels.swap(states) if torch.compiler.is_compiling() else states.transpose(1, 2).contiguous()


def forward(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
    """The forward of a ``CogVideoXBlock``, called as diffusers calls it.

    Args:
        block: with diffusers' modules.
        hidden_states: joint tokens ``[batch, tokens, features]``, of text and video.
        encoder_hidden_states: empty; handed back.
        temb: ``[batch, features]``.
        image_rotary_emb: tables for the joint tokens, with angle 0 for text, or None.
        attention_kwargs: ``is_text`` ``[tokens]``; and of attention the function ``attend``, whether scores are to be in
            ``base_two`` and queries and keys in ``fp8``, and the ``ranks`` among whom heads are spread for it.
    """
    about, attention = attention_kwargs, block.attn1
    ranks = about["ranks"]
    tokens, gate = modulate(block.norm1, hidden_states, temb, about["is_text"])
    query, key, value = (
        project(tokens).unflatten(2, (attention.heads, -1)) for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    fp8 = about["fp8"]
    of_query, of_key = factors(attention.norm_q.normalized_shape[0], base_two=about["base_two"], fp8=fp8)
    query = normal_heads(attention.norm_q, query, image_rotary_emb, of_query, fp8, ranks)
    key = normal_heads(attention.norm_k, key, image_rotary_emb, of_key, fp8, ranks)
    value = swap(value.unflatten(2, (ranks, -1)).flatten(3)).view(query.shape)
    attended = about["attend"](query, key, value)
    hidden_states = hidden_states + gate * attention.to_out[0](swap(attended.flatten(3)).flatten(2))
    tokens, gate = modulate(block.norm2, hidden_states, temb, about["is_text"])
    return hidden_states + gate * feed_forward(block.ff, tokens), encoder_hidden_states


@cache
def compiled_forward():
    """:func:`forward`, compiled when it is first called. One for all blocks: their weights are its arguments."""
    kernels.keep_kernels()
    return torch.compile(forward, dynamic=True)


def use(transformer, *, compiled: bool = False) -> None:
    """Gives every block of a transformer this module's forward."""
    for block in transformer.transformer_blocks.children():
        use_in(block, compiled=compiled)


def use_in(block, *, compiled: bool) -> None:
    """Gives one block this module's forward."""
    function = compiled_forward() if compiled else forward

    def unless_cached(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
        """Outside of what is compiled, which must not see a cache that is another one for every job."""
        cache: StepCache | None = attention_kwargs["cache"]
        if cache is not None and cache.reusing:
            return hidden_states, encoder_hidden_states
        seen = {name: value for name, value in attention_kwargs.items() if name != "cache"}
        return function(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, seen)

    block.forward = MethodType(unless_cached, block)


@once
def why_not_compiled(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, in one line, or None: tried once with a small function."""
    kernels.keep_kernels()
    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # Triton, a C compiler or Python's headers may be missing; each fails in its own way
        return first_line(error)
    return None
