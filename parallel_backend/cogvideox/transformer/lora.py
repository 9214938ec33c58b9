"""LoRA files: validated by their headers, and merged into a transformer's weights.

Layers may be named as in diffusers and PEFT, in CogVideoX-Fun's kohya-style trainer, or in ComfyUI's own CogVideoX. No merge is
undone: the checkpoint's weights are read again for the layers that change, so the result depends only on the current LoRAs.
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
from .fp8_linear import Fp8Linear

SUFFIXES = (".safetensors", ".sft")
PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.|(model\.)?diffusion_model\.|lora_unet_+|lora_transformer_)?")
TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up)|alpha)(?:\.default)?(?:\.weight)?"
)
TEXT = re.compile(r"lora_te|text_encoder")
CORE_NAMES = {
    r"^transformer_blocks\.": "blocks.",
    r"\.attn1\.to_([qkv])$": r".\1",
    r"\.attn1\.to_out\.0$": ".attn_out",
    r"\.ff\.net\.0\.proj$": ".ff_proj",
    r"\.ff\.net\.2$": ".ff_out",
    r"^(time|ofs)_embedding\.": r"\1_embedding_",
}
"""Layer names: diffusers' to those of ComfyUI's own CogVideoX (0.33)."""
OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "lora_mid": "LoCon"}
OTHER_MODELS = {
    r"(down|up|input|output)_blocks|mid(dle)?_block": "Stable Diffusion",
    r"(double|single)(_transformer)?_blocks": "Flux or HunyuanVideo",
    r"blocks[._]\d+[._](self|cross)_attn": "Wan",
    r"transformer_blocks[._]\d+[._]attn2": "LTX-Video",
    r"joint_blocks|transformer_blocks[._]\d+[._]attn[._]": "Stable Diffusion 3 or Qwen-Image",
}
"""Layer names of other models whose LoRAs are often tried; the first match is reported."""


@dataclass(frozen=True)
class Pair:
    """A layer's update, ``scale * up @ down``; the names are those of tensors in the file."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, opened for one checkpoint without reading its weights. Create it with :meth:`open`."""

    path: Path
    strength: float
    state: tuple
    """The file's fingerprint."""
    pairs: dict[str, Pair]
    """By the transformer's layer."""
    note: str | None
    """A note for the user if part of the file does not match the checkpoint."""

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
        found, unknown = sort_tensors(shapes, checkpoint.layer_shapes)
        if not any({"down", "up"} & tensors.keys() for tensors in found.values()):
            raise RequestError(f"{path.name} {describe_misfit(list(shapes))}: use a LoRA made for {checkpoint.name}")
        ranks = {layer: check_layer(path, layer, tensors, shapes, checkpoint) for layer, tensors in found.items()}
        scales = read_scales(path, found, ranks)
        pairs = {layer: Pair(tensors["down"], tensors["up"], scales[layer]) for layer, tensors in found.items()}
        unused = f"{path.name}: {len(unknown)} of {len(shapes)} tensors fit no layer and are not used, such as {some(unknown)}"
        return cls(path, lora.strength, weights.fingerprint([path]), pairs, unused if unknown else None)

    @property
    def describe(self) -> str:
        """One line for the user."""
        return f"{self.path.name}: LoRA for {len(self.pairs)} layers, strength {self.strength:g}"


def open_all(loras: Iterable[Lora], checkpoint: Checkpoint) -> tuple[LoraFile, ...]:
    """Opens a model's LoRAs; see :meth:`LoraFile.open`."""
    return tuple(LoraFile.open(lora, checkpoint) for lora in loras)


def some(names: Sequence[str]) -> str:
    """Returns the first few names, for messages."""
    return ", ".join(names[:3])


def layer_names(layers: Iterable[str]) -> dict[str, str]:
    """Maps every name that a LoRA may use for these layers to diffusers': with dots or underscores, or as in ComfyUI."""
    found = {}
    for layer in layers:
        core = layer
        for pattern, replacement in CORE_NAMES.items():
            core = re.sub(pattern, replacement, core)
        for name in (layer, core):
            found[name] = found[name.replace(".", "_")] = layer
    return found


def sort_tensors(names: Iterable[str], layers: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Groups a file's tensors by layer, as ``down``, ``up`` or ``alpha``; also returns the names that match no layer."""
    known = layer_names(layers)
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for name in names:
        match = TENSOR.fullmatch(PREFIX.sub("", name, count=1))
        layer = match and known.get(match["layer"])
        if not layer:
            unknown.append(name)
            continue
        part = "down" if match["down"] else "up" if match["up"] else "alpha"
        found.setdefault(layer, {})[part] = name
    return found, unknown


def describe_misfit(names: list[str]) -> str:
    """Returns why no tensor of a file matches CogVideoX, as the rest of a message."""
    if not names:
        return "is empty"
    if all(TEXT.match(name) for name in names):
        return f"changes only a text encoder ({some(names)})"
    return f"fits no layer of CogVideoX ({some(names)}){look_of(names)}"


def look_of(names: Iterable[str]) -> str:
    """Returns the model that a file seems to be made for, as the end of a message; empty if unknown."""
    for pattern, model in OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in names):
            return f" and looks made for {model}"
    return ""


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
    return rank


def read_scales(path: Path, found: dict[str, dict[str, str]], ranks: dict[str, int]) -> dict[str, float]:
    """Reads the scale of each layer's update: alpha / rank if the file has an alpha, else 1.

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


def peft_scale(config: dict, layer: str, rank: int) -> float:
    """Returns a layer's scale from a PEFT configuration, whose patterns match the end of a layer's name."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    if alpha is None:
        return 1.0
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
    names = {f"{layer}.weight" for lora in (*before, *loras) for layer in lora.pairs} & held(transformer)
    with ExitStack() as stack:
        opened = [(lora, stack.enter_context(safe_open(lora.path, "pt"))) for lora in loras]
        for name, base in shard.read({name: checkpoint.stored[name] for name in names}):
            layer = name.removesuffix(".weight")
            module = transformer.get_submodule(layer)
            quantized = isinstance(module, Fp8Linear)
            merged = base.to(device=device, dtype=module.dtype if quantized else module.weight.dtype).float()
            rows, *columns = shard.of(name, checkpoint.stored[name].shape)
            for lora, file in opened:
                if pair := lora.pairs.get(layer):
                    down, up = (file.get_tensor(half).to(device).float().flatten(1) for half in (pair.down, pair.up))
                    if len(columns) == 1:  # a linear layer; convolutions are never split
                        down = down[:, columns[0]]
                    merged = merged + lora.strength * pair.scale * (up[rows] @ down).view_as(merged)
            if quantized:
                module.set_weight(merged, module.weight.device)
            else:
                put(module, "weight", merged)
