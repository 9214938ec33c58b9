"""Small models in files for ComfyUI's own loaders, and as checkpoint folders with the same weights."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from benchmarks.random_weights import fill

from .comfyui_server import find_comfyui
from .single_files import republish, save_as

PUBLISHED = {"max_text_seq_length": 226, "sample_width": 300, "sample_height": 300, "sample_frames": 81}
HEAD_OF_THE_CORE = {"attention_head_dim": 64, "num_attention_heads": 2}
"""The core's code assumes this size of a head."""
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 10240, "num_layers": 24, "num_heads": 4, "vocab_size": 32128}


@dataclass(frozen=True)
class CoreFiles:
    """The paths of one model."""

    folder: Path
    """A folder in diffusers layout, with a tokenizer and a text encoder like the real ones."""
    transformer: Path
    """A file with the core's names."""

    @property
    def text_encoder(self) -> Path:
        """The file of T5, as it is downloaded for the core's CLIPLoader."""
        return self.folder / "text_encoder" / "model.safetensors"

    @property
    def vae(self) -> Path:
        """The file of the VAE, for the core's VAELoader."""
        return self.folder / "vae" / "diffusion_pytorch_model.safetensors"


def make(checkpoints: dict[str, Path], root: Path) -> dict[str, CoreFiles]:
    """Makes the files of small models of CogVideoX 1.5: text to video, image to video and object removal, with one T5 for all."""
    text = root / "text"
    encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **T5)).eval()
    fill(encoder, torch.Generator().manual_seed(6))
    encoder.save_pretrained(text / "text_encoder")
    shutil.copytree(find_comfyui() / "comfy" / "text_encoders" / "t5_tokenizer", text / "tokenizer")
    found = {}
    for like in ("1.5-5b", "1.5-5b-i2v", "1.5-5b-void"):
        folder = republish(checkpoints[like], root / like, **PUBLISHED, **HEAD_OF_THE_CORE)
        for part in ("text_encoder", "tokenizer"):
            shutil.rmtree(folder / part)
            shutil.copytree(text / part, folder / part, copy_function=os.link)
        found[like] = CoreFiles(folder, save_as(folder, root / f"{like}.safetensors", "core"))
    return found


@contextmanager
def in_model_folders(files: dict[str, CoreFiles], models: Path):
    """Links the files into ComfyUI's model folders, each named after its model, and the text encoder as ``t5``."""
    places = {"text_encoders/t5.safetensors": next(iter(files.values())).text_encoder}
    for like, paths in files.items():
        places[f"CogVideo/{like}"] = paths.folder
        places[f"diffusion_models/{like}.safetensors"] = paths.transformer
        places[f"vae/{like}.safetensors"] = paths.vae
    links = {models / name: path for name, path in places.items()}
    for link, path in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    try:
        yield
    finally:
        for link in links:
            link.unlink()
