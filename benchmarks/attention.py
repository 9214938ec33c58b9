"""Attention alone: this pack's kernel, FlashAttention-3 and torch's own, in bf16, fp16 and FP8, on one GPU.

``python -m benchmarks.attention`` prints a line for each: milliseconds when it runs for a moment and when it runs for a while, in
which the chip clocks down to what its power allows, and the error of some rows against float64: of random heads, and of heads
whose queries see their own neighbourhood, with values that are alike there. It needs a Hopper GPU.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from parallel_backend.cogvideox.attention import choice
from parallel_backend.cogvideox.attention.hopper import attend_own, why_not_own
from parallel_backend.cogvideox.attention.hopper_fp8 import attend_in_fp8, in_places
from parallel_backend.cogvideox.attention.operands import factors, in_fp8
from parallel_backend.cogvideox.attention.recomputed_tiles import pieces_on
from parallel_backend.cogvideox.attention.torch_attention import HEAD_DIM, Attention, attend_torch
from parallel_backend.cogvideox.kernels.block_torch import LARGEST, keep_kernels, quantize
from parallel_backend.errors import first_line
from parallel_backend.model import DTYPES

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
        yield f"torch {name}", attend_torch, [part.to(DTYPES[name]) for part in states]
    if choice.flash_3():
        yield "FlashAttention-3 bf16", choice.attend_flash, [part.bfloat16() for part in states]
        scales = [part.abs().amax(dim=(1, 3)) / LARGEST for part in states]
        about = dict(zip(("q_descale", "k_descale", "v_descale"), scales))
        attend = partial(choice.flash_3(), return_attn_probs=True, **about)
        rounded = [quantize(part / scale[:, None, :, None]) for part, scale in zip(states, scales)]
        yield "FlashAttention-3 fp8", lambda *states: attend(*states)[0], rounded
    scaled = query * factors(query.shape[-1], base_two=True, fp8=False)[0]
    for name in HALVES:
        dtype = DTYPES[name]
        if why_not_own(query.device, dtype):
            continue
        yield f"ours {name}", attend_own, [part.to(dtype) for part in (scaled, key, value)]
    rounded = [*in_fp8(scaled, key), value.bfloat16()]
    for name, raises in (("ours fp8", False), ("ours fp8, references raised", True)):
        yield name, lambda *states, raises=raises: attend_in_fp8(*states, raises=raises)[0], rounded
    yield "values to fp8 alone", lambda query, key, value: in_places(value, 128)[0], rounded


def heads_anywhere(shape: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    """Queries, keys and values that know nothing of each other."""
    query, key, value = (torch.randn(shape, device=generator.device, generator=generator) for _ in range(3))
    return [*(torch.nn.functional.layer_norm(states, shape[-1:]) for states in (query, key)), value]


def heads_in_places(shape: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    """Queries and keys that are alike where they are near, as are values, whose sums over a neighbourhood become large."""
    noise = heads_anywhere(shape, generator)
    angles = torch.linspace(0, 12 * math.pi, shape[1], device=generator.device)[:, None, None]
    phases = torch.rand(shape[-1], device=generator.device, generator=generator) * 2 * math.pi
    query, key = (torch.nn.functional.layer_norm(part + 2 * torch.sin(angles + phases), shape[-1:]) for part in noise[:2])
    return [query, key, noise[2] + 2 * torch.sin(angles + 2 * phases)]


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
    parser.add_argument("--only", default="", help="what names of lines have in them")
    asked = parser.parse_args()
    keep_kernels()
    device = torch.device("cuda", 0)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, asked.tokens, asked.heads, HEAD_DIM)
    kinds = [make(shape, generator) for make in (heads_anywhere, heads_in_places)]
    exact = [attend_torch(query[:, CHECKED].double(), key.double(), value.double()) for query, key, value in kinds]
    operations = 4 * asked.tokens**2 * asked.heads * HEAD_DIM
    print(f"{torch.cuda.get_device_name()}, {asked.heads} heads of {asked.tokens} tokens")
    for name in HALVES:
        if reason := why_not_own(device, DTYPES[name]):
            print(f"ours {name} is left out: {reason}")
    for (name, attend, states), (*_, local) in zip(candidates(*kinds[0]), candidates(*kinds[1])):
        if asked.only not in name:
            continue
        try:
            choice.note_of_twice(device)
            found = [attend(*states), attend(*local)]
            twice = pieces_on(device).share_of_twice()
            short, long = milliseconds(partial(attend, *states))
            local_short = timed(partial(attend, *local), SHORT_CALLS)
        except Exception as error:  # the next one may do better
            print(f"{name}: {first_line(error)}", flush=True)
            continue
        line = f"{name}: {short:.3f} ms, long {long:.3f}, near ones {local_short:.3f}"
        if found[0].shape == states[0].shape:
            near = [(part[:, CHECKED] - right).norm() / right.norm() for part, right in zip(found, exact)]
            line += f", {operations / short / 1e9:.0f} TFLOP/s"
            line += f"; error {near[0]:.4f}, of near ones {near[1]:.4f}; twice {twice:.1%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
