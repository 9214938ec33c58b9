"""Attention alone: every registered function on one device, which of them ``auto`` chooses, and why others cannot be used.

``python -m benchmarks.attention`` prints a line for each: whether it is exact, its error against float64 for some queries (of random
heads, and of heads whose queries see their own neighbourhood, with values that are alike there), and milliseconds when it runs for a
moment and when it runs for a while, in which a GPU clocks down to what its power allows.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from parallel_backend.cogvideox.attention import choice, recomputed_tiles, registry
from parallel_backend.cogvideox.attention.function import AttentionFunction, Kind
from parallel_backend.cogvideox.attention.torch_attention import HEAD_DIM, attend_torch
from parallel_backend.cogvideox.attention.trial import why_not
from parallel_backend.cogvideox.kernels.block_torch import keep_kernels
from parallel_backend.devices import Devices, current
from parallel_backend.errors import reason_of
from parallel_backend.model import DTYPES
from parallel_backend.plan import AUTO

SHORT_CALLS = 20
CHECKED = slice(64)
"""Queries that are computed in float64 too."""


@dataclass(frozen=True)
class Row:
    """One function's line."""

    function: AttentionFunction
    is_chosen: bool
    reason: str | None = None
    """Why it cannot be used; None if it was measured."""
    error: float = math.nan
    local_error: float = math.nan
    milliseconds: float = math.nan
    long_milliseconds: float = math.nan
    twice: float = 0.0
    """Share of its tiles that were computed twice."""

    def line(self, operations: float) -> str:
        """Formats the row, given the floating-point operations of one call."""
        start = f"{'->' if self.is_chosen else '':2} {self.function.name:10} {'exact' if self.function.is_exact else 'approximate':11}"
        if self.reason:
            return f"{start}  not used: {self.reason}"
        rate = operations / self.milliseconds / 1e9
        end = f", {self.twice:.1%} twice" if self.twice else ""
        return (
            f"{start}  error {self.error:.4f}, of near ones {self.local_error:.4f}; {self.milliseconds:.3f} ms ({rate:.3g} TFLOP/s), "
            f"long {self.long_milliseconds:.3f}{end}"
        )


def rows(kind: Kind, *, tokens: int, heads: int, seconds: float = 0.6) -> Iterator[Row]:
    """Measures every registered function.

    Args:
        kind: of the tensors.
        tokens, heads: of one sequence.
        seconds: of a long run.
    """
    generator = torch.Generator(kind.device).manual_seed(0)
    shape = (1, tokens, heads, kind.head_dim)
    cases = [make(shape, generator) for make in (heads_anywhere, heads_in_places)]
    exact = [attend_torch(query[:, CHECKED].double(), key.double(), value.double()) for query, key, value in cases]
    chosen = choice.fastest_alone(kind, tokens)
    for function in registry.FUNCTIONS.values():
        row = partial(Row, function, function is chosen)
        if reason := why_not(kind, function):
            yield row(reason)
            continue
        try:
            given = [function.operands(*case, kind.dtype) for case in cases]
            recomputed_tiles.pieces_on(kind.device).share_of_twice()
            found = [function.attend(*operands) for operands in given]
            twice = recomputed_tiles.pieces_on(kind.device).share_of_twice()
            call = partial(function.attend, *given[0])
            short, long = (milliseconds(call, kind.device, seconds=limit) for limit in (None, seconds))
        except Exception as error:  # the next one may do better
            yield row(reason_of(error))
            continue
        errors = [float((part[:, CHECKED] - right).norm() / right.norm()) for part, right in zip(found, exact)]
        yield row(None, *errors, short, long, twice)


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


def milliseconds(call: Callable[[], torch.Tensor], device: torch.device, *, seconds: float | None) -> float:
    """Milliseconds of one call: among a few, or among as many as fill the given seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    call()
    wait(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds if seconds else done < SHORT_CALLS:
        call()
        done += 1
        if seconds and done % SHORT_CALLS == 0:
            wait(device)
    wait(device)
    return (time.perf_counter() - began) / done * 1e3


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=17776)
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", default="auto", help="cpu, or a GPU's number (default: the first)")
    parser.add_argument("--seconds", type=float, default=0.6, help="of a long run (default %(default)s)")
    asked = parser.parse_args(argv)
    keep_kernels()
    device = Devices.parse(asked.device).first
    kind = Kind(device, DTYPES[asked.dtype], asked.head_dim)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {asked.dtype}, {asked.heads} heads of {asked.head_dim} features, {asked.tokens} tokens")
    with current(device), torch.inference_mode():
        for row in rows(kind, tokens=asked.tokens, heads=asked.heads, seconds=asked.seconds):
            print(row.line(4 * asked.tokens**2 * asked.heads * asked.head_dim), flush=True)
        for note in choice.choose(AUTO, kind, asked.tokens, choice.Ranks()).notes:
            print(note)


if __name__ == "__main__":
    main()
