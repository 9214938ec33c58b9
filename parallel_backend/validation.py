"""Checks of values, sizes and latents when a job is made. Each raises RequestError, which says what is allowed."""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch

from .errors import RequestError

TILINGS = ("auto", "on", "off")
CHANNELS = 16
"""Channels of a latent."""
TRAINED_TIMESTEPS = 1000
"""Timesteps of the noise schedule that all CogVideoX were trained with."""
UNCHANGED: Mapping[str, str] = MappingProxyType({})


def choice(name: str, value: Any, allowed) -> None:
    """Raises RequestError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise RequestError(f"{name} is '{value}'; use one of {', '.join(map(str, allowed))}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raises RequestError unless ``low <= value <= high``, also for NaN."""
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; use {low} to {high}")


def check_latent(latent: torch.Tensor) -> None:
    """Checks the shape of a latent, ``[batch, channels, latent frames, height/8, width/8]``.

    Raises:
        RequestError: for another shape. It names the origin if the shape is that of a known pack or model.
    """
    shape = tuple(latent.shape)
    if latent.ndim == 5 and shape[2] == 16 and shape[1] != 16:
        raise RequestError(
            f"the latent is {shape}: frames before channels, as in the CogVideoX wrapper's nodes; "
            "use this pack's or the core's nodes for the latent"
        )
    if latent.ndim != 5:
        raise RequestError(
            f"the latent is {shape}; a video latent is [batch, 16, frames, height/8, width/8]: "
            "use Empty CogVideoX Latent or VAE Encode"
        )
    if min(shape) < 1:
        raise RequestError(f"the latent is {shape}; every dimension must be at least 1")
    if shape[1] != CHANNELS:
        raise RequestError(
            f"the latent has {shape[1]} channels, so it is for another model; CogVideoX takes {CHANNELS}: "
            "use Empty CogVideoX Latent or VAE Encode"
        )
    if shape[3] % 2 or shape[4] % 2:
        raise RequestError(f"the size is {shape[4] * 8}x{shape[3] * 8}; width and height must be multiples of 16")


def check_images(job: Any) -> None:
    """Raises RequestError unless the latents of a sampling job's start and end image are one frame of the video's size each."""
    for name, image in (("start image", job.image), ("end image", job.end_image)):
        if image is not None:
            check_image(name, image, job.latent)
    if job.end_image is not None and (job.image is None or job.latent.shape[2] == 1):
        raise RequestError(
            "an end image goes with a start image and at least 5 frames; use CogVideoX Image To Video with both images"
        )


def check_image(name: str, image: torch.Tensor, latent: torch.Tensor) -> None:
    """Raises RequestError unless the latent of an image is one frame of the video's size."""
    batch, channels, _, height, width = latent.shape
    if image.ndim != 5 or image.shape[0] not in (1, batch) or tuple(image.shape[1:3]) != (channels, 1):
        raise RequestError(
            f"the {name}'s latent is {tuple(image.shape)}; it must be [1 or {batch}, {channels}, 1, height/8, width/8]: "
            "use CogVideoX Image To Video"
        )
    if tuple(image.shape[3:]) != (height, width):
        raise RequestError(
            f"the {name} is encoded for {image.shape[4] * 8}x{image.shape[3] * 8} and the video is "
            f"{width * 8}x{height * 8}; use the same size for both"
        )


def check_condition(name: str, condition: torch.Tensor, latent: torch.Tensor, *, channels: int, node: str) -> None:
    """Raises RequestError unless a condition has the frames and the size of the video.

    Args:
        name: of the condition, for the message.
        condition: ``[1 or batch, channels, latent frames, height/8, width/8]``.
        latent: of the video, in the same layout.
        channels: number of channels that the condition must have.
        node: a node that makes a fitting condition, for the message.
    """
    batch, _, frames, height, width = latent.shape
    if condition.ndim != 5 or condition.shape[0] not in (1, batch) or condition.shape[1] != channels:
        raise RequestError(
            f"the {name} is {tuple(condition.shape)}; "
            f"it must be [1 or {batch}, {channels}, frames, height/8, width/8]: use {node}"
        )
    if tuple(condition.shape[2:]) != (frames, height, width):
        _, _, own_frames, own_height, own_width = condition.shape
        raise RequestError(
            f"the {name} is {own_width * 8}x{own_height * 8} with {own_frames} latent frames and the video is "
            f"{width * 8}x{height * 8} with {frames}; use the latent output of {node}"
        )


