"""ControlNets as their author's pipeline runs them, of diffusers' parts and around diffusers' own pipelines.

See TheDenk/cogvideox-controlnet (e21a4a3): before each step the ControlNet runs on the full sequence, and after each of its first blocks the
transformer adds what the ControlNet's block of the same number made of the video's tokens.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CogVideoXPatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from safetensors.torch import load_file
from torch import nn


class ReferenceControlNet(nn.Module):
    """A ControlNet with the author's names of weights."""

    def __init__(self, folder: Path):
        super().__init__()
        config, state = (
            json.loads((folder / "config.json").read_text()),
            load_file(folder / "diffusion_pytorch_model.safetensors"),
        )
        heads, head, time = config["num_attention_heads"], config["attention_head_dim"], config["time_embed_dim"]
        pixels, features = config["in_channels"] * config["downscale_coef"] ** 2, heads * head
        self.unshuffle = nn.PixelUnshuffle(config["downscale_coef"])
        self.controlnet_encode_first, self.controlnet_encode_second = (
            nn.Sequential(nn.Conv2d(pixels // into, pixels // into // 2, 1), nn.GroupNorm(2, pixels // into // 2), nn.ReLU())
            for into in (1, 2)
        )
        self.patch_embed = CogVideoXPatchEmbed(
            patch_size=2,
            in_channels=config["vae_channels"] + pixels // 4,
            embed_dim=features,
            text_embed_dim=state["patch_embed.text_proj.weight"].shape[1],
            max_text_seq_length=config["max_text_seq_length"],
            sample_width=config["sample_width"],
            sample_height=config["sample_height"],
            sample_frames=config["sample_frames"],
            use_positional_embeddings=not config["use_rotary_positional_embeddings"],
            use_learned_positional_embeddings=False,
        )
        self.time_proj, self.time_embedding = Timesteps(features, True, 0), TimestepEmbedding(features, time, "silu")
        self.transformer_blocks = nn.ModuleList(
            CogVideoXBlock(features, heads, head, time, attention_bias=True) for _ in range(config["num_layers"])
        )
        if config["out_proj_dim"]:
            self.out_projectors = nn.ModuleList(nn.Linear(features, config["out_proj_dim"]) for _ in self.transformer_blocks)
        self.load_state_dict(state)

    @staticmethod
    def shorten(images: torch.Tensor) -> torch.Tensor:
        """The first image, and the means of the following pairs: ``[frames, …]``."""
        first, rest = images[:1], images[1:].movedim(0, -1)
        pooled = F.avg_pool1d(rest.flatten(0, -2), 2, 2).unflatten(0, rest.shape[:-1]) if rest.shape[-1] else rest
        return torch.cat([first, pooled.movedim(-1, 0)])

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Encodes pixels ``[frames, 3, height, width]`` in -1..1 to ``[latent frames, channels, height/8, width/8]``."""
        first = self.shorten(self.controlnet_encode_first(self.unshuffle(video)))
        return self.shorten(self.controlnet_encode_second(first))

    def forward(self, latents, text, video, timestep, rotary) -> list[torch.Tensor]:
        """Returns what each block adds, for pixels ``[frames, height, width, 3]`` in 0..1."""
        control = self.encode(video.permute(0, 3, 1, 2) * 2 - 1)[None].repeat(len(latents), 1, 1, 1, 1)
        joint = self.patch_embed(text, torch.cat([latents[:, :, :16], control], dim=2))
        words, tokens = joint.split([text.shape[1], joint.shape[1] - text.shape[1]], dim=1)
        embedded, made = self.time_embedding(self.time_proj(timestep)), []
        for number, block in enumerate(self.transformer_blocks):
            tokens, words = block(tokens, words, embedded, image_rotary_emb=rotary)
            made.append(self.out_projectors[number](tokens) if hasattr(self, "out_projectors") else tokens)
        return made


@contextmanager
def controlled(pipeline, folder: Path, video: torch.Tensor, *, strength=1.0, start=0.0, end=1.0, steps: int) -> Iterator[None]:
    """Within, a pipeline of diffusers follows a control video ``[frames, height, width, 3]`` in 0..1 in so many steps."""
    net, transformer, calls, additions = ReferenceControlNet(folder).eval(), pipeline.transformer, [0], []

    def before(module, args, given):
        additions.clear()
        if start <= calls[0] / steps <= end:
            inputs = (given[name] for name in ("hidden_states", "encoder_hidden_states"))
            additions.extend(net(*inputs, video, given["timestep"], given["image_rotary_emb"]))
        calls[0] += 1

    def after(module, args, output):
        tokens, words = output
        return (tokens + strength * additions.pop(0) if additions else tokens), words

    hooks = [transformer.register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in transformer.transformer_blocks]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
