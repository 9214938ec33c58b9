"""Which part of a transformer's weights one rank keeps, and a model that is filled with exactly that part.

Weights come from the disk one by one, each straight to where it stays: a rank reads its own rows or columns of what is split,
and never holds a whole copy on the CPU on the way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import RequestError
from . import weights

BLOCKS = "transformer_blocks."
BY_ROWS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
"""Layers of a block whose outputs, heads or hidden features, are split by ``tensor``."""
BY_COLUMNS = ("attn1.to_out.0", "ff.net.2")
"""Those whose inputs are: the products of all ranks are to be added."""
MODULATION = ("norm1.linear", "norm2.linear")
"""What makes scales, shifts and gates of the timestep: a seventh of a block. A rank has some rows, and their few outputs are joined."""


@dataclass(frozen=True)
class Shard:
    """One rank's part: its heads and hidden features of every block, and of what that leaves its rows."""

    tensor: int = 1
    tensor_rank: int = 0
    fsdp: int = 1
    fsdp_rank: int = 0

    def of_tensor(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What ``tensor`` leaves this rank of a weight of the whole model, by its name there."""
        layer, _, kind = name.removeprefix(BLOCKS).partition(".")[2].rpartition(".")
        parts = [slice(0, length) for length in shape]
        split = 0 if layer in (*BY_ROWS, *MODULATION) else 1 if layer in BY_COLUMNS and kind == "weight" else None
        if split is not None and name.startswith(BLOCKS):
            length = shape[split] // self.tensor
            parts[split] = slice(self.tensor_rank * length, (self.tensor_rank + 1) * length)
        return tuple(parts)

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What this rank keeps of a weight: rows are dealt out as :func:`torch.chunk` does, so the last may get fewer or none."""
        first, *others = self.of_tensor(name, shape)
        if name.startswith(BLOCKS):
            length = -(-(first.stop - first.start) // self.fsdp)
            start = min(first.start + self.fsdp_rank * length, first.stop)
            first = slice(start, min(start + length, first.stop))
        return first, *others

    def is_added_elsewhere(self, name: str) -> bool:
        """Whether this is the bias of products that are added over ranks, of which the first alone brings it."""
        return self.tensor_rank > 0 and name.endswith(tuple(f".{layer}.bias" for layer in BY_COLUMNS))

    def read(self, wanted: dict[str, weights.Stored]) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of stored weights, one by one, on the CPU and as they are stored."""
        for name, piece in weights.tensors(wanted, self.of):
            yield name, torch.zeros_like(piece) if self.is_added_elsewhere(name) else piece

    def cut(self, model) -> None:
        """Gives a model without weights this rank's heads and hidden features."""
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
    """diffusers' transformer of a configuration, ready but for its weights, which have no memory yet.

    Buffers that are computed and not stored, such as 2b's positions, are there, in float32.
    """
    from accelerate import init_empty_weights
    from diffusers import CogVideoXTransformer3DModel

    with init_empty_weights():
        model = CogVideoXTransformer3DModel.from_config(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return model.eval()


def find(model, stored: dict[str, weights.Stored]) -> dict[str, weights.Stored]:
    """Where each weight of a skeleton lies.

    Raises:
        RequestError: naming one that the checkpoint lacks, or has in another shape.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if missing := sorted(shapes.keys() - stored.keys()):
        raise RequestError(f"the transformer lacks {len(missing)} weights, such as {missing[0]}; download it again")
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise RequestError(
                f"the transformer's {name} has the shape {stored[name].shape} and its configuration asks for {shape}; "
                "download weights and config.json again, both"
            )
    return {name: stored[name] for name in shapes}


@torch.no_grad()
def fill(
    model, wanted: dict[str, weights.Stored], *, shard: Shard, dtype: torch.dtype, device, home, look: Callable[[], None]
) -> None:
    """Reads a skeleton's weights, those of blocks that are another rank's left out.

    Args:
        model: of :func:`skeleton`, cut and wrapped since.
        wanted: where the checkpoint has each.
        shard: this rank's part.
        dtype: to compute in.
        device: where weights are converted.
        home: where they stay.
        look: called before each weight; may raise, to stop.
    """
    for name, piece in shard.read({name: wanted[name] for name in held(model) & wanted.keys()}):
        look()
        layer, _, kind = name.rpartition(".")
        module = model.get_submodule(layer)
        piece = piece.to(device=device, dtype=dtype)
        if kind == "weight" and hasattr(module, "set_weight"):  # an Fp8Linear
            module.set_weight(piece, home)
        else:
            put(module, kind, piece.to(home))
    model.to(home)  # buffers that were computed


def held(model) -> set[str]:
    """The names of the weights that a model has here; those of stored ones, and maybe more."""
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def put(module: nn.Module, name: str, piece: torch.Tensor) -> None:
    """Makes a rank's piece the weight of a module: in place where there is one, which ``fsdp`` may know the address of."""
    weight = getattr(module, name)
    if name in module._buffers:
        module._buffers[name] = piece
        return
    if not weight.is_meta:
        local(weight).copy_(piece)
        return
    if is_spread(weight):
        from torch.distributed.tensor import DTensor

        layout = {"shape": weight.shape, "stride": weight.stride(), "run_check": False}
        piece = DTensor.from_local(piece.contiguous(), weight.device_mesh, weight.placements, **layout)
    setattr(module, name, nn.Parameter(piece, requires_grad=False))


def is_spread(weight: torch.Tensor) -> bool:
    """Whether a weight is one of ``fsdp``'s, of which this rank has some rows: a ``DTensor``, which not every torch has."""
    return hasattr(weight, "to_local")


def local(weight: torch.Tensor) -> torch.Tensor:
    """What of a weight lies on this rank."""
    return weight.to_local() if is_spread(weight) else weight
