"""Layers in int8 alone: by comfy-kitchen, which rounds tokens itself, and by torch with rounded tokens, a few rows at a time or all.

``python -m benchmarks.int8`` prints a line for each large layer of a block, with the milliseconds of one call. GELU is included where
it follows; by torch also the rounding for the next layer. ``product`` is in int32 and not scaled. ``2^24`` means that so many numbers of a
product are in int32 at a time (``AT_ONCE`` in ``kernels/int8_product.py``).
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch

from parallel_backend.cogvideox.kernels import int8_product
from parallel_backend.cogvideox.kernels.block_torch import INT8, keep_kernels
from parallel_backend.cogvideox.transformer import block, int8_choice
from parallel_backend.cogvideox.transformer.quantized_linear import Int8Linear, why_no_kitchen
from parallel_backend.devices import Devices, current
from parallel_backend.errors import reason_of
from parallel_backend.model import DTYPES

from .attention import milliseconds

AT_ONCE = (22, 23, 24, 25, 26)
"""Exponents of two: numbers of a product that are in int32 at a time."""


def ways(layer: Int8Linear, states: torch.Tensor, *, gelu: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields the name of each way to compute a layer, and a call of it.

    Args:
        layer: with an input ``[1, tokens, features]``, ``states``.
        states: not rounded.
        gelu: whether GELU and the rounding for the next layer follow.
    """
    kernels, plain = (
        block.triton_kernels(),
        torch.nn.Linear(*reversed(layer.weight.shape), device=states.device, dtype=states.dtype),
    )
    rounded = kernels.inputs(states, rounded=INT8)
    yield "16 bits", partial(kernels.gelu, plain, (states,), "tanh", rounded=None) if gelu else partial(plain, states)
    if why_no_kitchen(states.device) is None:
        layer.takes = None
        yield "comfy-kitchen", partial(kernels.gelu, layer, (states,), "tanh", rounded=None) if gelu else partial(layer, states)
    yield "rounding", partial(kernels.inputs, states, rounded=INT8)
    yield "product", partial(int8_product.multiply, rounded[0].flatten(0, 1), layer.weight)
    usual = int8_product.AT_ONCE
    for name, count in (*((f"2^{power}", 2**power) for power in AT_ONCE), ("all", 2**62)):
        int8_product.AT_ONCE = count
        yield name, partial(kernels.gelu, layer, rounded, "tanh", rounded=INT8) if gelu else partial(layer, *rounded)
    int8_product.AT_ONCE = usual


def time_of(call: Callable[[], object], device: torch.device) -> str:
    """Returns the milliseconds of one call, or why it failed."""
    try:
        return f"{milliseconds(call, device, seconds=None):.3f}"
    except Exception as error:  # the next one may do better
        return reason_of(error)


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=17776)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", default="auto", help="cpu, or a GPU's number (default: the first)")
    asked = parser.parse_args(argv)
    keep_kernels()
    device, dtype = Devices.parse(asked.device).first, DTYPES[asked.dtype]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {asked.dtype}, {asked.tokens} tokens; milliseconds")
    with current(device), torch.inference_mode():
        sample = int8_choice.Sample(device, dtype, asked.features, asked.tokens)
        for layer in sample.layers:
            outputs, inputs = layer.weight.shape
            states = torch.randn(1, asked.tokens, inputs, device=device, dtype=dtype)
            found = [f"{name} {time_of(call, device)}" for name, call in ways(layer, states, gelu=outputs > inputs)]
            print(f"{inputs} to {outputs}: {', '.join(found)}", flush=True)
        if device.type == "cuda":
            print(int8_choice.fastest_of([int8_choice.measured(device, dtype, asked.features)])[1] or "int8 products: torch")


if __name__ == "__main__":
    main()
