"""Checks images, masks and latents from other nodes."""

from typing import Any

import torch

from ..errors import RequestError


def checked_pictures(pictures: Any, name: str) -> torch.Tensor:
    """Returns images as ``[frames, height, width, 3]``, float.

    Also accepts a batch of videos ``[batch, frames, height, width, channels]``, which is flattened to one sequence of frames; a
    single image ``[height, width, channels]``; one grey channel, which is repeated; an alpha channel, which is dropped as by
    ComfyUI's nodes; and 8-bit integers.

    Args:
        pictures: the value of an ``IMAGE`` input.
        name: of the input, for messages.
    Raises:
        RequestError: for any other shape or type, no frames, or NaN or infinite values.
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
        raise RequestError(f"{name} has shape {shape}, which holds no image; give at least one")
    channels = shape[-1]
    if channels not in (1, 3, 4):
        raise RequestError(f"{name} has {channels} channels (shape {shape}); give 1 (grey), 3 (RGB) or 4 (RGBA), the last axis")
    if pictures.dtype == torch.uint8:
        pictures = pictures / 255
    if not pictures.is_floating_point():
        raise RequestError(f"{name} has the type {pictures.dtype}; images are floats in 0..1")
    check_finite(pictures, name)
    return pictures.expand(*pictures.shape[:3], 3).float() if channels == 1 else pictures[..., :3].float()


def checked_mask(mask: Any, name: str) -> torch.Tensor:
    """Returns a mask as ``[frames, height, width]``, float.

    Also accepts ``[height, width]`` and an additional channel of size 1.

    Args:
        mask: the value of a ``MASK`` input.
        name: of the input, for messages.
    Raises:
        RequestError: for any other shape or type, no frames, or NaN or infinite values.
    """
    if not isinstance(mask, torch.Tensor):
        raise RequestError(f"{name} is a {type(mask).__name__}; connect a mask")
    shape = list(mask.shape)
    if mask.ndim == 4 and 1 in (shape[1], shape[-1]):
        mask = mask[:, 0] if shape[1] == 1 else mask[..., 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or 0 in shape:
        raise RequestError(f"{name} has shape {shape}; a mask has [frames, height, width], each at least 1")
    check_finite(mask, name)
    return mask / 255 if mask.dtype == torch.uint8 else mask.float()


def checked_latent(latent: Any, name: str) -> torch.Tensor:
    """Returns a latent's tensor. :func:`parallel_backend.validation.check_latent` checks its shape.

    Args:
        latent: the value of ``samples`` in a ``LATENT`` input.
        name: of the input, for messages.
    Raises:
        RequestError: for another type, or NaN or infinite values.
    """
    if not isinstance(latent, torch.Tensor) or not latent.is_floating_point():
        found = str(latent.dtype) if isinstance(latent, torch.Tensor) else type(latent).__name__
        raise RequestError(f"{name} holds a {found}; it must be one tensor of floats: use Empty CogVideoX Latent or VAE Encode")
    check_finite(latent, name)
    return latent


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raises RequestError if a tensor has NaN or infinite values."""
    if not values.is_floating_point() or not values.numel():
        return
    if values.itemsize == 1:  # torch has no extremes of floats in 8 bits
        values = values.float()
    # fifteen times faster than isfinite().all(), which counts in a video
    if not all(extreme.isfinite() for extreme in values.aminmax()):
        raise RequestError(
            f"{name} has values that are NaN or infinite; check the node that made it: if it was a VAE in fp16, use bf16 or fp32"
        )
