"""The configurations of the published models, for predictions about a model that is not downloaded."""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import bundled, shards, weights
from .catalogue import Published, published
from .checkpoint import Checkpoint
from .single_file import SAMPLE_SIZES, scheduler_config, vae_config

VAE_ELEMENTS, TEXT_ENCODER_ELEMENTS = 215_583_907, 4_762_310_656
"""Weight elements of the VAE and of the encoder of T5 v1.1 XXL, which all published models share."""
HEADS = {"2b": (30, 30), "5b": (42, 48), "1.5-5b": (42, 48)}
"""Blocks and heads of each base."""
CONDITION_CHANNELS = {"text": 0, "image": 16, "control": 16, "inpaint": 17, "removal": 32}
"""Input channels beside the noise, by task."""
PIPELINES = {"text": "CogVideoXPipeline", "image": "CogVideoXImageToVideoPipeline"}
"""The pipeline class in a model's index, by task; VideoX-Fun's models have their own."""


@dataclass(frozen=True)
class UnreadCheckpoint(Checkpoint):
    """A published model of which only the configuration is known. It answers what the planner asks; it cannot be loaded."""

    stored: dict[str, weights.Stored] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def stored_dtype(self) -> str:
        return "BF16" if self.rotary else "F16"


def configuration(model: Published) -> dict[str, Any]:
    """Returns the configuration of a published model's transformer."""
    layers, heads = HEADS[model.base]
    width, height, frames = SAMPLE_SIZES[model.base == "1.5-5b"]
    config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "in_channels": 16 + CONDITION_CHANNELS[model.task],
        "out_channels": 16,
        "sample_width": width,
        "sample_height": height,
        "sample_frames": frames,
        "use_rotary_positional_embeddings": model.base != "2b",
    }
    if model.base == "1.5-5b":
        config |= {"patch_size_t": 2, "patch_bias": False}
    if model.task == "image":
        config |= {"ofs_embed_dim": 512} if model.base == "1.5-5b" else {"use_learned_positional_embeddings": True}
    return config


@cache
def unread(model: Published) -> UnreadCheckpoint:
    """Returns a published model as a checkpoint whose weights are not there."""
    path, config = Path(model.repository), configuration(model)
    shapes = {name: tuple(weight.shape) for name, weight in shards.skeleton(config, torch.bfloat16).state_dict().items()}
    elements = {"transformer": sum(map(math.prod, shapes.values())), "vae": VAE_ELEMENTS, "text_encoder": TEXT_ENCODER_ELEMENTS}
    stored = {name: weights.Stored(path, name, shape) for name, shape in shapes.items()}
    return UnreadCheckpoint(
        path, config, vae_config(config), scheduler_config(config), elements, PIPELINES.get(model.task), stored=stored
    )


def find(name: str) -> Checkpoint:
    """Returns a checkpoint to plan for: one on this machine, or else a published one that is not downloaded.

    Args:
        name: as in :func:`.bundled.find`.
    Raises:
        RequestError: if there is no such checkpoint.
    """
    model = published(name)
    if model is None:
        return Checkpoint.open(bundled.find(name))
    downloaded = bundled.downloaded(name)
    return Checkpoint.open(downloaded.resolve()) if downloaded else unread(model)
