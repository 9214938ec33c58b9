"""LoRA files with random weights, in the layouts of common trainers."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint

Change = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""The down and up matrices of each layer, by diffusers' name."""
ATTENTION = r"attn1\.to_(q|k|v|out\.0)"


def random_change(folder: Path, *, layers: str = ATTENTION, rank: int = 4, seed: int = 0, size: float = 1.0) -> Change:
    """Returns a change of the layers whose names end in a pattern, large enough to be visible in the latents."""
    generator = torch.Generator().manual_seed(seed)
    change = {}
    for layer, (rows, *columns) in sorted(Checkpoint.open(folder).layer_shapes.items()):
        if re.search(rf"(^|\.)({layers})$", layer):
            down = torch.randn(rank, *columns, generator=generator) * down_size(columns)
            up = torch.randn(rows, rank, *[1] * (len(columns) - 1), generator=generator) * rank**-0.5 * 0.3 * size
            change[layer] = (down, up)
    assert change
    return change


def down_size(columns: list[int]) -> float:
    """Returns the standard deviation of weights that keeps the scale of a layer's output."""
    return torch.Size(columns).numel() ** -0.5


def diffusers_layout(change: Change, prefix: str = "transformer.", adapter: str = "") -> dict[str, torch.Tensor]:
    """Returns the tensors with the names of diffusers and PEFT."""
    tensors = {}
    for layer, (down, up) in change.items():
        tensors |= {f"{prefix}{layer}.lora_A{adapter}.weight": down, f"{prefix}{layer}.lora_B{adapter}.weight": up}
    return tensors


def fun_layout(change: Change, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Returns the tensors with the names of CogVideoX-Fun's kohya-style trainer."""
    tensors = {}
    for layer, (down, up) in change.items():
        name = "lora_unet__" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def core_layout(change: Change) -> dict[str, torch.Tensor]:
    """Returns the tensors with the layer names of ComfyUI's own CogVideoX."""
    names = {"attn1.to_out.0": "attn_out", "attn1.to_": "", "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out",
             "transformer_blocks": "blocks", "time_embedding.": "time_embedding_"}  # fmt: skip
    tensors = {}
    for layer, (down, up) in change.items():
        for ours, theirs in names.items():
            layer = layer.replace(ours, theirs)
        tensors |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Saves a file. Returns its path."""
    save_file(tensors, path, metadata)
    return str(path)
