"""LoRA files: validated by their headers, and merged into a transformer's weights.

:mod:`.lora_names` has the names of layers that are understood. No merge is undone: the checkpoint's weights are read again for the layers that change, so the result depends only on the current LoRAs.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...errors import RequestError
from ...model import Lora
from ..checkpoint import weights
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.shards import WHOLE, Shard, held, put
from .lora_names import OTHER_KINDS, describe_misfit, look_of, some, sort_tensors
from .quantized_linear import QuantizedLinear

LARGE_RANK = 64
"""The rank from which a file without an alpha may be meant for a strength of 1 / rank."""
SUFFIXES = (".safetensors", ".sft")


@dataclass(frozen=True)
class Pair:
    """A layer's update, ``scale * up @ down``; the names are those of tensors in the file."""

    down: str
    up: str
    scale: float
    bias: str | None = None
    """``scale`` times this is added to the layer's bias."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, opened for one checkpoint without reading its weights. Create it with :meth:`open`."""

    path: Path
    strength: float
    state: tuple
    """The file's fingerprint."""
    pairs: dict[str, Pair]
    """By the transformer's layer."""
    notes: tuple[str, ...]
    """For the user: part of the file does not match the checkpoint, or it may be meant for another strength."""

    @classmethod
    def open(cls, lora: Lora, checkpoint: Checkpoint) -> "LoraFile":
        """Reads the header and checks every layer against the checkpoint.

        Raises:
            RequestError: if the file is missing, not a LoRA, or made for another model.
        """
        path = Path(lora.path).expanduser()
        if not path.is_file():
            raise RequestError(f"there is no LoRA file {path}; give a .safetensors file")
        if path.suffix not in SUFFIXES:
            raise RequestError(f"the LoRA {path.name} is not a .safetensors file; only safetensors are supported: convert it")
        shapes = {name: tuple(entry["shape"]) for name, entry in weights.header(path).items()}
        for name in shapes:
            if kind := next((kind for word, kind in OTHER_KINDS.items() if word in name), None):
                raise RequestError(f"{path.name} is a {kind} ({name}); only LoRA is supported: use a file saved as plain LoRA")
        tensors_of = sort_tensors(shapes, checkpoint.layer_shapes)
        found, unknown = tensors_of.layers, tensors_of.unknown
        if len(tensors_of.adapters) > 1:
            names = ", ".join(name or "one without a name" for name in tensors_of.adapters)
            raise RequestError(f"{path.name} has several adapters ({names}); save each as a file of its own")
        if not any({"down", "up"} & tensors.keys() for tensors in found.values()):
            raise RequestError(f"{path.name} {describe_misfit(list(shapes))}: use a LoRA made for {checkpoint.name}")
        ranks = {layer: check_layer(path, layer, tensors, shapes, checkpoint) for layer, tensors in found.items()}
        scales = read_scales(path, found, ranks)
        pairs = {
            layer: Pair(tensors["down"], tensors["up"], 1.0 if scales[layer] is None else scales[layer], tensors.get("bias"))
            for layer, tensors in found.items()
        }
        notes = []
        if unknown:
            notes.append(
                f"{path.name}: {len(unknown)} of {len(shapes)} tensors fit no layer and are not used, such as {some(unknown)}"
            )
        rank = max(rank for layer, rank in ranks.items() if scales[layer] is None) if None in scales.values() else 0
        if rank >= LARGE_RANK and abs(lora.strength) * rank > 2:
            notes.append(
                f"{path.name} has rank {rank} and no alpha, so strength 1 adds all of it; if that is too much, try strength "
                f"{1 / rank:.4f}, which is 1 / rank (DimensionX's LoRAs are meant so)"
            )
        return cls(path, lora.strength, weights.fingerprint([path]), pairs, tuple(notes))

    @property
    def describe(self) -> str:
        """One line for the user."""
        return f"{self.path.name}: LoRA for {len(self.pairs)} layers, strength {self.strength:g}"


def open_all(loras: Iterable[Lora], checkpoint: Checkpoint) -> tuple[LoraFile, ...]:
    """Opens a model's LoRAs; see :meth:`LoraFile.open`."""
    return tuple(LoraFile.open(lora, checkpoint) for lora in loras)


