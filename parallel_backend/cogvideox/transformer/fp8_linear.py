"""Linear layers in FP8 (e4m3): weights are quantised once, per row; activations at run time, per token.

On Ada, Hopper and newer GPUs products are twice as fast, and weights take half the memory. A fast mode: it changes the video;
README.md says by how much.
"""

import math

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.shards import BLOCKS, BY_COLUMNS, BY_ROWS, put
from ..kernels.block_torch import quantize_rows
from ..kernels.probe import once

LAYERS = (*BY_ROWS, *BY_COLUMNS)
"""The layers of a block that are converted; small ones are not."""
CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 products."""


def missing(device: torch.device) -> str | None:
    """Returns why a device cannot multiply in FP8, in one line, or None."""
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
    """Returns why a row-wise scaled product fails, in one line, or None. Older versions of torch support few GPUs."""
    with torch.inference_mode():
        layer = Fp8Linear(torch.nn.Linear(128, 128, device=device, dtype=torch.bfloat16))
        layer(torch.ones(1, 128, 128, device=device, dtype=torch.bfloat16))
    return None


class Fp8Linear(torch.nn.Module):
    """A linear layer with its product in FP8.

    Args:
        linear: its weight is quantised and its bias kept; both may be on the meta device.
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
        """Replaces the weight, or this rank's part of it. It is first rounded to the layer's dtype, as it would be without FP8.

        Args:
            weight: quantised on its current device.
            home: where the result is stored; by default the same device.
        """
        for name, part in zip(("weight", "scales"), quantize_rows(weight.to(self.dtype))):
            put(self, name, part.to(home or part.device))

    def forward(self, states: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """Maps ``[batch, tokens, features]`` to ``[batch, tokens, out_features]``.

        Args:
            states: quantised here, unless ``scales`` are given: then already in e4m3.
            scales: of each token, ``[batch * tokens, 1]``.
        Returns:
            In the layer's dtype; with ``scales`` in the product's dtype, bfloat16, as fused kernels read either.
        """
        if scales is not None:
            return self.product(states.flatten(0, 1), scales).unflatten(0, states.shape[:2])
        return self.product(*quantize_rows(states.flatten(0, 1))).to(self.dtype).unflatten(0, states.shape[:2])

    def product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Multiplies e4m3 rows ``[rows, features]`` with ``scales`` ``[rows, 1]``; returns ``[rows, out_features]``."""
        if rows.device.type == "cpu":  # has no FP8 product; the same values via float32
            product = torch.nn.functional.linear(rows.float() * scales, self.weight.float() * self.scales)
            return product if self.bias is None else product + self.bias.float()
        bias = None if self.bias is None else self.bias.bfloat16()  # the only dtype supported with row-wise scales
        return torch._scaled_mm(
            rows, self.weight.t(), scales, self.scales.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


def convert(transformer) -> None:
    """Converts the large linear layers of every block to FP8.

    Call it before weights are read, so they are quantised one at a time.
    """
    for block in transformer.transformer_blocks:
        for name in LAYERS:
            block.set_submodule(name, Fp8Linear(block.get_submodule(name)))


def is_large(layer: str) -> bool:
    """Returns whether a layer of a transformer is one of :data:`LAYERS` of a block."""
    return layer.startswith(BLOCKS) and layer.split(".", 2)[-1] in LAYERS


def saved_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Returns the memory in bytes that FP8 saves for a transformer in ``dtype``."""
    shapes = [shape for layer, shape in checkpoint.layer_shapes.items() if is_large(layer)]
    scales = torch.float32.itemsize * sum(rows for rows, _ in shapes)
    return sum(math.prod(shape) for shape in shapes) * (dtype.itemsize - 1) - scales
