"""A block's operations between its matrix products and attention, in Triton, each in one pass over memory.

Imported only if Triton is installed. Kernels are specialised for a model's features but not for sizes. So a few kernels,
compiled in seconds and cached on disk, serve every video and plan.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .block_torch import CONDITIONS, FP8, GATE, INT8, LARGEST_OF, SCALE, SHIFT, SMALLEST, Inputs
from .int8_product import multiply, parts

WIDE = 4096
"""Features per token above which a program uses more warps; the fastest numbers were measured on an H200 (NOTES)."""


@triton.jit(do_not_specialize=["tokens", "text"])
def token_kernel(
    states, factors, update, gates, sums, weight, bias, conditions, result, scales, tokens, text, epsilon,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, GATE: tl.constexpr,
    PRODUCT: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, AFFINE: tl.constexpr, GELU: tl.constexpr, ROUNDS: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Processes one token of one sample, with all features in float32 registers.

    Flags select the steps: scaling a product in int32, adding a gated update, normalising and modulating, GELU, and quantising to
    FP8 or int8.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < FEATURES
    at = row * FEATURES + column
    kind = row // tokens * (KINDS * FEATURES) + tl.where(row % tokens < text, KINDS // 2 * FEATURES, 0) + column
    value = tl.load(states + at, mask=there, other=0.0).to(tl.float32)
    if PRODUCT:
        value *= tl.load(factors + row) * tl.load(weight + column, mask=there, other=0.0)
        if AFFINE:
            value += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        gate = tl.load(gates + kind + GATE * FEATURES, mask=there, other=0.0).to(tl.float32)
        value += gate * tl.load(update + at, mask=there, other=0.0).to(tl.float32)
        tl.store(sums + at, value.to(sums.dtype.element_ty), mask=there)
    if NORMS:
        value = tl.where(there, value - tl.sum(value, 0) / FEATURES, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, 0) / FEATURES + epsilon)
        if AFFINE:
            value *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
            value += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
        value *= 1 + tl.load(conditions + kind + SCALE * FEATURES, mask=there, other=0.0).to(tl.float32)
        value += tl.load(conditions + kind + SHIFT * FEATURES, mask=there, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh x) is the sigmoid of 2 x
    if ROUNDS:
        largest = tl.abs(value)
        if result.dtype.element_ty == tl.int8:  # has no NaN, and a maximum leaves NaNs out: the scale must not be finite
            largest = tl.where(value == value, largest, float("inf"))
        scale = tl.maximum(tl.max(largest, 0), SMALLEST)
        if result.dtype.element_ty == tl.int8:
            scale = tl.div_rn(scale, LARGEST)
            value = tl.div_rn(value, scale)
            value = value + 12582912.0 - 12582912.0  # a sum near 1.5 * 2**23 has no fraction: it was rounded, ties to even
        else:
            scale /= LARGEST
            value /= scale
        tl.store(scales + row, scale)
    if (PRODUCT or NORMS) or (GELU or ROUNDS):  # Triton 3.2 takes two at a time
        tl.store(result + at, value.to(result.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "heads", "heads_of_part", "own_first", "own_parts"])
def head_kernel(
    states, result, own, weight, bias, cosines, sines, factor, tokens, heads, heads_of_part, own_first, own_parts, own_sample, own_part, epsilon,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROTATES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """See ``normal_heads``. A program processes all heads of one token, in float32."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = column < FEATURES
    there = (head < heads)[:, None] & inside[None, :]
    value = tl.load(states + (row * heads + head[:, None]) * FEATURES + column, mask=there, other=0.0).to(tl.float32)
    value = tl.where(inside[None, :], value - tl.sum(value, 1)[:, None] / FEATURES, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 1) / FEATURES + epsilon)[:, None]
    value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    token = row % tokens
    if ROTATES:
        first, second = tl.split(tl.reshape(value, (BLOCK, WIDTH // 2, 2)))
        turned = tl.reshape(tl.join(-second, first), (BLOCK, WIDTH))
        value *= tl.load(cosines + token * FEATURES + column, mask=inside, other=0.0)
        value += turned * tl.load(sines + token * FEATURES + column, mask=inside, other=0.0)
    sample, part, inner = row // tokens, head // heads_of_part, token * heads_of_part + head % heads_of_part
    target = result + ((sample * (heads // heads_of_part) + part) * (tokens * heads_of_part) + inner) * FEATURES
    if OWN:
        place = own + sample * own_sample + (part - own_first).to(tl.int64) * own_part + inner * FEATURES
        target = tl.where((part >= own_first) & (part < own_first + own_parts), place, target)
    tl.store(target[:, None] + column, (value * factor).to(result.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["inner", "outer", "own_first", "own_parts"])
def swap_kernel(
    states, result, own, inner, outer, own_first, own_parts, own_sample, own_part, own_row,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Copies rows of words, one a program, from ``[batch, outer, inner, words]`` to ``[batch, inner, outer, words]``.

    Rows whose inner index is one of ``own_parts`` from ``own_first`` on go to ``own`` instead, whose strides are given in words.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < WORDS
    sample, before, after = row // (outer * inner), row // inner % outer, row % inner
    target = result + ((sample * inner + after) * outer + before) * WORDS
    if OWN:
        place = own + sample * own_sample + (after - own_first) * own_part + before * own_row
        target = tl.where((after >= own_first) & (after < own_first + own_parts), place, target)
    tl.store(target + column, tl.load(states + row * WORDS + column, mask=there), mask=there)


def swap(states: torch.Tensor, result: torch.Tensor, own: torch.Tensor | None = None, first: int = 0) -> None:
    """Launches ``swap_kernel``.

    Args:
        states: ``[batch, outer, inner, features]``.
        result: ``[batch, inner, outer, features]``.
        own: ``[batch, count, outer, features]`` with contiguous features, or None.
        first: inner index of what is written to ``own`` first.
    """
    batch, outer, inner, _ = states.shape
    states = states.contiguous()
    states, result, target = (each.view(torch.int32) for each in (states, result, result if own is None else own))
    words = states.shape[-1]
    swap_kernel[(batch * outer * inner,)](
        states, result, target, inner, outer, first, target.shape[1], *target.stride()[:3],
        WORDS=words, BLOCK=triton.next_power_of_2(words), OWN=own is not None, num_warps=4,
    )  # fmt: skip


def constants(features: int, rounded: torch.dtype | None) -> dict[str, int | float | bool | None]:
    """Returns the constants of ``token_kernel`` that follow from the features, and from the dtype that tokens are rounded to or None."""
    block = triton.next_power_of_2(features)
    tokens = {"FEATURES": features, "BLOCK": block, "KINDS": CONDITIONS, "SHIFT": SHIFT, "SCALE": SCALE, "GATE": GATE}
    rounding = {"ROUNDS": rounded is not None, "LARGEST": LARGEST_OF.get(rounded), "SMALLEST": SMALLEST}
    return {**tokens, **rounding, "num_warps": 8 if block > WIDE else 2 if rounded else 4}


def int8_product(
    layer, states: torch.Tensor, scales: torch.Tensor, *, gelu=False, rounded: torch.dtype | None = None
) -> Inputs:
    """Multiplies int8 tokens with an int8 layer's weight, a few rows at a time. Each product is scaled in one pass, with what follows.

    Args:
        layer: an ``Int8Linear``.
        states: ``[batch, tokens, features]``.
        scales: of each token, ``[batch * tokens, 1]``.
        gelu: whether GELU is applied.
        rounded: dtype that the result is rounded to, or None for the layer's dtype.
    Returns:
        The inputs of the following layer.
    """
    rows, features = states.flatten(0, 1), len(layer.weight)
    result = rows.new_empty(len(rows), features, dtype=rounded or layer.dtype)
    of_result = torch.empty_like(scales) if rounded else None
    for part in parts(len(rows), features):
        product = multiply(rows[part], layer.weight)
        token_kernel[(len(product),)](
            product, scales[part], None, None, None, layer.scales, layer.bias, None, result[part],
            of_result[part] if rounded else None, len(product), 0, 0.0,
            PRODUCT=True, ADDS=False, NORMS=False, AFFINE=layer.bias is not None, GELU=gelu, **constants(features, rounded),
        )  # fmt: skip
        del product  # the next one takes its memory, of which much is still in the GPU's cache
    result = result.unflatten(0, states.shape[:2])
    return (result, of_result) if rounded else (result,)


class TritonBlockOps:
    """See :class:`.block_torch.TorchBlockOps`. Layers that take rounded tokens get them."""

    def modulate(self, states, norm, conditions, text, *, rounded):
        return self._pass(states, norm=norm, conditions=conditions, text=text, rounded=rounded)[1]

    def add(self, states, update, conditions, text):
        return self._pass(states, update=update, gates=conditions, text=text)[0]

    def add_and_modulate(self, states, update, before, norm, conditions, text, *, rounded):
        return self._pass(states, update=update, gates=before, norm=norm, conditions=conditions, text=text, rounded=rounded)

    def inputs(self, states, *, rounded):
        return self._pass(states, rounded=rounded)[1] if rounded else (states,)

    def gelu(self, layer, inputs, approximate, *, rounded):
        if approximate != "tanh":  # CogVideoX's is tanh
            return self.inputs(F.gelu(layer(*inputs), approximate=approximate), rounded=rounded)
        if rounded is INT8 and inputs[0].dtype is INT8:
            return int8_product(layer, *inputs, gelu=True, rounded=rounded)
        if rounded:
            return self._pass(layer(*inputs), gelu=True, rounded=rounded)[1]
        (states,) = inputs
        if type(layer) is not torch.nn.Linear or layer.bias is None or not states.is_cuda:
            return (torch.ops.aten.gelu_(layer(states), approximate="tanh"),)  # in place: the layer has just made it
        # One cuBLAS kernel for the product and GELU; CPUs use another approximation.
        product = torch.ops.aten._addmm_activation(layer.bias, states.flatten(0, 1), layer.weight.t(), use_gelu=True)
        return (product.unflatten(0, states.shape[:2]),)

    def _pass(
        self,
        states: torch.Tensor,
        *,
        update=None,
        gates=None,
        norm=None,
        conditions=None,
        text: int = 0,
        gelu=False,
        rounded=None,
    ) -> tuple[torch.Tensor | None, Inputs]:
        """Runs ``token_kernel`` on all tokens.

        Returns:
            The sum, if an ``update`` is added, and the inputs of the following layers.
        """
        states = states.contiguous()
        batch, tokens, features = states.shape
        adds, norms = update is not None, norm is not None
        sums = torch.empty_like(states) if adds else None
        result = torch.empty_like(states, dtype=rounded or states.dtype) if norms or gelu or rounded else None
        scales = states.new_empty(batch * tokens, 1, dtype=torch.float32) if rounded else None
        affine = norms and norm.weight is not None
        token_kernel[(batch * tokens,)](
            states, None, update.contiguous() if adds else states, gates, sums, norm.weight if affine else None, norm.bias if affine else None,
            conditions, result, scales, tokens, text, norm.eps if norms else 0.0,
            PRODUCT=False, ADDS=adds, NORMS=norms, AFFINE=affine, GELU=gelu, **constants(features, rounded),
        )  # fmt: skip
        return sums, tuple(part for part in (result, scales) if part is not None)

    def normal_heads(self, states, norm, tables, factor, *, fp8, parts, own=None):
        states = states.contiguous()
        batch, tokens, heads, features = states.shape
        result = states.new_empty(batch, parts, tokens, heads // parts, features, dtype=FP8 if fp8 else states.dtype)
        target, first = (own.memory, own.first) if own else (result, 0)
        cosines, sines = tables or (None, None)
        block = triton.next_power_of_2(heads)
        head_kernel[(batch * tokens,)](
            states, result, target, norm.weight, norm.bias, cosines, sines, factor, tokens, heads, heads // parts,
            first, target.shape[1], *target.stride()[:2], norm.eps,
            FEATURES=features, WIDTH=triton.next_power_of_2(features), BLOCK=block, ROTATES=tables is not None, OWN=own is not None,
            num_warps=4,
        )  # fmt: skip
        return result

    def spread(self, states, parts, own=None):
        states = states.unflatten(2, (parts, -1))
        if parts == 1:
            return states.transpose(1, 2)
        batch, tokens, _, *shape = states.shape
        result = states.new_empty(batch, parts, tokens, *shape)
        swap(states.flatten(3), result.flatten(3), own and own.memory.flatten(3), own.first if own else 0)
        return result

    def join(self, states):
        joined = states.transpose(1, 2)
        if not joined.is_contiguous():
            joined = torch.empty_like(joined, memory_format=torch.contiguous_format)
            swap(states.flatten(3), joined.flatten(3))
        return joined.flatten(2)

    def put(self, states, target):
        states, target = states.flatten(1), target.flatten(1)
        swap(states[None, :, None], states[None, None], target[None, None])
