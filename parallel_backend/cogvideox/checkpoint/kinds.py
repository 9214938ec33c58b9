"""Recognises by the names of its weights what is not a plain CogVideoX transformer."""

import re
from collections.abc import Iterable
from typing import Any

from ...errors import RequestError

OTHERS = {
    "lora": "a LoRA, which goes on top of a model",
    "encoder.block.0.layer.0.selfattention": "a T5 text encoder: load it with the core's CLIPLoader (type cogvideox)",
    "decoder.conv_in.": "a VAE: load it with the core's VAELoader",
    "decoder.conv1.": "a VAE, and not CogVideoX's",
    "blocks.0.self_attn.q.": "a Wan",
    "double_blocks.0.": "a Flux or HunyuanVideo",
    "joint_blocks.0.": "a Stable Diffusion 3",
    "input_blocks.0.": "a Stable Diffusion",
}
"""Parts of weight names that identify other kinds of files, with a description for the message."""
OTHER_FORMS = {
    r"\.Q\d\w*_qweight$": "is quantised as GGUF inside safetensors, as for the CogVideoX wrapper; use the file in bf16, fp16 or plain FP8",
    r"(scale|quant)[^.]*$": "is quantised with scales; use the plain bf16 or fp16 file, or plain FP8",
    r"(^|\.)mixins\.|query_key_value": "has the layout of CogVideoX's training code (SAT); convert it with "
    "tools/convert_weight_sat2hf.py of zai-org/CogVideo, or use the model in diffusers layout",
    r"controlnet_encode|controlnet_blocks|out_projectors": "is a ControlNet, which goes with a model; use Load CogVideoX ControlNet and "
    "Apply CogVideoX ControlNet (--controlnet)",
    r"\.to_qkv\.": "has fused query, key and value layers (diffusers' fuse_qkv_projections); use the model as it was before they were fused",
}
"""Patterns of weight names that only other forms of a CogVideoX have, with what they are and what to do."""
ADDITIONS = {
    r"traj_extractor|fuser_list|flow_(gamma|beta)_": "Tora's motion part",
    r"combine_linear": "a control branch, such as Diffusion as Shader's",
    r"perceiver|facial_extractor|face_": "ConsisID's face part",
    r"lora_": "a LoRA inside",
}
"""Patterns of weight names that models with additions have, with a name for the addition."""

BLOCK = (
    "norm1.linear", "norm1.norm", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.norm_q", "attn1.norm_k", "attn1.to_out.0",
    "norm2.linear", "norm2.norm", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
ENDS = (
    "patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "norm_final", "norm_out.linear",
    "norm_out.norm", "proj_out",
)  # fmt: skip
OFS = ("ofs_embedding.linear_1", "ofs_embedding.linear_2")


def expected_weights(config: dict[str, Any]) -> set[str]:
    """Returns the names of all weights of a CogVideoX transformer with this configuration."""
    layers = [*ENDS, *(OFS if config.get("ofs_embed_dim") else ())]
    layers += [f"transformer_blocks.{index}.{layer}" for index in range(config.get("num_layers", 30)) for layer in BLOCK]
    positions = ["patch_embed.pos_embedding"] if config.get("use_learned_positional_embeddings") else []
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | set(positions)


def check(name: str, names: Iterable[str]) -> None:
    """Raises RequestError if a checkpoint has another form than diffusers' or the core's, naming it and what to do.

    Args:
        name: of the file or folder, for the message.
        names: of its weights.
    """
    for weight in sorted(names):
        for pattern, what in OTHER_FORMS.items():
            if re.search(pattern, weight):
                raise RequestError(f"{name} {what} (it has {weight})")


def addition_of(unknown: Iterable[str]) -> str:
    """Returns what a model has besides CogVideoX's weights, judged by their names."""
    found = (what for pattern, what in ADDITIONS.items() if any(re.search(pattern, name) for name in unknown))
    return next(found, "additions")


def looks_like(names: Iterable[str]) -> str:
    """Returns what kind of file has these weights, as the rest of a message; empty if unknown."""
    joined = "\n".join(names).lower()
    return next((f" but {what}" for part, what in OTHERS.items() if part in joined), "")
