"""The kernels of :mod:`.kernels`; imported where Triton is there and not before."""

import triton
import triton.language as tl


@triton.jit
def spread_row(row, tokens, heads, heads_of_rank):
    """Where a head of a token, counted as they come, stands once heads are laid out for ranks."""
    batch, token, head = row // (tokens * heads), row // heads % tokens, row % heads
    rank = head // heads_of_rank
    return ((batch * (heads // heads_of_rank) + rank) * tokens + token) * heads_of_rank + head % heads_of_rank


@triton.jit
def norm_rotate_kernel(
    states, result, weight, bias, cosines, sines, factor,
    rows, tokens, heads, heads_of_rank, epsilon,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """See ``norm_rotate``; a row is one head of one token, computed in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, FEATURES)
    at = row[:, None] * FEATURES + column
    there = (row < rows)[:, None]
    value = tl.load(states + at, mask=there, other=0.0).to(tl.float32)
    value -= tl.sum(value, 1)[:, None] / FEATURES
    value *= tl.rsqrt(tl.sum(value * value, 1) / FEATURES + epsilon)[:, None]
    value = value * tl.load(weight + column).to(tl.float32) + tl.load(bias + column).to(tl.float32)
    if ROTATES:
        table = (row // heads % tokens)[:, None] * FEATURES + column
        cosine, sine = tl.load(cosines + table, mask=there, other=0.0), tl.load(sines + table, mask=there, other=0.0)
        first, second = tl.split(tl.reshape(value, (ROWS, FEATURES // 2, 2)))
        turned = tl.reshape(tl.join(-second, first), (ROWS, FEATURES))
        value = value * cosine + turned * sine
    target = spread_row(row, tokens, heads, heads_of_rank)
    tl.store(result + target[:, None] * FEATURES + column, (value * factor).to(result.dtype.element_ty), mask=there)


@triton.jit
def swap_kernel(states, result, first, second, words, BLOCK: tl.constexpr):
    """See ``swap``; a program copies one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    target = (row // (first * second) * second + row % second) * first + row // second % first
    there = column < words
    tl.store(result + target * words + column, tl.load(states + row * words + column, mask=there), mask=there)


@triton.jit
def gelu_quantize_kernel(rows, result, scales, features, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """See ``gelu_quantize``; a program has a whole row in its registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < features
    value = tl.load(rows + row * features + column, mask=there, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
    value = value * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh x) is the sigmoid of 2 x
    scale = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST) / LARGEST
    tl.store(result + row * features + column, (value / scale).to(result.dtype.element_ty), mask=there)
    tl.store(scales + row, scale)
