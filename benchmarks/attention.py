"""Attention alone: this pack's kernel, FlashAttention-3 and torch's own, in bf16, fp16 and FP8, on one GPU.

``python -m benchmarks.attention`` prints a line for each: milliseconds when it runs for a moment and when it runs for a while, in
which the chip clocks down to what its power allows, and the error of some rows against float64. It needs a Hopper GPU.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from parallel_backend.cogvideox import attention
from parallel_backend.cogvideox.attention import Attention
from parallel_backend.cogvideox.kernels import LARGEST, keep_kernels, quantize
from parallel_backend.jobs import DTYPES

HALVES = ("bf16", "fp16")
SHORT_CALLS, LONG_SECONDS = 20, 0.6
CHECKED = slice(64)
"""Rows that are computed in float64 too."""


def candidates(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Iterator[tuple[str, Attention, list[torch.Tensor]]]:
    """A name, a way that is there, and what it is given, of ``[1, tokens, heads, head_dim]`` in float32."""
    states = (query, key, value)
    for name in HALVES:
        yield f"torch {name}", attention.attend_torch, [part.to(DTYPES[name]) for part in states]
    if attention.flash_3():
        yield "FlashAttention-3 bf16", attention.attend_flash, [part.bfloat16() for part in states]
        scales = [part.abs().amax(dim=(1, 3)) / LARGEST for part in states]
        about = dict(zip(("q_descale", "k_descale", "v_descale"), scales))
        attend = partial(attention.flash_3(), return_attn_probs=True, **about)
        rounded = [quantize(part / scale[:, None, :, None]) for part, scale in zip(states, scales)]
        yield "FlashAttention-3 fp8", lambda *states: attend(*states)[0], rounded
    scaled = query * attention.factors(query.shape[-1], base_two=True, fp8=False)[0]
    for name in HALVES:
        dtype = DTYPES[name]
        if reason := attention.why_not_own(query.device, dtype):
            print(f"ours {name} is left out: {reason}")
            continue
        yield f"ours {name}", attention.attend_own, [part.to(dtype) for part in (scaled, key, value)]
        yield f"ours fp8, values {name}", attention.attend_own, [*attention.in_fp8(scaled, key), value.to(dtype)]


def milliseconds(call: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Of one call among a few, and among as many as last a while."""
    for _ in range(3):
        call()
    return timed(call, SHORT_CALLS), timed(call, None)


def timed(call: Callable[[], torch.Tensor], calls: int | None) -> float:
    """Milliseconds of one of so many calls, or of as many as fill :data:`LONG_SECONDS`."""
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while done < calls if calls else time.perf_counter() - began < LONG_SECONDS:
        call()
        done += 1
        if not calls and done % SHORT_CALLS == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / done * 1e3


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=17776)
    parser.add_argument("--heads", type=int, default=48)
    asked = parser.parse_args()
    keep_kernels()
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, asked.tokens, asked.heads, attention.HEAD_DIM)
    query, key, value = (torch.randn(shape, device=device, generator=generator) for _ in range(3))
    query, key = (torch.nn.functional.layer_norm(states, shape[-1:]) for states in (query, key))
    exact = attention.attend_torch(query[:, CHECKED].double(), key.double(), value.double())
    operations = 4 * asked.tokens**2 * asked.heads * attention.HEAD_DIM
    print(f"{torch.cuda.get_device_name()}, {asked.heads} heads of {asked.tokens} tokens")
    for name, attend, states in candidates(query, key, value):
        call = partial(attend, *states)
        short, long = milliseconds(call)
        error = (call()[:, CHECKED] - exact).norm() / exact.norm()
        print(
            f"{name}: {short:.2f} ms, {operations / short / 1e9:.0f} TFLOP/s; long {long:.2f} ms; error {error:.4f}", flush=True
        )


if __name__ == "__main__":
    main()
