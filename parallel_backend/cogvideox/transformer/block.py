"""CogVideoX's blocks on the joint sequence of text and video tokens, or on one rank's chunk of it.

diffusers' block keeps text and video separate and concatenates them for every layer. Here they stay joined, with diffusers'
modules and weights: one tensor in, one out, whatever mix a chunk contains. Operations between the matrix products are torch's
or, on GPUs, a few fused kernels that read and write each token once.
"""

from types import MethodType

import torch

from ..attention.function import KEY, QUERY, VALUE
from ..attention.operands import factors
from ..kernels.block_torch import CONDITIONS, Inputs, Own, TorchBlockOps, keep_kernels
from ..kernels.probe import is_near, once
from .quantized_linear import QuantizedLinear
from .step_cache import StepCache

WORTH_COMPILING = 2**30
"""Bytes of the transformer from which on steps are long enough to justify the seconds of compiling kernels."""
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Largest relative error, compared with torch, at which compiled kernels are used."""


def rounded_for(layer) -> torch.dtype | None:
    """Returns the dtype in which a linear layer takes tokens with a scale each, or None if it takes them as they are."""
    return layer.takes if isinstance(layer, QuantizedLinear) else None


def feed_forward(layers, inputs: Inputs, kernels) -> torch.Tensor:
    """Runs a block's feed-forward, without its dropout."""
    first, second = layers.net[0], layers.net[2]
    return second(*kernels.gelu(first.proj, inputs, first.approximate, rounded=rounded_for(second)))


def forward(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
    """The forward of a ``CogVideoXBlock``, with diffusers' signature.

    Args:
        block: with diffusers' modules, and ``kernels``.
        hidden_states: joint tokens ``[batch, tokens, features]`` of text and video.
        encoder_hidden_states: empty; returned as is.
        temb: ``[batch, features]``.
        image_rotary_emb: tables for the joint tokens, with angle 0 for text; or None.
        attention_kwargs: ``text``: how many of the first tokens are text; ``cache``: the window's step cache or None; and for
            attention ``attend``: the function, ``base_two``: whether scores are in base two, ``fp8``: whether queries and keys
            are in FP8, ``parts``: the number of parts that heads are spread over. Where ranks write into each other's memory also
            ``own``: a function that returns the memory for this rank's own parts, and ``send``: one that sends values or keys to
            other ranks while what is left is computed.
    """
    about, kernels = attention_kwargs, block.kernels
    cache: StepCache | None = about["cache"]
    if cache is not None and cache.reusing:
        return hidden_states, encoder_hidden_states
    attention, text, parts, fp8 = block.attn1, about["text"], about["parts"], about["fp8"]
    first, second = (norm.linear(norm.silu(temb)) for norm in (block.norm1, block.norm2))
    inputs = kernels.modulate(hidden_states, block.norm1.norm, first, text, rounded=rounded_for(attention.to_q))
    of_query, of_key = factors(attention.norm_q.normalized_shape[0], base_two=about["base_two"], fp8=fp8)

    def heads(project) -> torch.Tensor:
        return project(*inputs).unflatten(2, (attention.heads, -1))

    def normal_heads(place: int, project, norm, factor: float) -> torch.Tensor:
        states = heads(project)
        return kernels.normal_heads(states, norm, image_rotary_emb, factor, fp8=fp8, parts=parts, own=own(place, states))

    own, send = about.get("own", nowhere), about.get("send", keep)
    value = heads(attention.to_v)
    value = kernels.spread(value, parts, own(VALUE, value))
    send(VALUE, value)
    key = normal_heads(KEY, attention.to_k, attention.norm_k, of_key)
    send(KEY, key)
    query = normal_heads(QUERY, attention.to_q, attention.norm_q, of_query)
    del inputs  # frees memory before the largest tensors are allocated
    attended = about["attend"](query, key, value)
    del query, key, value
    joined = kernels.join(attended)
    update = attention.to_out[0](*kernels.inputs(joined, rounded=rounded_for(attention.to_out[0])))
    del attended, joined
    hidden_states, inputs = kernels.add_and_modulate(
        hidden_states, update, first, block.norm2.norm, second, text, rounded=rounded_for(block.ff.net[0].proj)
    )
    del update
    return kernels.add(hidden_states, feed_forward(block.ff, inputs, kernels), second, text), encoder_hidden_states


def nowhere(place: int, states: torch.Tensor) -> Own | None:
    """Returns no memory: see ``own`` of :func:`forward`."""


def keep(place: int, states: torch.Tensor) -> None:
    """Sends nothing before attention: see ``send`` of :func:`forward`."""


def attach(transformer) -> None:
    """Replaces the forward of every block of a transformer with this module's."""
    for block in transformer.transformer_blocks.children():
        block.forward, block.kernels = MethodType(forward, block), TorchBlockOps()


def use(transformer, *, compiled: bool) -> None:
    """Makes every block use compiled kernels, or torch."""
    kernels = triton_kernels() if compiled else TorchBlockOps()
    for block in transformer.transformer_blocks.children():
        block.kernels = kernels


def triton_kernels():
    """Returns the fused kernels. Imports Triton, which is not available everywhere."""
    from ..kernels.block_triton import TritonBlockOps

    return TritonBlockOps()


@once
def why_not_compiled(device: torch.device, dtype: torch.dtype, features: int, head_dim: int, rotary: bool) -> str | None:
    """Returns why a model's kernels cannot be compiled for a device, in one line, or None.

    Tested once with a few tokens, which also compiles nearly all kernels that the model's blocks will use.
    """
    if device.type != "cuda":
        return "its kernels are for GPUs"
    keep_kernels()
    ours, expected = (
        tried(kernels, device, dtype, features, head_dim, rotary) for kernels in (triton_kernels(), TorchBlockOps())
    )
    if all(is_near(found, exact, NEAR[dtype]) for found, exact in zip(ours, expected)):
        return None
    return "their results are wrong with this version of Triton"


@torch.inference_mode()
def tried(kernels, device: torch.device, dtype: torch.dtype, features: int, head_dim: int, rotary: bool) -> list[torch.Tensor]:
    """Runs each kernel on a few tokens of two samples, of which the first token is text, and returns the results."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator).to(of)

    like = {"device": device, "dtype": dtype}
    norm, norm_head = torch.nn.LayerNorm(features, **like), torch.nn.LayerNorm(head_dim, **like)
    states, update = numbers(2, 3, features), numbers(2, 3, features)
    before, after = numbers(2, CONDITIONS * features), numbers(2, CONDITIONS * features)
    tables = (numbers(3, head_dim, of=torch.float32), numbers(3, head_dim, of=torch.float32)) if rotary else None
    heads = states.unflatten(2, (-1, head_dim))
    made = [*kernels.modulate(states, norm, before, 1, rounded=None), kernels.add(states, update, before, 1)]
    total, inputs = kernels.add_and_modulate(states, update, before, norm, after, 1, rounded=None)
    return [*made, total, *inputs, kernels.normal_heads(heads, norm_head, tables, 0.18, fp8=False, parts=1)]
