"""Linear layers in FP8 (e4m3) or int8: weights are quantised once, per row; activations at run time, per token.

Weights take half the memory. Products in FP8 are twice as fast on Ada, Hopper and newer GPUs; in int8 from Turing on. A fast mode: it
changes the video; README.md says by how much.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...system.modules import has_module
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.shards import BLOCKS, BY_COLUMNS, BY_ROWS, put
from ..kernels.block_torch import FP8, INT8, quantize_rows
from ..kernels.int8_product import multiply, parts
from ..kernels.probe import is_near, once

LAYERS = (*BY_ROWS, *BY_COLUMNS)
"""The layers of a block that are converted; small ones are not."""
NEAR = 0.1
"""Largest relative error of a product of random numbers at which it is used: about 0.04 in FP8, 0.01 in int8."""


class QuantizedLinear(torch.nn.Module):
    """A linear layer with a quantised weight.

    Args:
        linear: its weight is quantised and its bias kept; both may be on the meta device.
    """

    capability: tuple[int, int]
    """Compute capability of the first GPUs with such products."""
    remedy: str
    """What to use on older ones."""
    rounded: torch.dtype
    """Of the weight, and of tokens when they are multiplied."""
    takes: torch.dtype | None
    """The dtype in which the layer takes tokens that fused kernels have rounded, with a scale each; None if it rounds them itself."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        # As parameters both are sharded and offloaded together, row by row.
        for name, part in zip(("weight", "scales"), self.quantize(linear.weight)):
            setattr(self, name, torch.nn.Parameter(part, requires_grad=False))

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Converts ``[rows, features]``. Also returns the scale of each row, ``[rows, 1]`` in float32."""
        return quantize_rows(rows, self.rounded)

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor, home: torch.device | str | None = None) -> None:
        """Replaces the weight, or this rank's part of it. It is first rounded to the layer's dtype, as it would be otherwise.

        Args:
            weight: quantised on its current device.
            home: where the result is stored; by default the same device.
        """
        for name, part in zip(("weight", "scales"), self.quantize(weight.to(self.dtype))):
            put(self, name, part.to(home or part.device))

    def emulated(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Multiplies quantised rows ``[rows, features]`` with ``scales`` ``[rows, 1]`` in float32, with the same roundings."""
        return F.linear(
            rows.float() * scales, self.weight.float() * self.scales, None if self.bias is None else self.bias.float()
        )


class Fp8Linear(QuantizedLinear):
    """A linear layer with its product in FP8."""

    capability = (8, 9)
    rounded = takes = FP8
    remedy = "use quantize int8, which older GPUs have, or off"

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
        return self.product(*self.quantize(states.flatten(0, 1))).to(self.dtype).unflatten(0, states.shape[:2])

    def product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Multiplies e4m3 rows ``[rows, features]`` with ``scales`` ``[rows, 1]``; returns ``[rows, out_features]``."""
        if rows.device.type == "cpu":  # has no FP8 product
            return self.emulated(rows, scales)
        bias = None if self.bias is None else self.bias.bfloat16()  # the only dtype supported with row-wise scales
        return torch._scaled_mm(
            rows, self.weight.t(), scales, self.scales.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


class Int8Linear(QuantizedLinear):
    """A linear layer with its product in int8, by torch or by comfy-kitchen; :mod:`.int8_choice` chooses."""

    capability = (7, 5)
    remedy = "use quantize off"
    rounded = INT8
    takes = None

    def forward(self, states: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """Maps ``[batch, tokens, features]`` to ``[batch, tokens, out_features]`` in the layer's dtype.

        Args:
            states: quantised here, unless ``scales`` are given: then already in int8.
            scales: of each token, ``[batch * tokens, 1]``.
        """
        if scales is not None:  # from fused kernels
            from ..kernels.block_triton import int8_product

            return int8_product(self, states, scales)[0]
        if states.device.type == "cpu":
            product = self.emulated(*self.quantize(states.flatten(0, 1))).to(self.dtype)
        elif why_no_kitchen(states.device) is None:
            return self.by_kitchen(states)
        else:
            product = self.product(states.flatten(0, 1))
        return product.unflatten(0, states.shape[:2])

    def by_kitchen(self, states: torch.Tensor) -> torch.Tensor:
        """Quantises and multiplies ``[batch, tokens, features]`` by comfy-kitchen."""
        import comfy_kitchen

        return comfy_kitchen.int8_linear(states, self.weight, self.scales, self.bias, self.dtype)

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Quantises and multiplies ``[rows, features]`` by torch alone, a few rows at a time; returns ``[rows, out_features]``."""
        result = states.new_empty(len(states), len(self.weight), dtype=self.dtype)
        for part in parts(len(states), max(self.weight.shape)):
            rows, scales = self.quantize(states[part])
            scaled = multiply(rows, self.weight).float().mul_(scales).mul_(self.scales.t())
            result[part] = scaled if self.bias is None else scaled.add_(self.bias)
        return result


