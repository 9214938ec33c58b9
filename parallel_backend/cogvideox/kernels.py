"""What a compiler makes two or three passes over memory of, in one: kernels in Triton, each a custom operation.

Only compiled blocks on a GPU use them (:mod:`.blocks`), where Triton is there for certain. The same operations in torch's own
words, in which uncompiled blocks and CPUs do the work, are their implementations on a CPU.
"""

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = 1e-12
"""Below which a maximum counts as nothing to scale by."""


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of ``[batch, tokens, heads, head_dim]`` by tables ``[tokens, head_dim]``; computed in float32."""
    exact = states.float()
    first, second = exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (exact * cosines[:, None] + turned * sines[:, None]).to(states.dtype)


def quantize(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``states / scale`` in e4m3."""
    return (states.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, features]`` in e4m3, and what each row is to be multiplied by, ``[rows, 1]`` in float32."""
    exact = rows.float()
    scales = exact.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (exact / scales).to(FP8), scales


def spread(states: torch.Tensor, ranks: int) -> torch.Tensor:
    """``[batch, tokens, heads, head_dim]`` as it is sent to ``ranks``: ``[batch, ranks, tokens, heads / ranks, head_dim]``."""
    return states.unflatten(2, (ranks, -1)).transpose(1, 2).contiguous()


def for_ranks(states: torch.Tensor, ranks: int, dtype: torch.dtype | None) -> torch.Tensor:
    """Room for what :func:`spread` gives."""
    batch, tokens, heads, features = states.shape
    return states.new_empty(batch, ranks, tokens, heads // ranks, features, dtype=dtype or states.dtype)


@torch.library.custom_op("cogvideox_xdit::norm_rotate", mutates_args=(), device_types="cuda")
def norm_rotate(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    tables: list[torch.Tensor],
    scale: torch.Tensor | None,
    ranks: int,
) -> torch.Tensor:
    """Normalises each head of ``[batch, tokens, heads, head_dim]``, rotates its pairs, and lays them out for ``ranks``.

    Args:
        states: of queries or keys.
        weight, bias, epsilon: of the layer norm over a head.
        tables: cosines and sines ``[tokens, head_dim]`` in float32, or none.
        scale: of the result in e4m3, one number: it is divided by this. None keeps the dtype.
        ranks: among whom heads are spread.
    Returns:
        ``[batch, ranks, tokens, heads / ranks, head_dim]``.
    """
    import triton

    from .triton_kernels import norm_rotate_kernel

    states = states.contiguous()
    batch, tokens, heads, features = states.shape
    result = for_ranks(states, ranks, None if scale is None else FP8)
    rows, block = batch * tokens * heads, 64
    cosines, sines = tables or (states, states)
    norm_rotate_kernel[(triton.cdiv(rows, block),)](
        states, result, weight, bias, cosines, sines, states if scale is None else scale,
        rows, tokens, heads, heads // ranks, epsilon,
        FEATURES=features, ROWS=block, ROTATES=bool(tables), SCALES=scale is not None, num_warps=4,
    )  # fmt: skip
    return result


@norm_rotate.register_kernel("cpu")
def _(states, weight, bias, epsilon, tables, scale, ranks):
    normal = F.layer_norm(states, weight.shape, weight, bias, epsilon)
    turned = rotate(normal, *tables) if tables else normal
    return spread(turned if scale is None else quantize(turned, scale), ranks)


@norm_rotate.register_fake
def _(states, weight, bias, epsilon, tables, scale, ranks):
    return for_ranks(states, ranks, None if scale is None else FP8)


def largest_in_heads(states: torch.Tensor) -> torch.Tensor:
    """The greatest magnitude in each head of ``[batch, tokens, heads, head_dim]``: ``[batch, heads]`` in float32."""
    return states.abs().amax(dim=(1, 3)).float()


def head_scales(maxima: torch.Tensor) -> torch.Tensor:
    """What numbers of such maxima are to be divided by for e4m3."""
    return maxima.clamp(min=SMALLEST) / LARGEST


@torch.library.custom_op("cogvideox_xdit::head_maxima", mutates_args=(), device_types="cuda")
def head_maxima(states: torch.Tensor) -> torch.Tensor:
    """:func:`largest_in_heads`, reading every number once."""
    import triton

    from .triton_kernels import head_maxima_kernel

    states = states.contiguous()
    batch, tokens, heads, features = states.shape
    maxima, block = states.new_zeros(batch, heads, dtype=torch.float32), 256
    head_maxima_kernel[(triton.cdiv(tokens, block), heads, batch)](
        states, maxima, tokens, heads, FEATURES=features, TOKENS=block, num_warps=4
    )
    return maxima


@head_maxima.register_kernel("cpu")
def _(states):
    return largest_in_heads(states)


@head_maxima.register_fake
def _(states):
    return states.new_empty(states.shape[0], states.shape[2], dtype=torch.float32)


@torch.library.custom_op("cogvideox_xdit::quantize_spread", mutates_args=(), device_types="cuda")
def quantize_spread(states: torch.Tensor, scales: torch.Tensor, ranks: int) -> torch.Tensor:
    """``[batch, tokens, heads, head_dim]`` by ``[batch, heads]`` in e4m3, laid out as :func:`spread` does."""
    import triton

    from .triton_kernels import quantize_spread_kernel

    states = states.contiguous()
    batch, tokens, heads, features = states.shape
    result = for_ranks(states, ranks, FP8)
    rows, block = batch * tokens * heads, 64
    quantize_spread_kernel[(triton.cdiv(rows, block),)](
        states, result, scales.contiguous(), rows, tokens, heads, heads // ranks, FEATURES=features, ROWS=block, num_warps=4
    )
    return result


@quantize_spread.register_kernel("cpu")
def _(states, scales, ranks):
    return spread(quantize(states, scales[:, None, :, None]), ranks)


@quantize_spread.register_fake
def _(states, scales, ranks):
    return for_ranks(states, ranks, FP8)


@torch.library.custom_op("cogvideox_xdit::swap", mutates_args=(), device_types="cuda")
def swap(states: torch.Tensor) -> torch.Tensor:
    """``[batch, first, second, features]`` as ``[batch, second, first, features]``, copied a row at a time."""
    import triton

    from .triton_kernels import swap_kernel

    batch, first, second, features = states.shape
    words = states.contiguous().view(torch.int32)
    result = words.new_empty(batch, second, first, words.shape[-1])
    swap_kernel[(batch * first * second,)](
        words, result, first, second, words.shape[-1], BLOCK=triton.next_power_of_2(words.shape[-1]), num_warps=4
    )
    return result.view(states.dtype)


@swap.register_kernel("cpu")
def _(states):
    return states.transpose(1, 2).contiguous()


@swap.register_fake
def _(states):
    return states.new_empty(states.shape[0], states.shape[2], states.shape[1], states.shape[3])


@torch.library.custom_op("cogvideox_xdit::gelu_quantize", mutates_args=(), device_types="cuda")
def gelu_quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU (tanh) of ``[rows, features]``, quantised as :func:`quantize_rows` does: a row is read once."""
    import triton

    from .triton_kernels import gelu_quantize_kernel

    rows = rows.contiguous()
    count, features = rows.shape
    result, scales = torch.empty_like(rows, dtype=FP8), rows.new_empty(count, 1, dtype=torch.float32)
    gelu_quantize_kernel[(count,)](
        rows, result, scales, features, LARGEST=LARGEST, SMALLEST=SMALLEST, BLOCK=triton.next_power_of_2(features), num_warps=16
    )
    return result, scales


@gelu_quantize.register_kernel("cpu")
def _(rows):
    return quantize_rows(F.gelu(rows, approximate="tanh"))


@gelu_quantize.register_fake
def _(rows):
    return torch.empty_like(rows, dtype=FP8, memory_format=torch.contiguous_format), rows.new_empty(
        rows.shape[0], 1, dtype=torch.float32
    )
