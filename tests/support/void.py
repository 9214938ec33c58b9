"""VOID's formula (Netflix/void-model 66e9c0e), written down again over diffusers' parts.

The condition is that of ``scripts/cogvideox_fun/train.py`` with ``train_void.sh``, the windows are those of
``videox_fun/pipeline/pipeline_cogvideox_fun_inpaint.py``.
"""

import torch
from diffusers import DDIMScheduler

from .videox_fun import rotary_of


def trained_mask(stored: torch.Tensor) -> torch.Tensor:
    """The mask that the training makes of one in 0..1 as it is stored, 0 for what is removed."""
    mask = 255 - stored * 255
    for low, high, level in ((-1, 31, 0), (31, 95, 63), (95, 191, 127), (191, 255, 255)):
        mask = torch.where((mask > low) & (mask <= high), float(level), mask)
    return mask / 255


@torch.no_grad()
def condition(vae, video: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """``[1, frames, 32, height/8, width/8]`` of a video ``[frames, height, width, 3]`` and a mask ``[frames, height, width]``."""
    known = (1 - trained_mask(stored)).expand(3, *stored.shape)
    encoded = [vae.encode(part[None]).latent_dist.mode() for part in (known, video.permute(3, 0, 1, 2) * 2 - 1)]
    return torch.cat(encoded, dim=1).transpose(1, 2) * vae.config.scaling_factor


def starts_and_weights(frames: int, window: int, overlap: int) -> list[tuple[slice, torch.Tensor]]:
    """The windows of latent frames, and the weight of each frame's prediction before it is divided by their sum."""
    found, begin = [], 0
    while True:
        end = min(begin + window, frames)
        weights = torch.ones(end - begin)
        ramp = torch.linspace(0, 1, overlap + 2)[1:-1]
        if begin > 0:
            weights[:overlap] = ramp
        if end < frames:
            weights[-overlap:] = ramp.flip(0)
        found.append((slice(begin, end), weights[None, :, None, None, None]))
        if end == frames:
            return found
        begin = end - overlap


@torch.no_grad()
def remove(
    pipeline, video, stored, *, noise: torch.Tensor, texts, steps: int, window: int, overlap: int, cfg: float
) -> torch.Tensor:
    """The latents in ComfyUI's layout. Each window takes a step of its own, and the results are blended."""
    transformer, seen = pipeline.transformer, condition(pipeline.vae, video, stored)
    timing = DDIMScheduler.from_config(pipeline.scheduler.config)
    timing.set_timesteps(steps)
    x = noise.transpose(1, 2)
    height, width = video.shape[1:3]
    prompts = [texts[0]] if cfg <= 1 else [texts[1], texts[0]]
    for time in timing.timesteps:
        total, count = torch.zeros_like(x), torch.zeros(1, x.shape[1], 1, 1, 1)
        for place, weights in starts_and_weights(x.shape[1], window, overlap):
            part = torch.cat([x[:, place], seen[:, place]], dim=2)
            rotary = rotary_of(pipeline, height, width, part.shape[1])
            outputs = [
                transformer(
                    hidden_states=part, encoder_hidden_states=text, timestep=time[None], image_rotary_emb=rotary, return_dict=False
                )[0]
                for text in prompts
            ]  # fmt: skip
            velocity = outputs[0] if cfg <= 1 else outputs[0] + cfg * (outputs[1] - outputs[0])
            total[:, place] += timing.step(velocity, time, x[:, place], return_dict=False)[0] * weights
            count[:, place] += weights
        x = total / count
    return x.transpose(1, 2) / pipeline.vae.config.scaling_factor
