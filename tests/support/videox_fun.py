"""VideoX-Fun's formulas (aigc-apps/VideoX-Fun 804a425), written down again over diffusers' parts."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDPMScheduler, DDIMScheduler
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid


def positions(width: int, height: int, base: tuple[int, int]) -> list[np.ndarray]:
    """Rows and columns of VideoX-Fun's grid in tokens, by numpy's linspace without the end."""
    grid = height // 16, width // 16
    (top, left), (bottom, right) = get_resize_crop_region_for_grid(grid, base[0], base[1])
    edges = ((top, bottom), (left, right))
    return [np.linspace(*both, length, endpoint=False, dtype=np.float32) for both, length in zip(edges, grid)]


def rotary_tables(
    width: int, height: int, frames: int, base: tuple[int, int], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """VideoX-Fun's rotary tables: a quarter of the features are the frame's, the others half the row's and half the column's."""
    axes = [np.arange(frames), *positions(width, height, base)]
    angles = []
    for axis, size in zip(axes, (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
        rates = 10000.0 ** (-np.arange(0, size, 2) / size)
        angles.append(np.repeat(np.outer(axis, rates), 2, axis=1))
    tokens = [
        np.concatenate([angles[0][frame], angles[1][row], angles[2][column]])
        for frame in range(frames) for row in range(height // 16) for column in range(width // 16)
    ]  # fmt: skip
    found = torch.from_numpy(np.stack(tokens))
    return found.cos().float(), found.sin().float()


def rotary_of(pipeline, height: int, width: int, frames: int, device: torch.device | None = None):
    """The rotary tables for a pipeline's transformer; those of CogVideoX 1.5 are diffusers'."""
    config = pipeline.transformer.config
    if config.patch_size_t is not None:
        return type(pipeline)._prepare_rotary_positional_embeddings(pipeline, height, width, frames, torch.device("cpu"))
    return rotary_tables(
        width, height, frames, (config.sample_width // 2, config.sample_height // 2), config.attention_head_dim
    )


def unshifted(config: dict, scheduler: str):
    """A scheduler with the noise that VideoX-Fun trained with: plain DDIM, as its default sampler, or DPM without a shift."""
    return (
        DDIMScheduler.from_config(config)
        if scheduler == "ddim"
        else CogVideoXDPMScheduler.from_config(config, snr_shift_scale=1.0)
    )


def resize_positions(transformer) -> None:
    """Makes a 2b transformer of diffusers resize its table of sinusoidal positions, all of its frames at once."""
    embed, config = transformer.patch_embed, transformer.config
    embed.use_positional_embeddings = False
    shape = ((config.sample_frames - 1) // 4 + 1, config.sample_height // 2, config.sample_width // 2)
    text, table = embed.pos_embedding.float().split([config.max_text_seq_length, math.prod(shape)], dim=1)

    def add(module, inputs, embeds):
        _, frames, _, height, width = inputs[1].shape
        whole = table.reshape(1, *shape, -1).permute(0, 4, 1, 2, 3)
        whole = F.interpolate(whole, (shape[0], height // 2, width // 2), mode="trilinear", align_corners=False)
        return embeds + torch.cat([text, whole[:, :, :frames].flatten(2).transpose(1, 2)], dim=1)

    embed.register_forward_hook(add)


def inpaint(pipeline, *, pixels, mask, size, batch=1, steps=3, seed=3, cfg=6.0, scheduler, texts) -> torch.Tensor:
    """VideoX-Fun's inpainting, written down again over diffusers' transformer, scheduler and VAE, in ComfyUI's layout.

    ``pixels`` is ``[3, frames, height, width]`` in -1..1, ``mask`` ``[1, frames, height, width]``, 1 where it is made anew.
    """
    width, height, frames = size
    transformer, vae, factor = pipeline.transformer, pipeline.vae, pipeline.vae.config.scaling_factor
    timing = unshifted(pipeline.scheduler.config, scheduler)
    timing.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    count = (frames - 1) // 4 + 1
    x = torch.randn(batch, count, 16, height // 8, width // 8, generator=generator) * timing.init_noise_sigma
    if bool((mask == 1).all()):
        extra = torch.zeros(1, count, 17, height // 8, width // 8)
    else:
        hidden = torch.where(mask.bool(), torch.tensor(-1.0), pixels)
        with torch.no_grad():
            video = vae.encode(hidden[None]).latent_dist.mode() * factor
        seen = (1 - mask)[None]
        resize = partial(F.interpolate, mode="trilinear", align_corners=False)
        first = resize(seen[:, :, :1], (1, height // 8, width // 8))
        rest = [resize(seen[:, :, 1:], (count - 1, height // 8, width // 8))] if count > 1 else []
        extra = torch.cat([torch.cat([first, *rest], dim=2) * factor, video], dim=1).transpose(1, 2)
    halves = [texts[1], texts[0]] if cfg > 1 else [texts[0]]
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = rotary_of(pipeline, height, width, count)
    before = None
    for index, time in enumerate(timing.timesteps):
        seen = torch.cat([x, extra.repeat(batch, 1, 1, 1, 1)], dim=2)
        if one := count == 1 and transformer.config.patch_size_t is not None:  # a token of two frames, the second of zeros
            seen = torch.cat([seen, torch.zeros_like(seen)], dim=1)
        with torch.no_grad():
            outputs = [
                transformer(
                    hidden_states=seen, encoder_hidden_states=half.repeat(batch, 1, 1), timestep=time.expand(batch),
                    image_rotary_emb=rotary, return_dict=False,
                )[0][:, : count if one else None]
                for half in halves
            ]  # fmt: skip
        velocity = outputs[0] if cfg <= 1 else outputs[0] + cfg * (outputs[1] - outputs[0])
        if isinstance(timing, CogVideoXDPMScheduler):
            earlier = timing.timesteps[index - 1] if index else None
            x, before = timing.step(velocity, before, time, earlier, x, generator=generator, return_dict=False)
        else:
            x = timing.step(velocity, time, x, return_dict=False)[0]
    return x.transpose(1, 2) / factor
