"""CogVideoX's blocks on the joint sequence of text and video tokens, all of it or one rank's chunk, and the same compiled.

diffusers' block keeps text and video apart and joins them anew for every layer. Here they stay joined, with diffusers' modules
and weights: one tensor in, one out, whatever a chunk holds of each. Compiled, what is between the matrix products becomes a
few kernels; batch and tokens stay open, so that a size is compiled once and for all.
"""

import os
from functools import cache
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F

from .step_cache import StepCache

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogvideox-xdit" / "compiled"
"""Where compiled kernels are kept, unless TORCHINDUCTOR_CACHE_DIR says otherwise."""

WORTH_COMPILING = 2**30
"""Bytes of a transformer whose steps are long enough for the seconds that compiling takes."""


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of ``[batch, tokens, heads, head_dim]`` by tables ``[tokens, head_dim]``; computed in float32."""
    exact = states.float()
    first, second = exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (exact * cosines[:, None] + turned * sines[:, None]).to(states.dtype)


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
    """A block's feed-forward; compiled, its first layer and GELU are one kernel, which spares two passes over memory."""
    first = layers.net[0]
    fused = type(first.proj) is torch.nn.Linear and first.proj.bias is not None and first.approximate == "tanh"
    if torch.compiler.is_compiling() and fused:
        return layers.net[2](linear_gelu(tokens, first.proj.weight, first.proj.bias))
    return layers(tokens)


def forward(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
    """The forward of a ``CogVideoXBlock``, called as diffusers calls it.

    Args:
        block: with diffusers' modules.
        hidden_states: joint tokens ``[batch, tokens, features]``, of text and video.
        encoder_hidden_states: empty; handed back.
        temb: ``[batch, features]``.
        image_rotary_emb: tables for the joint tokens, with angle 0 for text, or None.
        attention_kwargs: ``is_text`` ``[tokens]``, and the function ``attend``.
    """
    is_text, attend, attention = attention_kwargs["is_text"], attention_kwargs["attend"], block.attn1
    tokens, gate = modulate(block.norm1, hidden_states, temb, is_text)
    query, key, value = (
        project(tokens).unflatten(2, (attention.heads, -1)) for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    if attention.norm_q is not None:
        query, key = attention.norm_q(query), attention.norm_k(key)
    if image_rotary_emb is not None:
        query, key = (rotate(states, *image_rotary_emb) for states in (query, key))
    hidden_states = hidden_states + gate * attention.to_out[0](attend(query, key, value).flatten(2))
    tokens, gate = modulate(block.norm2, hidden_states, temb, is_text)
    return hidden_states + gate * feed_forward(block.ff, tokens), encoder_hidden_states


def keep_kernels() -> None:
    """Has whatever is compiled from now on keep its kernels on disk."""
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))


@cache
def compiled_forward():
    """:func:`forward`, compiled when it is first called. One for all blocks: their weights are its arguments."""
    keep_kernels()
    return torch.compile(forward, dynamic=True)


def use(transformer, *, compiled: bool = False) -> None:
    """Gives every block of a transformer this module's forward."""
    function = compiled_forward() if compiled else forward

    def unless_cached(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
        """Outside of what is compiled, which must not see a cache that is another one for every job."""
        cache: StepCache | None = attention_kwargs["cache"]
        if cache is not None and cache.reusing:
            return hidden_states, encoder_hidden_states
        seen = {name: attention_kwargs[name] for name in ("is_text", "attend")}
        return function(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, seen)

    for block in transformer.transformer_blocks:
        block.forward = MethodType(unless_cached, block)


@cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, in one line, or None: tried once with a small function."""
    keep_kernels()
    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # Triton, a C compiler or Python's headers may be missing; each fails in its own way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    return None
