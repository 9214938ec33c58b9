"""Sharded loading: which part of the transformer's weights a rank keeps, and how that part is read.

Weights are read one at a time, each directly to its final device. A rank reads only its own rows or columns of a split weight
and never holds a full copy on the CPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...errors import RequestError
from . import weights
from .libraries import member

BLOCKS = "transformer_blocks."
BY_ROWS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
"""A block's layers that tensor parallelism splits by output: heads or hidden features."""
BY_COLUMNS = ("attn1.to_out.0", "ff.net.2")
"""A block's layers that it splits by input; their outputs are summed over ranks."""
MODULATION = ("norm1.linear", "norm2.linear")
"""The layers that compute shifts, scales and gates from the timestep: a seventh of a block's weights. They are split by output,
and the small outputs are gathered."""


@dataclass(frozen=True)
class Shard:
    """One rank's part of the weights: tensor parallelism splits heads and hidden features, FSDP splits the rest by rows."""

    tensor: int = 1
    tensor_rank: int = 0
    fsdp: int = 1
    fsdp_rank: int = 0

    def of_tensor(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Returns the slices of a weight that tensor parallelism assigns to this rank.

        Args:
            name: of the weight in the full model.
            shape: of the full weight.
        """
        layer, _, kind = name.removeprefix(BLOCKS).partition(".")[2].rpartition(".")
        parts = [slice(0, length) for length in shape]
        split = 0 if layer in (*BY_ROWS, *MODULATION) else 1 if layer in BY_COLUMNS and kind == "weight" else None
        if split is not None and name.startswith(BLOCKS):
            length = shape[split] // self.tensor
            parts[split] = slice(self.tensor_rank * length, (self.tensor_rank + 1) * length)
        return tuple(parts)

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Returns the slices of a weight that this rank keeps.

        FSDP splits rows as :func:`torch.chunk` does, so the last rank may have fewer or none.
        """
        first, *others = self.of_tensor(name, shape)
        if name.startswith(BLOCKS):
            length = -(-(first.stop - first.start) // self.fsdp)
            start = min(first.start + self.fsdp_rank * length, first.stop)
            first = slice(start, min(start + length, first.stop))
        return first, *others

    def is_added_elsewhere(self, name: str) -> bool:
        """Returns whether this is a bias that another rank adds.

        Outputs are summed over ranks, so only the first one adds the bias.
        """
        return self.tensor_rank > 0 and name.endswith(tuple(f".{layer}.bias" for layer in BY_COLUMNS))

    def read(self, wanted: dict[str, weights.Stored]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields this rank's part of the weights one at a time, on the CPU and in their stored dtype."""
        for name, piece in weights.tensors(wanted, self.of):
            yield name, torch.zeros_like(piece) if self.is_added_elsewhere(name) else piece

    def cut(self, model) -> None:
        """Reduces a model without weights to this rank's heads and hidden features."""
        if self.tensor == 1:
            return
        for name, weight in list(model.named_parameters()):
            layer, _, kind = name.rpartition(".")
            piece = weight[self.of_tensor(name, tuple(weight.shape))].contiguous()
            setattr(model.get_submodule(layer), kind, nn.Parameter(piece, requires_grad=False))
        for block in model.transformer_blocks:
            block.attn1.heads //= self.tensor


WHOLE = Shard()


def skeleton(config: dict[str, Any], dtype: torch.dtype):
    """Creates diffusers' transformer with its parameters on the meta device.

    Computed buffers that are not stored, such as 2b's positions, are allocated, in float32.
    """
    transformer = member("diffusers", "CogVideoXTransformer3DModel")
    return empty(lambda: transformer.from_config(config), dtype)


def empty(make: Callable[[], nn.Module], dtype: torch.dtype):
    """Creates a module with its parameters on the meta device; see :func:`skeleton`."""
    with ParametersOnMeta():
        model = make()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.to("meta", dtype), requires_grad=False))
    return model.eval()


class ParametersOnMeta(TorchFunctionMode):
    """Within, this thread allocates and initialises no parameters.

    It holds for one thread. accelerate's ``init_empty_weights`` changes torch's modules for all of them, and would take the
    weights from a model that another thread reads, such as a text encoder while the panel asks for plans.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # Layers create their weights with torch.empty, and computed buffers otherwise.
        created = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **created})


def find(model, stored: dict[str, weights.Stored], part: str = "the transformer") -> dict[str, weights.Stored]:
    """Returns the location of each of a skeleton's weights.

    Args:
        model: without weights.
        stored: what the file has.
        part: the model in words, for messages.
    Raises:
        RequestError: if a weight is missing, or has another shape.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    missing = sorted(shapes.keys() - stored.keys())
    if missing == ["patch_embed.pos_embedding"]:
        raise RequestError(
            f"the configuration asks for learned positions, and the weights have no {missing[0]}: set use_learned_positional_embeddings to "
            "false in transformer/config.json, and task to image in Load CogVideoX (--task image)"
        )
    if missing:
        raise RequestError(f"{part} lacks {len(missing)} weights, such as {missing[0]}; download it again")
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise RequestError(
                f"{part} has {name} in the shape {stored[name].shape} and the configuration asks for {shape}; "
                "download weights and config.json again, both"
            )
    return {name: stored[name] for name in shapes}


@torch.no_grad()
def fill(
    model,
    wanted: dict[str, weights.Stored],
    *,
    shard: Shard = WHOLE,
    dtype: torch.dtype,
    device: torch.device | str,
    home: torch.device | str,
    look: Callable[[float], None] = lambda share: None,
) -> None:
    """Reads the weights that a skeleton has on this rank.

    Args:
        model: from :func:`skeleton`; it may have been cut and sharded since.
        wanted: location of each weight in the checkpoint.
        shard: this rank's part.
        dtype: compute dtype.
        device: where weights are converted.
        home: where weights are stored.
        look: called before each weight with the share of bytes read so far; may raise to cancel.
    """
    mine = {name: wanted[name] for name in held(model) & wanted.keys()}
    whole, done = sum(stored.size for stored in mine.values()), 0
    for name, piece in shard.read(mine):
        look(done / whole)
        done += mine[name].size
        layer, _, kind = name.rpartition(".")
        module = model.get_submodule(layer)
        piece = piece.to(device=device, dtype=dtype)
        if kind == "weight" and hasattr(module, "set_weight"):  # a QuantizedLinear
            module.set_weight(piece, home)
        else:
            put(module, kind, piece.to(home))
    model.to(home)  # computed buffers


def held(model) -> set[str]:
    """Returns the names of the parameters and buffers that a model has on this rank.

    Some of them may not be in the checkpoint.
    """
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def put(module: nn.Module, name: str, piece: torch.Tensor) -> None:
    """Sets a module's weight to this rank's part.

    An allocated weight is overwritten in place, as FSDP may hold its address.
    """
    weight = getattr(module, name)
    if name in module._buffers:
        module._buffers[name] = piece
        return
    if not weight.is_meta:
        local(weight).copy_(piece)
        return
    if is_sharded(weight):
        from torch.distributed.tensor import DTensor

        layout = {"shape": weight.shape, "stride": weight.stride(), "run_check": False}
        piece = DTensor.from_local(piece.contiguous(), weight.device_mesh, weight.placements, **layout)
    setattr(module, name, nn.Parameter(piece, requires_grad=False))


def is_sharded(weight: torch.Tensor) -> bool:
    """Returns whether FSDP shards this weight. It is then a ``DTensor``, a class that older versions of torch lack."""
    return hasattr(weight, "to_local")


def local(weight: torch.Tensor) -> torch.Tensor:
    """Returns the part of a weight that is on this rank."""
    return weight.to_local() if is_sharded(weight) else weight
