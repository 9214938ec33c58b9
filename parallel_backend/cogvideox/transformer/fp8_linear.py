"""Linear layers in FP8 (e4m3): weights quantised once, a scale a row; tokens as they come, a scale a token.

Products run at twice the speed on Ada, Hopper and newer GPUs, and weights take half the memory. A fast mode: it changes the
video; README.md states by how much.
"""

import math

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.shards import BLOCKS, BY_COLUMNS, BY_ROWS, put
from ..kernels.block_torch import quantize_rows
from ..kernels.probe import once

LAYERS = (*BY_ROWS, *BY_COLUMNS)
"""Of a block; the small ones stay as they are."""
CAPABILITY = (8, 9)
"""Of the first GPUs with FP8 products."""


def missing(device: torch.device) -> str | None:
    """Why a device cannot multiply in FP8, in one line, or None."""
    if device.type != "cuda":
        return None
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        major, minor = capability
        return f"fp8 needs a GPU of compute capability 8.9 or newer; {name} has {major}.{minor}: turn fp8 off"
    reason = why_no_product(device)
    return f"fp8 does not work with torch {torch.__version__} on {name}: {reason}; turn fp8 off" if reason else None


@once
def why_no_product(device: torch.device) -> str | None:
    """Why a product with a scale a row cannot be computed, in one line, or None: older versions of torch have it for few GPUs."""
    with torch.inference_mode():
        layer = Fp8Linear(torch.nn.Linear(128, 128, device=device, dtype=torch.bfloat16))
        layer(torch.ones(1, 128, 128, device=device, dtype=torch.bfloat16))
    return None


class Fp8Linear(torch.nn.Module):
    """A linear layer whose product runs in FP8.

    Args:
        linear: whose weight is quantised and whose bias is kept; neither need be there yet.
    """

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        # As parameters both are sharded and offloaded together, row by row.
        quantized, scales = quantize_rows(linear.weight)
        self.weight = torch.nn.Parameter(quantized, requires_grad=False)
        self.scales = torch.nn.Parameter(scales, requires_grad=False)

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor, home: torch.device | str | None = None) -> None:
        """Takes another weight, or this rank's part of it, rounded to the layer's dtype first, as one not quantised would be.

        Args:
            weight: quantised where it lies.
            home: where the result stays; where it lies unless said otherwise.
        """
        for name, part in zip(("weight", "scales"), quantize_rows(weight.to(self.dtype))):
            put(self, name, part.to(home or part.device))

    def forward(self, states: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, tokens, features]`` to ``[batch, tokens, out_features]``.

        Args:
            states: to be rounded; in e4m3 already where ``scales`` ``[batch * tokens, 1]`` say what each token is to be multiplied by.
        Returns:
            In the layer's dtype; where tokens were rounded already in that of the product, as those who round them read any.
        """
        if scales is not None:
            return self.product(states.flatten(0, 1), scales).unflatten(0, states.shape[:2])
        return self.product(*quantize_rows(states.flatten(0, 1))).to(self.dtype).unflatten(0, states.shape[:2])

    def product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``[rows, features]`` in e4m3, and what each is to be multiplied by, to ``[rows, out_features]``."""
        if rows.device.type == "cpu":  # no such product there: the same numbers by way of float32
            product = torch.nn.functional.linear(rows.float() * scales, self.weight.float() * self.scales)
            return product if self.bias is None else product + self.bias.float()
        bias = None if self.bias is None else self.bias.bfloat16()  # the one dtype that scales a row come with
        return torch._scaled_mm(
            rows, self.weight.t(), scales, self.scales.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


def convert(transformer) -> None:
    """Turns the large linear layers of every block into FP8: best before weights are read, which are then quantised one by one."""
    for block in transformer.transformer_blocks:
        for name in LAYERS:
            block.set_submodule(name, Fp8Linear(block.get_submodule(name)))


def is_large(layer: str) -> bool:
    """Whether a layer of a transformer is one of :data:`LAYERS` of a block."""
    return layer.startswith(BLOCKS) and layer.split(".", 2)[-1] in LAYERS


def saved_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """By how much a transformer in ``dtype`` becomes smaller."""
    shapes = [shape for layer, shape in checkpoint.layer_shapes.items() if is_large(layer)]
    scales = torch.float32.itemsize * sum(rows for rows, _ in shapes)
    return sum(math.prod(shape) for shape in shapes) * (dtype.itemsize - 1) - scales
