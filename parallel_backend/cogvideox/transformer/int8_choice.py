"""Chooses how layers in int8 multiply: by torch, of tokens that fused kernels have rounded, or by comfy-kitchen, which rounds them itself.

comfy-kitchen scales a product before it is written, but has no function for tokens that are already rounded. So queries, keys and
values round the same tokens three times, and GELU is a pass of its own. With torch the product is written in int32 first. Which
costs less depends on the GPU, so both are timed once where both are there.
"""

import time
from collections.abc import Callable
from functools import cache

import torch

from ...devices import current
from ...errors import reason_of
from ...notes import Information
from ...system.modules import version_of
from ...system.nvml import driver_version
from ..attention import timings
from ..attention.function import NAMES
from ..attention.timings import Timings
from ..kernels.block_torch import CONDITIONS, INT8, TorchBlockOps
from ..kernels.probe import is_near, once
from . import block
from .quantized_linear import NEAR, Int8Linear, why_no_kitchen

TORCH, KITCHEN = "torch", "comfy-kitchen"
TRIED, TIMED = 40, 4096
"""Tokens with which the kernels are tried, and with which both ways are timed."""
ROUNDS, CALLS = 8, 3
"""Rounds over both ways, and calls of each in a round. The fastest round counts."""


def use(transformer, device: torch.device, dtype: torch.dtype, collect: Callable, *, compiled: bool) -> str | None:
    """Makes layers in int8 multiply in the way that is fastest for the slowest rank. All ranks must call it.

    Args:
        transformer: the model.
        device, dtype: of this rank.
        collect: returns a value from every rank.
        compiled: whether the blocks use fused kernels.
    Returns:
        A note for the user, or None if there is nothing to say.
    """
    layers = [layer for layer in transformer.transformer_blocks.modules() if isinstance(layer, Int8Linear)]
    if not layers:
        return None
    features = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    name, note = fastest_of(collect(measured(device, dtype, features) if compiled else alone(device)))
    for layer in layers:
        layer.takes = INT8 if compiled and name == TORCH else None
    return note


def fastest_of(offers: list[Timings]) -> tuple[str | None, str | None]:
    """Returns the way that is the fastest for the slowest rank, among those that all ranks have, and a note for the user.

    Where there is none, each layer rounds its tokens and multiplies by itself.
    """
    slowest = {
        name: max(offer.milliseconds[name] for offer in offers)
        for name in (TORCH, KITCHEN)
        if all(name in offer.milliseconds for offer in offers)
    }
    name = min(slowest, key=slowest.get, default=None)
    left_out = {other: reason for offer in offers for other, reason in offer.left_out.items()}
    without = "".join(f"; without {other}: {reason}" for other, reason in left_out.items())
    if len(slowest) > 1:
        note = f"int8 products: {name}, the faster of 2 here{without}"
        return name, note if without else Information(note)
    return name, f"int8 products: {name or 'not fused, so slower'}{without}" if without else None


def alone(device: torch.device) -> Timings:
    """Returns the only way without fused kernels: comfy-kitchen where it is, else torch, which rounds in several passes."""
    if device.type == "cpu":
        return Timings({TORCH: 0.0})
    reason = why_no_kitchen(device)
    return Timings({TORCH: 0.0}, {KITCHEN: f"{reason}, so slower"}) if reason else Timings({KITCHEN: 0.0})


@cache
def measured(device: torch.device, dtype: torch.dtype, features: int) -> Timings:
    """Returns the times of the ways that work with fused kernels, read from disk or measured now; of one alone the time is 0.

    Args:
        device, dtype: of the tokens.
        features: of a token.
    """
    reasons = {TORCH: why_not_rounded(device, dtype, features)}
    if device.type != "cpu":
        reasons[KITCHEN] = why_no_kitchen(device)
    left_out = {name: reason for name, reason in reasons.items() if reason}
    able = {name: 0.0 for name in reasons if name not in left_out}
    if len(able) < 2:
        # That comfy-kitchen is missing matters only where its product would be needed.
        return Timings(able, {} if TORCH in able else left_out)
    key = f"{torch.cuda.get_device_name(device)}, {NAMES[dtype]}, int8 layers of {features} features"
    versions = f"torch {torch.__version__}, driver {driver_version()}, comfy-kitchen {version_of('comfy-kitchen')}"
    found = timings.read(key, versions)
    if found is None:
        with current(device), torch.inference_mode():
            found = timed(list(able), device, dtype, features)
        if not found.left_out:  # else, as when memory is short, the next process may do better
            timings.keep(key, versions, found)
    return found