def check_layer(path: Path, layer: str, tensors: dict[str, str], shapes: dict[str, tuple], checkpoint: Checkpoint) -> int:
    """Checks a layer's tensors and returns the rank of its update.

    Raises:
        RequestError: if one of the two is missing, or the shapes are those of another model.
    """
    if missing := sorted({"down", "up"} - tensors.keys()):
        raise RequestError(f"{path.name} lacks the {missing[0]} half of {layer}: it is incomplete; download it again")
    down, up, (rows, *columns) = shapes[tensors["down"]], shapes[tensors["up"]], checkpoint.layer_shapes[layer]
    rank, made_for, wanted = math.prod(down[:1]), (math.prod(up[:1]), math.prod(down[1:])), (rows, math.prod(columns))
    if not rank or math.prod(up[1:]) != rank or made_for != wanted:
        name = checkpoint.name
        raise RequestError(
            f"{path.name} does not fit {name}{look_of(shapes)}: it is for a {layer} of {made_for[0]}x{made_for[1]} and rank {rank}, "
            f"{name} has one of {wanted[0]}x{wanted[1]}; use a LoRA made for {name}"
        )
    if (bias := tensors.get("bias")) and (f"{layer}.bias" not in checkpoint.stored or shapes[bias] != (rows,)):
        raise RequestError(
            f"{path.name} has a bias {shapes[bias]} for {layer}, which {checkpoint.name} does not have; use another LoRA"
        )
    return rank


def read_scales(path: Path, found: dict[str, dict[str, str]], ranks: dict[str, int]) -> dict[str, float | None]:
    """Reads the scale of each layer's update: alpha / rank; None if the file has no alpha.

    An alpha is a separate tensor, or part of the configuration that diffusers saves with PEFT's LoRAs.
    """
    scales = {}
    try:
        with safe_open(path, "pt") as file:
            config = peft_config(file.metadata() or {})
            for layer, tensors in found.items():
                if "alpha" in tensors:
                    scales[layer] = file.get_tensor(tensors["alpha"]).item() / ranks[layer]
                else:
                    scales[layer] = peft_scale(config, layer, ranks[layer])
    except (SafetensorError, re.error, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise RequestError(f"the LoRA {path.name} cannot be read: {error}; download it again") from error
    return scales


def peft_config(metadata: dict[str, str]) -> dict:
    """Returns the transformer's PEFT configuration from the metadata of a file saved by diffusers; empty if there is none."""
    saved = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    return {name.removeprefix("transformer."): value for name, value in saved.items() if name.startswith("transformer.")}


def peft_scale(config: dict, layer: str, rank: int) -> float | None:
    """Returns a layer's scale from a PEFT configuration, whose patterns match the end of a layer's name; None without an alpha."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    if alpha is None:
        return None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.inference_mode()
def merge(
    transformer,
    checkpoint: Checkpoint,
    loras: Sequence[LoraFile],
    *,
    device: torch.device,
    before: Sequence[LoraFile] = (),
    shard: Shard = WHOLE,
) -> None:
    """Sets a transformer's weights to the checkpoint's with LoRAs added; without LoRAs exactly to the checkpoint's.

    Args:
        transformer: loaded from the checkpoint, without hooks that move its weights.
        checkpoint: its weights are read again for every layer that changes or was changed.
        loras: to add, in float32 with one rounding.
        device: to compute on; the weights stay on their devices.
        before: LoRAs that are merged now.
        shard: this rank's part of the weights.
    """
    pairs = [item for lora in (*before, *loras) for item in lora.pairs.items()]
    names = {f"{layer}.{kind}" for layer, pair in pairs for kind in ("weight", *(["bias"] if pair.bias else []))} & held(
        transformer
    )
    with ExitStack() as stack:
        opened = [(lora, stack.enter_context(safe_open(lora.path, "pt"))) for lora in loras]
        for name, base in shard.read({name: checkpoint.stored[name] for name in names}):
            layer, _, kind = name.rpartition(".")
            module = transformer.get_submodule(layer)
            quantized = isinstance(module, QuantizedLinear) and kind == "weight"
            merged = base.to(device=device, dtype=module.dtype if quantized else getattr(module, kind).dtype).float()
            part = shard.of(name, checkpoint.stored[name].shape)
            for lora, file in opened:
                if (pair := lora.pairs.get(layer)) and (change := change_of(pair, kind, file, part, device)) is not None:
                    merged = merged + lora.strength * pair.scale * change.view_as(merged)
            if kind == "bias" and shard.is_added_elsewhere(name):
                merged = torch.zeros_like(merged)
            if quantized:
                module.set_weight(merged, module.weight.device)
            else:
                put(module, kind, merged)


def change_of(pair: Pair, kind: str, file, part: tuple[slice, ...], device: torch.device) -> torch.Tensor | None:
    """Returns what a LoRA adds to this rank's part of a layer's ``weight`` or ``bias``, before its scale; None for nothing."""
    rows, *columns = part
    if kind == "bias":
        return None if pair.bias is None else file.get_tensor(pair.bias).to(device).float()[rows]
    down, up = (file.get_tensor(half).to(device).float().flatten(1) for half in (pair.down, pair.up))
    if len(columns) == 1:  # a linear layer; convolutions are never split
        down = down[:, columns[0]]
    return up[rows] @ down
