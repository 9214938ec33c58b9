"""Checks of pictures that other nodes pass."""

from typing import Any

import torch

from .errors import RequestError


def checked_pictures(pictures: Any, name: str) -> torch.Tensor:
    """Returns pictures as ``[frames, height, width, 3]``, float.

    Taken as well: a batch of videos ``[batch, frames, height, width, channels]``, which become one row of frames; one picture
    ``[height, width, channels]``; one grey channel, repeated; an alpha channel, dropped as the core's nodes do; 8-bit integers.

    Args:
        pictures: what an ``IMAGE`` input was given.
        name: of the input, for messages.
    Raises:
        RequestError: for any other shape or type, no frames, NaN or infinite values.
    """
    if not isinstance(pictures, torch.Tensor):
        raise RequestError(f"{name} is a {type(pictures).__name__}; connect images")
    shape = list(pictures.shape)
    if pictures.ndim == 3 and shape[-1] in (1, 3, 4):
        pictures = pictures[None]
    if pictures.ndim == 5:
        pictures = pictures.flatten(0, 1)
    if pictures.ndim != 4:
        raise RequestError(f"{name} has shape {shape}; images have [frames, height, width, channels]")
    if 0 in shape:
        raise RequestError(f"{name} has shape {shape}, which holds no picture; give at least one")
    channels = shape[-1]
    if channels not in (1, 3, 4):
        raise RequestError(f"{name} has {channels} channels (shape {shape}); give 1 (grey), 3 (RGB) or 4 (RGBA), the last axis")
    if pictures.dtype == torch.uint8:
        pictures = pictures / 255
    if not pictures.is_floating_point():
        raise RequestError(f"{name} has the type {pictures.dtype}; images are floats in 0..1")
    if not pictures.isfinite().all():
        raise RequestError(
            f"{name} has values that are NaN or infinite; look at the node that made it: a VAE in fp16 may, bf16 or fp32 mends that"
        )
    return pictures.expand(*pictures.shape[:3], 3).float() if channels == 1 else pictures[..., :3].float()