def timed(names: list[str], device: torch.device, dtype: torch.dtype, features: int) -> Timings:
    """Times ways in turn. One that fails is left out."""
    try:
        sample, left_out = Sample(device, dtype, features, TIMED), {}
    except torch.OutOfMemoryError as error:
        return Timings({}, dict.fromkeys(names, reason_of(error)))
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 + ROUNDS):  # the first one prepares
        for name in found.keys() - left_out.keys():
            try:
                found[name].append(seconds_of(sample, name))
            except Exception as error:  # as many kinds as there are kernels
                left_out[name] = reason_of(error)
    return Timings({name: 1e3 * min(found[name]) for name in names if name not in left_out}, left_out)


def seconds_of(sample: "Sample", name: str) -> float:
    """Returns the seconds of one call."""
    torch.cuda.synchronize(sample.device)
    began = time.perf_counter()
    for _ in range(CALLS):
        sample.run(block.triton_kernels(), INT8 if name == TORCH else None)
    torch.cuda.synchronize(sample.device)
    return (time.perf_counter() - began) / CALLS


def random_layer(outputs: int, inputs: int, like: dict, generator: torch.Generator) -> Int8Linear:
    """Returns a layer with random weights, which are never in memory in more than 8 bits."""
    layer, device = Int8Linear(torch.nn.Linear(inputs, outputs, device="meta", dtype=like["dtype"])), like["device"]
    weight = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=INT8, generator=generator)
    scales = torch.full((outputs, 1), inputs**-0.5 / 73, device=device, dtype=torch.float32)  # such numbers spread by 73
    layer.weight, layer.scales = (torch.nn.Parameter(part, requires_grad=False) for part in (weight, scales))
    layer.bias = torch.nn.Parameter(torch.zeros(outputs, **like), requires_grad=False)
    return layer


class Sample:
    """The layers of a block in int8 with random weights, and tokens: what is rounded once and multiplied three times, and a feed-forward.

    Args:
        device, dtype: of the tokens.
        features: of a token.
        tokens: their number.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, features: int, tokens: int):
        self.device, generator = device, torch.Generator(device).manual_seed(0)
        like = {"device": device, "dtype": dtype}
        sizes = (features, features), (4 * features, features), (features, 4 * features)
        self.layers = [random_layer(*size, like, generator) for size in sizes]
        self.norm = torch.nn.LayerNorm(features, **like)
        self.states = torch.randn(1, tokens, features, device=device, generator=generator).to(dtype)
        self.conditions = torch.randn(1, CONDITIONS * features, device=device, generator=generator).to(dtype)

    def run(self, kernels, takes: torch.dtype | None) -> list[torch.Tensor]:
        """Computes with fused kernels, which round tokens for the layers, or with layers that round them themselves."""
        for layer in self.layers:
            layer.takes = takes
        project, up, down = self.layers
        inputs = kernels.modulate(self.states, self.norm, self.conditions, 1, rounded=takes)
        return [*(project(*inputs) for _ in range(3)), down(*kernels.gelu(up, inputs, "tanh", rounded=takes))]


@once
def why_not_rounded(device: torch.device, dtype: torch.dtype, features: int) -> str | None:
    """Returns why fused kernels cannot round tokens for layers in int8, in one line, or None. Also compiles them."""
    with torch.inference_mode():
        sample = Sample(device, dtype, features, TRIED)
        found, expected = sample.run(block.triton_kernels(), INT8), sample.run(TorchBlockOps(), None)
    near = all(is_near(ours, other, NEAR) for ours, other in zip(found, expected))
    return None if near else "its results are wrong with this version of Triton"
