"""The published models: their repositories and configurations, for predictions about a model that is not downloaded."""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import bundled, shards, weights
from .checkpoint import Checkpoint
from .single_file import SAMPLE_SIZES, scheduler_config

VAE_ELEMENTS, TEXT_ENCODER_ELEMENTS = 215_583_907, 4_762_310_656
"""Weight elements of the VAE and of the encoder of T5 v1.1 XXL, which all published models share."""
HEADS = {"2b": (30, 30), "5b": (42, 48), "1.5-5b": (42, 48)}
"""Blocks and heads of each base."""
CONDITION_CHANNELS = {"text": 0, "image": 16, "control": 16, "inpaint": 17}
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


@dataclass(frozen=True)
class Published:
    """A published model."""

    repository: str
    """Of the Hugging Face hub, ORG/NAME."""
    base: str
    """``2b``, ``5b`` or ``1.5-5b``: the model's shape."""
    task: str = "text"

    @property
    def transformer(self) -> dict[str, Any]:
        """The transformer's configuration."""
        layers, heads = HEADS[self.base]
        width, height, frames = SAMPLE_SIZES[self.base == "1.5-5b"]
        config = {
            "_class_name": "CogVideoXTransformer3DModel",
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "in_channels": 16 + CONDITION_CHANNELS[self.task],
            "out_channels": 16,
            "sample_width": width,
            "sample_height": height,
            "sample_frames": frames,
            "use_rotary_positional_embeddings": self.base != "2b",
        }
        if self.base == "1.5-5b":
            config |= {"patch_size_t": 2, "patch_bias": False}
        if self.task == "image":
            config |= {"ofs_embed_dim": 512} if self.base == "1.5-5b" else {"use_learned_positional_embeddings": True}
        return config


MODELS = {
    "2b": Published("zai-org/CogVideoX-2b", "2b"),
    "5b": Published("zai-org/CogVideoX-5b", "5b"),
    "5b-i2v": Published("zai-org/CogVideoX-5b-I2V", "5b", "image"),
    "1.5": Published("zai-org/CogVideoX1.5-5B", "1.5-5b"),
    "1.5-i2v": Published("zai-org/CogVideoX1.5-5B-I2V", "1.5-5b", "image"),
    "fun-2b-inp": Published("alibaba-pai/CogVideoX-Fun-V1.1-2b-InP", "2b", "inpaint"),
    "fun-5b-inp": Published("alibaba-pai/CogVideoX-Fun-V1.1-5b-InP", "5b", "inpaint"),
    "fun-5b-control": Published("alibaba-pai/CogVideoX-Fun-V1.1-5b-Control", "5b", "control"),
    "fun-5b-pose": Published("alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose", "5b", "control"),
    "fun-1.5-inp": Published("alibaba-pai/CogVideoX-Fun-V1.5-5b-InP", "1.5-5b", "inpaint"),
}
"""The published models by their short names."""


@cache
def unread(model: Published) -> UnreadCheckpoint:
    """Returns a published model as a checkpoint whose weights are not there."""
    vae = {"scaling_factor": 1.15258426 if model.base == "2b" else 0.7}
    path, config = Path(model.repository), model.transformer
    shapes = {name: tuple(weight.shape) for name, weight in shards.skeleton(config, torch.bfloat16).state_dict().items()}
    elements = {"transformer": sum(map(math.prod, shapes.values())), "vae": VAE_ELEMENTS, "text_encoder": TEXT_ENCODER_ELEMENTS}
    stored = {name: weights.Stored(path, name, shape) for name, shape in shapes.items()}
    return UnreadCheckpoint(path, config, vae, scheduler_config(config), elements, PIPELINES.get(model.task), stored=stored)


def find(name: str) -> Checkpoint:
    """Returns a checkpoint to plan for: one on this machine, or else a published one that is not downloaded.

    Args:
        name: as in :func:`.bundled.find`; or a name in ``MODELS``, or the repository of one of them.
    Raises:
        RequestError: if there is no such checkpoint.
    """
    known = {model.repository.lower(): model for model in MODELS.values()} | MODELS
    model = known.get(name.lower())
    if model is None:
        return Checkpoint.open(bundled.find(name))
    downloaded = bundled.hub_models().get(model.repository)
    return Checkpoint.open(downloaded.resolve()) if downloaded else unread(model)
