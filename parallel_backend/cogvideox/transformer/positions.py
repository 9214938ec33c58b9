"""The positions of video tokens: tables for rotary positions, and the sinusoidal table of VideoX-Fun's 2b models.

At the size that a model is configured for, all conventions agree. At other sizes CogVideoX 1.5 and AniSora V1 count from the corner,
and CogVideoX 1.0 follows how it was trained:

- VideoX-Fun trained its models at many sizes. Rotary positions divide the crop of the configured grid into equal steps, without the
  end (numpy's ``linspace`` with ``endpoint=False``). The sinusoidal table of 2b is resized to the size, trilinear (aigc-apps/VideoX-Fun
  804a425, ``scripts/cogvideox_fun/train.py`` and ``models/cogvideox_transformer3d.py``).
- CogVideoX's own models were trained at 720x480 only (zai-org/CogVideo 7a1af71, ``sat/dit_video_concat.py``), so their training does
  not say what other sizes are. They follow diffusers' pipelines, whose last step is shorter if the crop does not begin at 0, and which
  compute the sinusoidal table for the size.

RIFLEx (arXiv 2502.15894; thu-ml/RIFLEx 18e0bc3, ``riflex_utils.py`` and ``cogvideox.py``) makes videos of twice the training length. Of
the temporal frequencies the second one, of a period of 20 latent frames in CogVideoX-5b, makes a longer video repeat itself. It is lowered so
that all frames are within nine tenths of its period. The authors also finetuned 5b with a fixed one, of 25 latent frames.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from ..checkpoint.facts import CheckpointFacts

RIFLEX_INDEX = 1
"""Of the temporal frequency that RIFLEx lowers, from 0."""
RIFLEX_FINETUNED = 25
"""Latent frames that RIFLEx's finetuned weights have it lowered for."""


def rotary_tables(
    checkpoint: CheckpointFacts, frames: int, height: int, width: int, device: torch.device, *, riflex: str = "off"
):
    """Returns cosines and sines ``[video tokens, head_dim]``, or None for models with sinusoidal positions.

    Args:
        checkpoint: of the model.
        frames, height, width: of the latent, including padding frames.
        device: where the tables are created.
        riflex: one of ``model.RIFLEXES``.
    """
    if not checkpoint.rotary:
        return None
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    axes = token_positions(checkpoint, frames, height, width)
    features = [checkpoint.head_dim // 4, *[checkpoint.head_dim // 8 * 3] * 2]
    tables = [get_1d_rotary_pos_embed(size, axis.to(device), use_real=True) for size, axis in zip(features, axes)]
    if stretched := riflex_frames(checkpoint, frames, riflex):
        angles = (axes[0].to(device) * (0.9 * 2 * math.pi / stretched))[:, None]
        for table, values in zip(tables[0], (angles.cos(), angles.sin())):
            table[:, 2 * RIFLEX_INDEX : 2 * RIFLEX_INDEX + 2] = values
    return tuple(joined(of_axes) for of_axes in zip(*tables))


def riflex_frames(checkpoint: CheckpointFacts, frames: int, riflex: str) -> int | None:
    """Returns the number of latent frames that RIFLEx lowers the frequency for, or None if it changes nothing.

    Args:
        checkpoint: of the model.
        frames: of a window.
        riflex: one of ``model.RIFLEXES``.
    """
    if riflex == "finetuned":
        return RIFLEX_FINETUNED
    return frames if riflex == "on" and frames > riflex_period(checkpoint) else None


def riflex_period(checkpoint: CheckpointFacts) -> int:
    """Returns the period of the frequency that RIFLEx lowers, in latent frames, before it does."""
    return round(2 * math.pi * 10000 ** (2 * RIFLEX_INDEX / (checkpoint.head_dim // 4)))


def joined(tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Joins tables ``[length, features]`` of frames, rows and columns to one of all tokens, ``[tokens, features]``."""
    lengths = [len(table) for table in tables]
    shapes = [[length if own == axis else 1 for own, length in enumerate(lengths)] for axis in range(3)]
    spread = [table.view(*shape, -1).expand(*lengths, -1) for table, shape in zip(tables, shapes)]
    return torch.cat(spread, dim=-1).flatten(0, 2)


def token_positions(checkpoint: CheckpointFacts, frames: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Returns the positions of the tokens' frames, rows and columns, float32, for a latent of this size."""
    config = checkpoint.transformer
    patch = config.get("patch_size", 2)
    grid = (height // patch, width // patch)
    if checkpoint.counts_from_corner:
        lengths = math.ceil(frames / (checkpoint.patch_size_t or 1)), *grid
        return tuple(torch.arange(length, dtype=torch.float32) for length in lengths)
    crop = centred_region(grid, config.get("sample_height", 60) // patch, config.get("sample_width", 90) // patch)
    spaced = even_steps if checkpoint.is_fun else steps_of_diffusers
    return torch.arange(frames, dtype=torch.float32), *(spaced(*edges, length) for edges, length in zip(zip(*crop), grid))


def centred_region(grid: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the top left and bottom right corner of the largest centred region of a base grid with the proportions of ``grid``.

    It is ``get_resize_crop_region_for_grid`` of diffusers' CogVideoX pipeline, an import of which brings all of transformers.

    Args:
        grid: rows and columns.
        height, width: of the base grid.
    """
    scale = min(height / grid[0], width / grid[1])
    rows, columns = round(grid[0] * scale), round(grid[1] * scale)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return (top, left), (top + rows, left + columns)


def even_steps(start: int, stop: int, length: int) -> torch.Tensor:
    """Returns ``length`` positions from ``start`` on, in equal steps that would reach ``stop`` with one more."""
    return (start + (stop - start) * torch.arange(length, dtype=torch.float64) / length).float()


def steps_of_diffusers(start: int, stop: int, length: int) -> torch.Tensor:
    """Returns the positions of diffusers 0.42, which are those of :func:`even_steps` only if ``start`` is 0."""
    return torch.linspace(start, stop * (length - 1) / length, length)


def use(transformer, *, interpolated: bool) -> None:
    """Sets how a transformer with sinusoidal positions makes those of another size than its configured one.

    Args:
        transformer: of diffusers, which computes them in ``patch_embed._get_positional_embeddings``.
        interpolated: resizes those of the configured size; else they are computed for the size.
    """
    embed = transformer.patch_embed
    vars(embed).pop("_get_positional_embeddings", None)
    if interpolated:
        embed._get_positional_embeddings = partial(resized_sincos, embed, embed._get_positional_embeddings)


def resized_sincos(embed, compute, height: int, width: int, frames: int, **placed) -> torch.Tensor:
    """Returns text's zeros and the video's positions ``[1, tokens, features]``: those of the configured size, resized.

    VideoX-Fun resizes a table of the configured frames and takes the first ones. Positions of a frame do not depend on their number,
    so here there are as many frames as the video has.

    Args:
        embed: the patch embedding, with its configured size.
        compute: diffusers' function for a size.
        height, width: in latent rows and columns.
        frames: of the video.
        placed: the device, where ``compute`` takes one.
    """
    table = compute(embed.sample_height, embed.sample_width, frames, **placed)
    text, video = table.split([embed.max_text_seq_length, table.shape[1] - embed.max_text_seq_length], dim=1)
    rows, columns = embed.sample_height // embed.patch_size, embed.sample_width // embed.patch_size
    images = video.unflatten(1, (-1, rows, columns))[0].movedim(-1, 1)
    images = F.interpolate(images, (height // embed.patch_size, width // embed.patch_size), mode="bilinear")
    return torch.cat([text, images.movedim(1, -1).flatten(0, 2)[None]], dim=1)
