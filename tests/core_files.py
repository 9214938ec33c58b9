"""Small weights in the files that ComfyUI's own loaders read, and the checkpoint folder of the same weights."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from parallel_backend.cogvideox.random_weights import fill

from .comfyui_server import find_comfyui
from .single_files import republish, save_as

PUBLISHED = {"max_text_seq_length": 226, "sample_width": 300, "sample_height": 300, "sample_frames": 81}
HEAD_OF_THE_CORE = {"attention_head_dim": 64, "num_attention_heads": 2}
"""The core takes the heads' size for granted."""
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 10240, "num_layers": 24, "num_heads": 4, "vocab_size": 32128}


@dataclass(frozen=True)
class CoreFiles:
    """Paths of one model."""

    folder: Path
    """In diffusers layout, with a tokenizer and a text encoder like the real ones."""
    transformer: Path
    """With the core's names."""
    text_encoder: Path
    vae: Path

    def link_into(self, models: Path) -> None:
        """Puts all into ComfyUI's model folders, under the names ``cog`` and ``cog.safetensors``."""
        places = {
            "CogVideo/cog": self.folder,
            "diffusion_models/cog.safetensors": self.transformer,
            "text_encoders/cog.safetensors": self.text_encoder,
            "vae/cog.safetensors": self.vae,
        }
        for name, path in places.items():
            (models / name).parent.mkdir(parents=True, exist_ok=True)
            (models / name).symlink_to(path)


def make(checkpoint: Path, root: Path) -> CoreFiles:
    """The files of a small CogVideoX 1.5, T5 and VAE."""
    folder = republish(checkpoint, root / "folder", **PUBLISHED, **HEAD_OF_THE_CORE)
    encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **T5)).eval()
    fill(encoder, torch.Generator().manual_seed(6))
    shutil.rmtree(folder / "text_encoder")
    encoder.save_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(find_comfyui() / "comfy" / "text_encoders" / "t5_tokenizer", folder / "tokenizer")
    return CoreFiles(
        folder,
        save_as(folder, root / "transformer.safetensors", "core"),
        folder / "text_encoder" / "model.safetensors",
        folder / "vae" / "diffusion_pytorch_model.safetensors",
    )