KINDS = {"fp8": Fp8Linear, "int8": Int8Linear}
"""By the user's word for them; see :attr:`parallel_backend.model.Model.quantization`."""


def missing(kind: str, device: torch.device) -> str | None:
    """Returns why a device cannot multiply in FP8 or int8, in one line, or None. The CPU emulates both."""
    if device.type == "cpu":
        return None
    layer, name = KINDS[kind], device.type
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if capability < layer.capability:
            needed, has = (".".join(map(str, version)) for version in (layer.capability, capability))
            return f"{kind} needs a GPU of compute capability {needed} or newer; {name} has {has}: {layer.remedy}"
    reason = why_no_product(device, kind)
    if reason and layer is Int8Linear and (other := why_no_kitchen(device)):
        reason = f"{reason}, and {other}"
    return f"{kind} does not work with torch {torch.__version__} on {name}: {reason}; use quantize off" if reason else None


@once
def why_no_kitchen(device: torch.device) -> str | None:
    """Returns why comfy-kitchen has no int8 product that is right, and faster than torch's, in one line, or None."""
    if not has_module("comfy_kitchen"):
        return "the package comfy-kitchen is missing (pip install comfy-kitchen)"
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "int8_linear"):
        return "comfy-kitchen is too old (pip install -U comfy-kitchen)"
    backends = comfy_kitchen.list_backends()
    if any(each["available"] and "int8_linear" in each["capabilities"] for name, each in backends.items() if name != "eager"):
        return why_wrong(device, "int8", Int8Linear.by_kitchen)
    reasons = [f"{name}: {each['unavailable_reason']}" for name, each in backends.items() if each["unavailable_reason"]]
    return f"comfy-kitchen has no kernels here ({', '.join(sorted(reasons))})"


@once
def why_no_product(device: torch.device, kind: str) -> str | None:
    """Returns why a product with scales for each row fails, in one line, or None. Older versions of torch support few GPUs."""
    return why_wrong(device, kind, KINDS[kind].__call__)


def why_wrong(device: torch.device, kind: str, run: Callable[[QuantizedLinear, torch.Tensor], torch.Tensor]) -> str | None:
    """Returns that a product of random numbers is wrong, or None.

    Args:
        device: it is made there.
        kind: of the layer.
        run: multiplies tokens with a layer.
    """
    generator = torch.Generator(device).manual_seed(0)
    like = {"device": device, "dtype": torch.bfloat16 if kind == "fp8" else torch.float16}
    with torch.inference_mode():
        linear, random = torch.nn.Linear(256, 128, **like), torch.randn(2, 128, 256, device=device, generator=generator)
        states, weight = random.to(like["dtype"]).split(1)
        linear.weight = torch.nn.Parameter(weight[0], requires_grad=False)
        found, exact = run(KINDS[kind](linear), states), linear(states)
    return None if is_near(found, exact, NEAR) else "its results are wrong"


def convert(transformer, kind: str) -> None:
    """Converts the large linear layers of every block to FP8 or int8.

    Call it before weights are read, so they are quantised one at a time.
    """
    for block in transformer.transformer_blocks:
        for name in LAYERS:
            block.set_submodule(name, KINDS[kind](block.get_submodule(name)))


def is_large(layer: str) -> bool:
    """Returns whether a layer of a transformer is one of :data:`LAYERS` of a block."""
    return layer.startswith(BLOCKS) and layer.split(".", 2)[-1] in LAYERS


def saved_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Returns the memory in bytes that quantised weights save for a transformer in ``dtype``: either kind takes a byte."""
    shapes = [shape for layer, shape in checkpoint.layer_shapes.items() if is_large(layer)]
    scales = torch.float32.itemsize * sum(rows for rows, _ in shapes)
    return sum(math.prod(shape) for shape in shapes) * (dtype.itemsize - 1) - scales
