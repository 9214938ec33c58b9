"""What a compiler makes two or three passes over memory of, in one: kernels in Triton, each a custom operation.

Only compiled blocks on a GPU use them (:mod:`.blocks`), where Triton is there for certain. The same operations in torch's own
words, in which uncompiled blocks and CPUs do the work, are their implementations on a CPU.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogvideox-xdit" / "compiled"
"""Where compiled kernels are kept, unless TORCHINDUCTOR_CACHE_DIR says otherwise."""
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = 1e-12
"""Below which a maximum counts as nothing to scale by."""


def keep_kernels() -> None:
    """Has whatever is compiled from now on keep its kernels on disk."""
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of ``[batch, tokens, heads, head_dim]`` by tables ``[tokens, head_dim]``."""
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return states * cosines[:, None] + turned * sines[:, None]


def quantize(states: torch.Tensor) -> torch.Tensor:
    """In e4m3; what is beyond it becomes its largest."""
    return states.clamp(-LARGEST, LARGEST).to(FP8)


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, features]`` in e4m3, and what each row is to be multiplied by, ``[rows, 1]`` in float32."""
    exact = rows.float()
    scales = exact.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (exact / scales).to(FP8), scales


def spread(states: torch.Tensor, ranks: int) -> torch.Tensor:
    """``[batch, tokens, heads, head_dim]`` as it is sent to ``ranks``: ``[batch, ranks, tokens, heads / ranks, head_dim]``."""
    return states.unflatten(2, (ranks, -1)).transpose(1, 2).contiguous()


def for_ranks(states: torch.Tensor, ranks: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for what :func:`spread` gives."""
    batch, tokens, heads, features = states.shape
    return states.new_empty(batch, ranks, tokens, heads // ranks, features, dtype=dtype)


def result_dtype(states: torch.Tensor, fp8: bool) -> torch.dtype:
    """What heads are rounded to."""
    return FP8 if fp8 else states.dtype


@torch.library.custom_op("cogvideox_xdit::norm_rotate", mutates_args=(), device_types="cuda")
def norm_rotate(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    tables: list[torch.Tensor],
    factor: float,
    fp8: bool,
    ranks: int,
) -> torch.Tensor:
    """Normalises each head of ``[batch, tokens, heads, head_dim]``, rotates its pairs, and lays them out for ``ranks``.

    Args:
        states: of queries or keys.
        weight, bias, epsilon: of the layer norm over a head.
        tables: cosines and sines ``[tokens, head_dim]`` in float32, or none.
        factor: that the result is multiplied by.
        fp8: whether it is rounded to e4m3, not to the dtype.
        ranks: among whom heads are spread.
    Returns:
        ``[batch, ranks, tokens, heads / ranks, head_dim]``, rounded once.
    """
    import triton

    from .triton_kernels import norm_rotate_kernel

    states = states.contiguous()
    batch, tokens, heads, features = states.shape
    result = for_ranks(states, ranks, result_dtype(states, fp8))
    rows, block = batch * tokens * heads, 64
    cosines, sines = tables or (states, states)
    norm_rotate_kernel[(triton.cdiv(rows, block),)](
        states, result, weight, bias, cosines, sines, factor,
        rows, tokens, heads, heads // ranks, epsilon, FEATURES=features, ROWS=block, ROTATES=bool(tables), num_warps=4,
    )  # fmt: skip
    return result


def norm_rotate_in_steps(states, weight, bias, epsilon, tables, factor, fp8, ranks):
    """:func:`norm_rotate` in torch's own words."""
    exact = states.double() if states.dtype == torch.float64 else states.float()
    normal = F.layer_norm(exact, weight.shape, weight.to(exact.dtype), bias.to(exact.dtype), epsilon)
    turned = (rotate(normal, *tables) if tables else normal) * factor
    return spread(quantize(turned) if fp8 else turned.to(states.dtype), ranks)


norm_rotate.register_kernel("cpu")(norm_rotate_in_steps)


@norm_rotate.register_fake
def _(states, weight, bias, epsilon, tables, factor, fp8, ranks):
    return for_ranks(states, ranks, result_dtype(states, fp8))


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
