"""The names of a LoRA file's tensors: which layer each is for, and what the file is made for if they fit none.

Layers may be named as in diffusers and PEFT (now or before it had adapters), in CogVideoX-Fun's kohya-style trainer, or in ComfyUI's
own CogVideoX.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.|(model\.)?diffusion_model\.|lora_unet_+|lora_transformer_)?")
TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down|(?:lora|lora_linear_layer)\.down)|(?P<up>lora_B|lora_up|(?:lora|lora_linear_layer)\.up)"
    r"|alpha)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?:weight|(?P<bias>bias)))?"
)
PROCESSOR = {r"\.processor\.to_out_lora\.": ".to_out.0.lora.", r"\.processor\.(to_[qkv])_lora\.": r".\1.lora."}
"""Names of diffusers before PEFT, whose attention processors had the LoRA, to those of layers."""
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
class Sorted:
    """A file's tensors by what they are for."""

    layers: dict[str, dict[str, str]]
    """By layer: the names of its tensors ``down``, ``up``, ``alpha``, and ``bias``, which belongs to ``up``."""
    unknown: list[str]
    """Names that match no layer."""
    adapters: list[str]
    """The adapters' names in PEFT's sense; usually one without a name."""


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


def sort_tensors(names: Iterable[str], layers: Iterable[str]) -> Sorted:
    """Groups a file's tensors by layer."""
    known = layer_names(layers)
    found: dict[str, dict[str, str]] = {}
    unknown, adapters = [], set()
    for name in names:
        match = TENSOR.fullmatch(plain_name(name))
        layer = match and known.get(match["layer"])
        if not layer or (match["bias"] and not match["up"]):
            unknown.append(name)
            continue
        part = "down" if match["down"] else "bias" if match["bias"] else "up" if match["up"] else "alpha"
        found.setdefault(layer, {})[part] = name
        if part != "alpha":
            adapters.add(match["adapter"] or "")
    return Sorted(found, unknown, sorted(adapters))


def plain_name(name: str) -> str:
    """Returns a tensor's name without its prefix, with the layer's name where an attention processor had the LoRA."""
    name = PREFIX.sub("", name, count=1)
    for pattern, replacement in PROCESSOR.items():
        name = re.sub(pattern, replacement, name)
    return name


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
