"""The formulas of DOVE (zhengchen1999/DOVE ad649cc, ``inference_script.py``) and SparkVSR (taco-group/SparkVSR 8dbd703,
``sparkvsr_wrapper/infer.py``, without reference frames), written down again over diffusers' parts, and tiles blended with numpy."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDPMScheduler
from diffusers.models.embeddings import get_3d_rotary_pos_embed

NOISE = 399


def enlarged(video: torch.Tensor, scale: int) -> torch.Tensor:
    """``[frames, height, width, 3]`` in 0..1, padded to 8k+1 frames and enlarged, as ``[1, 3, frames, height, width]`` in -1..1."""
    missing = -(len(video) - 1) % 8
    video = torch.cat([video, video[-1:].repeat(missing, 1, 1, 1)]).permute(0, 3, 1, 2)
    height, width = video.shape[2] * scale, video.shape[3] * scale
    large = F.interpolate(video, size=(height, width), mode="bilinear", align_corners=False)
    return (large * 2 - 1).permute(1, 0, 2, 3)[None]


def rotary_of(config, frames: int, height: int, width: int):
    grid = height // config.patch_size, width // config.patch_size
    together = config.patch_size_t or 1
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=None,
        grid_size=grid,
        temporal_size=(frames + together - 1) // together,
        grid_type="slice",
        max_size=grid,
    )


@torch.no_grad()
def restored(pipeline, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """One tile ``[1, 3, frames, height, width]`` in -1..1, made as ``[frames, height, width, 3]`` in 0..1."""
    config, scale = pipeline.transformer.config, pipeline.vae.config.scaling_factor
    latent = (pipeline.vae.encode(video).latent_dist.mode() * scale).transpose(1, 2)
    copies = latent.shape[1] % (config.patch_size_t or 1)
    latent = torch.cat([*[latent[:, :1]] * copies, latent], dim=1)
    scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    time = torch.tensor([NOISE])
    seen, ofs = latent, None
    if config.in_channels > config.out_channels:
        seen = torch.cat([latent, torch.zeros_like(latent)], dim=2)
        ofs = torch.full((1,), 2.0)
    predicted = pipeline.transformer(
        hidden_states=seen,
        encoder_hidden_states=text,
        timestep=time,
        ofs=ofs,
        image_rotary_emb=rotary_of(config, *latent.shape[1:2], *latent.shape[3:]),
        return_dict=False,
    )[0]
    clean = scheduler.get_velocity(predicted, latent, time)[:, copies:]
    made = pipeline.vae.decode(clean.transpose(1, 2) / scale).sample
    return (made * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)


def hat(length: int, overlap: int) -> np.ndarray:
    """The weight of a tile along one axis, before it is divided by the sum: it falls to both ends over what is shared."""
    place = np.arange(length)
    return np.minimum(np.minimum(place + 1, length - place), overlap + 1).astype(np.float64)


def upscaled(
    pipeline, video: torch.Tensor, text: torch.Tensor, *, scale: int, tiles: list[tuple[slice, slice, slice]], overlaps
) -> np.ndarray:
    """The video from tiles at given frames, rows and columns of the enlarged video."""
    large = enlarged(video, scale)
    total, weights = np.zeros((*large.shape[2:], 3)), np.zeros((*large.shape[2:], 1))
    for tile in tiles:
        made = restored(pipeline, large[(..., *tile)], text).numpy()
        along = [hat(size, overlap) for size, overlap in zip(made.shape, overlaps)]
        weight = np.einsum("f,h,w->fhw", *along)[..., None]
        total[tile] += made * weight
        weights[tile] += weight
    return (total / weights)[: len(video)]
