"""A ControlNet's blocks beside a transformer's: after each of the first blocks its own one runs, and its video tokens are added.

The formula is that of TheDenk/cogvideox-controlnet (e21a4a3), which runs the ControlNet before the transformer and keeps all of its blocks'
outputs. Here both go in step, so one output is kept, and each rank has its chunk of both sequences: the blocks of both attend in the same
way. See :mod:`parallel_backend.parallel.sequence`. Every rank has all of a ControlNet's weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint import shards, weights
from ..checkpoint.controlnet import ENCODER, TIME, ControlNetFile
from . import block

STATES = 2
"""Tensors of a rank's token size that a ControlNet holds beside what a block needs: its tokens, and what it adds."""
FRAMES = 16
"""Frames of a control video that are encoded at a time, to save memory."""
GROUPS = 2
"""Groups of the encoder's norms."""


class ControlBranch(nn.Module):
    """A ControlNet without its encoder. Create it with :func:`load`.

    Args:
        file: that its weights are in.
    """

    def __init__(self, file: ControlNetFile):
        super().__init__()
        from diffusers.models.embeddings import CogVideoXPatchEmbed, TimestepEmbedding, Timesteps
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

        config, shapes, features = file.config, file.shapes, file.features
        self.channels, self.latent_channels = file.channels, file.latent_channels
        time_features, text_features = shapes[TIME][0], shapes["patch_embed.text_proj.weight"][1]
        same = ("max_text_seq_length", "sample_width", "sample_height", "sample_frames", "temporal_compression_ratio",
                "spatial_interpolation_scale", "temporal_interpolation_scale", "use_learned_positional_embeddings")  # fmt: skip
        self.patch_embed = CogVideoXPatchEmbed(
            patch_size=shapes["patch_embed.proj.weight"][2],
            in_channels=file.latent_channels + file.channels,
            embed_dim=features,
            text_embed_dim=text_features,
            use_positional_embeddings=not config["use_rotary_positional_embeddings"],
            **{name: config[name] for name in same},
        )
        self.time_proj = Timesteps(features, config["flip_sin_to_cos"], config["freq_shift"])
        self.time_embedding = TimestepEmbedding(features, time_features, config["timestep_activation_fn"])
        self.transformer_blocks = nn.ModuleList(
            CogVideoXBlock(
                dim=features,
                num_attention_heads=file.heads,
                attention_head_dim=file.head_dim,
                time_embed_dim=time_features,
                attention_bias="transformer_blocks.0.attn1.to_q.bias" in shapes,
                **{name: config[name] for name in ("activation_fn", "norm_elementwise_affine", "norm_eps")},
            )
            for _ in range(file.layers)
        )
        self.out_projectors = None
        if "out_projectors.0.weight" in shapes:
            self.out_projectors = nn.ModuleList(nn.Linear(features, file.projected) for _ in range(file.layers))
        block.attach(self)

    def forward(
        self, latents: torch.Tensor, control: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds what the first block sees.

        Args:
            latents: the model's input ``[batch, frames, channels, height, width]``, of which the first channels are noisy latents.
            control: the encoded control video, of the same size.
            text: states ``[batch, tokens, features]``.
            timestep: ``[batch]``.
        Returns:
            Joint tokens ``[batch, text + video, features]`` and the timestep's embedding ``[batch, features]``.
        """
        seen = torch.cat([latents[:, :, : self.latent_channels], control], dim=2)
        return self.patch_embed(text, seen), self.time_embedding(self.time_proj(timestep).to(latents.dtype))

    def additions(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Yields the blocks, and the projector of each block's output if there are projectors."""
        return zip(self.transformer_blocks, self.out_projectors or [None] * len(self.transformer_blocks))


@dataclass(frozen=True)
class Control:
    """What a ControlNet gets in one forward pass."""

    branch: ControlBranch
    video: torch.Tensor
    """The encoded control video ``[prompts * batch, frames, channels, height, width]``."""
    strength: float

    def begin(self, cut: Callable[[torch.Tensor], torch.Tensor], **inputs: torch.Tensor) -> "ControlPass":
        """Starts a forward pass.

        Args:
            cut: returns this rank's chunk of joint tokens.
            inputs: ``latents``, ``text`` and ``timestep`` of :meth:`ControlBranch.forward`.
        """
        joint, embedded = self.branch(control=self.video, **inputs)
        return ControlPass(self, cut(joint), embedded)


class ControlPass:
    """A ControlNet's part of one forward pass, on this rank's chunk of the tokens.

    Args:
        control: what it gets.
        tokens: joint tokens ``[batch, tokens, features]`` of this rank.
        embedded: the timestep's embedding.
    """

    def __init__(self, control: Control, tokens: torch.Tensor, embedded: torch.Tensor):
        self.strength, self.tokens, self.embedded = control.strength, tokens, embedded
        self.additions = control.branch.additions()

    def add_to(self, tokens: torch.Tensor, rotary, about: dict[str, Any]) -> None:
        """Runs the next block and adds its video tokens to those of a block of the transformer, in place.

        Args:
            tokens: output of the transformer's block ``[batch, tokens, features]``.
            rotary: position tables of this rank's tokens, or None.
            about: the ``attention_kwargs`` of :func:`.block.forward`.
        """
        own_block, project = next(self.additions, (None, None))
        if own_block is None:
            return
        none = self.tokens.new_empty(len(self.tokens), 0, self.tokens.shape[2])
        self.tokens, _ = own_block(
            hidden_states=self.tokens,
            encoder_hidden_states=none,
            temb=self.embedded,
            image_rotary_emb=rotary,
            attention_kwargs={**about, "cache": None},
        )
        change = self.tokens[:, about["text"] :]
        tokens[:, about["text"] :].add_(change if project is None else project(change), alpha=self.strength)


def load(file: ControlNetFile, dtype: torch.dtype, device: torch.device | str) -> ControlBranch:
    """Reads the weights of a ControlNet.

    Raises:
        RequestError: if weights are missing, or have another shape than the others suggest.
    """
    branch = shards.empty(lambda: ControlBranch(file), dtype)
    shards.fill(branch, shards.find(branch, file.stored, file.name), dtype=dtype, device=device, home=device)
    return branch


@torch.inference_mode()
def encode(file: ControlNetFile, video: torch.Tensor) -> torch.Tensor:
    """Encodes a control video, on the CPU in float32.

    Time is halved twice, by the mean of two frames; the first frame stays alone.

    Args:
        file: of the ControlNet; only the encoder's weights are read.
        video: ``[frames, height, width, 3]`` in 0..1, 4k+1 frames.
    Returns:
        ``[1, channels, latent frames, height/8, width/8]``, as latents are laid out.
    """
    names = [f"{layer}.{kind}" for layer in ENCODER for kind in ("weight", "bias")]
    found = {name: weight.float() for name, weight in weights.tensors({name: file.stored[name] for name in names})}

    def stage(images: torch.Tensor, layers: Sequence[str]) -> torch.Tensor:
        convolution, norm = ((found[f"{layer}.weight"], found[f"{layer}.bias"]) for layer in layers)
        return F.relu(F.group_norm(F.conv2d(images, *convolution), GROUPS, *norm))

    images = video.movedim(-1, 1).float() * 2 - 1
    parts = [stage(F.pixel_unshuffle(part, file.downscale), ENCODER[:2]) for part in images.split(FRAMES)]
    encoded = halve_time(stage(halve_time(torch.cat(parts)), ENCODER[2:]))
    return encoded.movedim(1, 0)[None].contiguous()


def halve_time(images: torch.Tensor) -> torch.Tensor:
    """Returns the first of an odd number of images ``[images, …]`` and the means of the following pairs."""
    return torch.cat([images[:1], (images[1::2] + images[2::2]) / 2])
