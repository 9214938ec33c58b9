"""Linear layers in FP8 (e4m3): weights quantised once, a scale a row; tokens as they come, a scale a token.

Products run at twice the speed on Ada, Hopper and newer GPUs, and weights take half the memory. A fast mode: it changes the
video; README.md states by how much.
"""

import math

import torch

from .checkpoint import Checkpoint
from .kernels import FP8, quantize_rows

LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
"""Of a block; the small ones stay as they are."""
CAPABILITY = (8, 9)
"""Of the first GPUs with FP8 products."""


def missing(device: torch.device) -> str | None:
    """Why a device cannot multiply in FP8, in one line, or None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return f"fp8 needs a GPU of compute capability 8.9 or newer; {name} has {major}.{minor}: turn fp8 off"
    return None


class Fp8Linear(torch.nn.Module):
    """A linear layer whose product runs in FP8.

    Args:
        linear: whose weight is quantised and whose bias is kept.
        device: where to quantise; the layer stays there.
    """

    def __init__(self, linear: torch.nn.Linear, device: torch.device):
        super().__init__()
        self.dtype = linear.weight.dtype
        self.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.to(device), requires_grad=False)
        self.weight = torch.nn.Parameter(linear.weight.to(device, FP8), requires_grad=False)
        self.register_buffer("scales", torch.empty(linear.out_features, 1, device=device))
        self.set_weight(linear.weight)

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> None:
        """Takes another weight, rounded to the layer's dtype first, as one that is not quantised would be."""
        quantized, scales = quantize_rows(weight.to(self.weight.device, self.dtype))
        self.weight.copy_(quantized)
        self.scales.copy_(scales)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, features]`` to ``[batch, tokens, out_features]``."""
        return self.product(*quantize_rows(states.flatten(0, 1)), states.dtype).unflatten(0, states.shape[:2])

    def product(self, rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, features]`` in e4m3, and what each is to be multiplied by, to ``[rows, out_features]`` in ``dtype``."""
        if rows.device.type == "cpu":  # no such product there: the same numbers by way of float32
            product = torch.nn.functional.linear(rows.float() * scales, self.weight.float() * self.scales)
            return product.to(dtype) if self.bias is None else (product + self.bias.float()).to(dtype)
        bias = None if self.bias is None else self.bias.bfloat16()  # the one dtype that scales a row come with
        product = torch._scaled_mm(
            rows, self.weight.t(), scales, self.scales.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product.to(dtype)


def convert(transformer, device: torch.device, home: torch.device) -> None:
    """Turns the large linear layers of every block into FP8, one after the other: computed on ``device``, left at ``home``."""
    for block in transformer.transformer_blocks:
        for name in LAYERS:
            block.set_submodule(name, Fp8Linear(block.get_submodule(name), device).to(home))


def saved_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """By how much a transformer in ``dtype`` becomes smaller."""
    shapes = [shape for layer, shape in checkpoint.layer_shapes.items() if layer.split(".", 2)[-1] in LAYERS]
    return sum(math.prod(shape) for shape in shapes) * (dtype.itemsize - 1)
