"""Small models as single files, in each layout that ComfyUI users have."""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from benchmarks.random_weights import fill

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SHARDS = "transformer/diffusion_pytorch_model-*-of-*.safetensors"
"""The files of a large model."""
TO_CORE = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_out\.0\.", ".attn_out."),
    (r"\.attn1\.to_([qkv])\.", r".\1."),
    (r"\.attn1\.norm_([qk])\.", r".norm_\1."),
    (r"\.ff\.net\.0\.proj\.", ".ff_proj."),
    (r"\.ff\.net\.2\.", ".ff_out."),
    (r"^(time|ofs)_embedding\.linear_([12])\.", r"\1_embedding_linear_\2."),
)
"""From diffusers' names to those of ComfyUI's own CogVideoX; tests/test_core_parts.py compares them with it."""
LAYOUTS = ("diffusers", "core", "prefixed")


def core_name(name: str) -> str:
    """Returns the core's name of a weight."""
    for pattern, replacement in TO_CORE:
        name = re.sub(pattern, replacement, name)
    return name


def save_as(folder: Path, path: Path, layout: str, dtype: torch.dtype | None = None) -> Path:
    """Saves the transformer of a checkpoint folder as one file.

    Args:
        folder: the checkpoint, in diffusers layout.
        path: the file to write.
        layout: the names: ``diffusers`` (the wrapper's files), ``core``, or ``prefixed`` (the core's, in a whole checkpoint).
        dtype: for the blocks' matrices, as in the wrapper's FP8 files; None keeps theirs.
    Returns:
        The path of the file.
    """
    files = [*folder.glob(SHARDS)] or [folder / WEIGHTS]
    state = {name: weight for file in files for name, weight in load_file(file).items()}
    if dtype is not None:
        state = {
            name: weight.to(dtype) if "transformer_blocks" in name and weight.ndim > 1 else weight
            for name, weight in state.items()
        }
    if layout != "diffusers":
        state = {core_name(name): weight for name, weight in state.items()}
    if layout == "prefixed":
        state = {f"model.diffusion_model.{name}": weight for name, weight in state.items()}
        state["vae.decoder.conv_in.conv.weight"] = torch.zeros(2, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in state.items()}, path)
    return path


def republish(folder: Path, output: Path, **changes) -> Path:
    """Copies a checkpoint, with a transformer of a changed configuration and new random weights. Returns the copy's folder."""
    shutil.copytree(folder, output)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    model = CogVideoXTransformer3DModel.from_config(config | changes)
    generator = torch.Generator().manual_seed(5)
    fill(model, generator)
    if model.config.use_learned_positional_embeddings:
        positions = model.patch_embed.pos_embedding
        positions.copy_(torch.randn(positions.shape, generator=generator) * 0.5)
    model.save_pretrained(output / "transformer")
    return output