def check_conditions(job: Any) -> None:
    """Raises RequestError unless the control videos, the noise, the masked video and the mask of a sampling job fit its latent.

    Also checks the strength and the share of the steps of a control video and of an image.
    """
    for name in ("control", "image"):
        strength, start, end = (getattr(job, f"{name}_{setting}") for setting in ("strength", "start", "end"))
        between(f"{name}_strength", strength, 0.0, 10.0)
        between(f"{name}_start", start, 0.0, 1.0)
        between(f"{name}_end", end, start, 1.0)
    channels = job.latent.shape[1]
    if job.control is not None:
        node = "CogVideoX Control To Video"
        check_condition("control video's latent", job.control, job.latent, channels=channels, node=node)
    if job.kept is not None:
        check_condition(
            "first frames", job.kept, job.latent[:, :, : job.kept.shape[2]], channels=channels, node="the sampler's latent"
        )
    if job.noise is not None:
        check_condition("noise", job.noise, job.latent, channels=channels, node="the sampler's latent")
    if (job.controlnet_videos is None) == bool(job.controlnets):
        raise RequestError("a ControlNet and its encoded control video go together; use Apply CogVideoX ControlNet")
    if job.controlnet_videos is not None:
        videos, node = job.controlnet_videos, "Apply CogVideoX ControlNet"
        check_condition("ControlNet's video", videos, job.latent, channels=videos.shape[1], node=node)
    if (job.masked_video is None) != (job.mask is None):
        raise RequestError("a masked video and its mask go together; use CogVideoX Inpaint or CogVideoX Image To Video")
    if job.mask is not None:
        node = "CogVideoX Inpaint or CogVideoX Image To Video"
        check_condition("masked video's latent", job.masked_video, job.latent, channels=channels, node=node)
        is_encoded = job.mask.shape[1:2] == (channels,)  # for object removal
        check_condition("mask", job.mask, job.latent, channels=channels if is_encoded else 1, node=node)


def check_tiles(job: Any) -> None:
    """Raises RequestError unless the tiles of a job of the VAE make sense."""
    choice("tiling", job.tiling, TILINGS)
    between("tile", job.tile, 64, 4096)
    between("overlap", job.overlap, 0, job.tile // 2)


def check_text(name: str, text: torch.Tensor, starts: tuple[float, ...], batch: int) -> None:
    """Raises RequestError unless text states fit the batch, and the number of prompts fits ``starts``."""
    if text.ndim != (4 if starts else 3) or text.shape[0] not in (1, batch):
        layout = f"[1 or {batch}, {'prompts, ' if starts else ''}tokens, features]"
        raise RequestError(f"{name} conditioning is {tuple(text.shape)}; it must be {layout}")
    ascending = all(start < after for start, after in pairwise((*starts, 1)))
    if starts and (len(starts) != text.shape[1] or starts[0] != 0 or not ascending):
        raise RequestError(f"{name}_starts is {starts}; it must be {text.shape[1]} ascending shares from 0 to below 1")


def check_timesteps(timesteps: tuple[int, ...], steps: int) -> None:
    """Raises RequestError unless timesteps by hand descend within the training's, one for each step."""
    descending = all(before > after for before, after in pairwise((TRAINED_TIMESTEPS, *timesteps, -1)))
    if timesteps and not descending:
        raise RequestError(
            f"timesteps are {', '.join(map(str, timesteps))}; they must descend from at most {TRAINED_TIMESTEPS - 1} to at least 0"
        )
    if timesteps and len(timesteps) != steps:
        raise RequestError(f"steps is {steps}, but there are {len(timesteps)} timesteps; set steps to {len(timesteps)}")


def timesteps_of(words: str) -> tuple[int, ...]:
    """Parses timesteps by hand, such as ``999, 856, 665, 399``; empty words are none.

    Raises:
        RequestError: for a word that is no whole number.
    """
    found = words.replace(",", " ").split()
    try:
        return tuple(map(int, found))
    except ValueError:
        raise RequestError(f"timesteps are '{words}'; use whole numbers such as 999, 856, 665, 399") from None


def check_size(width: int, height: int, frames: int, batch: int = 1, *, names: Mapping[str, str] = UNCHANGED) -> None:
    """Checks a size in pixels and frames before any tensor is made.

    Args:
        width, height, frames, batch: the size.
        names: what the caller's user knows ``frames`` and ``batch`` as, for the message.
    Raises:
        RequestError: naming the nearest value that is allowed.
    """
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            near = max(16, round(value / 16) * 16)
            raise RequestError(f"{name} is {value}; it must be a multiple of 16, such as {near}")
    if frames < 1 or frames % 4 != 1:
        near = max(1, round((frames - 1) / 4) * 4 + 1)
        raise RequestError(f"{names.get('frames', 'frames')} is {frames}; it must be 4k+1, such as {near}")
    if batch < 1:
        raise RequestError(f"{names.get('batch', 'batch')} is {batch}; it must be at least 1")
