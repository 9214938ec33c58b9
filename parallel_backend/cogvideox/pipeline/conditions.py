"""What is concatenated to the noise: a start image, a control video, or a masked video and its mask.

The order of channels is that of the published models: noise 16 and a start image 16, or a control video 16, or a mask 1
and a masked video 16. The first two are diffusers' pipelines; inpainting is VideoX-Fun's (aigc-apps/VideoX-Fun 804a425,
``pipeline_cogvideox_fun_inpaint.py``, and ``scripts/cogvideox_fun/train.py``, which trained the models so):

- a mask is 0 or 1, cut at a half, 1 where the video is made anew; there the video is black (-1), and the VAE encodes it
  whole, by its mean;
- the transformer sees ``1 - mask``, so 1 is what is known, as large as the latent: the first frame by itself, the others
  together, both trilinear. Mask and masked video are multiplied by the VAE's scaling factor, never its inverse;
- first and last frame are such a video of which only those frames are known. Of every four frames that resizing looks at the
  middle two, so that the mask never shows a last frame: the model sees it in the masked video alone, as in its training;
- where nothing is known there are zeros throughout, and the model makes a video from text alone (nine of ten of its training
  examples without an image were so);
- V1.1-5b saw its images with noise (``add_noise_in_inpaint_model``); black stays black.

One thing is diffusers' and not VideoX-Fun's: at another size than 720x480 the 2b models get sines computed for it, where
VideoX-Fun stretches those of 720x480 (its ``reports/cogvideox_fun/report_v1.md``).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from ...errors import RequestError
from ...jobs import SampleJob
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.facts import SPATIAL, TEMPORAL
from .image import cover

COMFYUI_TO_DIFFUSERS = "batch channels frames height width -> batch frames channels height width"
Condition = Callable[[float], torch.Tensor | None]
"""Gives, for the share of the steps that is done, ``[batch, frames, channels, height, width]`` to concatenate, or None."""


def make(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> Condition:
    """The condition of a job that :func:`parallel_backend.cogvideox.pipeline.validation.check` has passed.

    Args:
        job: with what its checkpoint takes.
        checkpoint: whose task decides.
        latents: ``[batch, frames, channels, height, width]``, padding frames in front; gives shape, device and dtype.
    """
    if checkpoint.task == "text":
        return lambda done: None
    if checkpoint.task == "control":
        control = fit(job.control * checkpoint.scaling_factor * job.control_strength, latents)
        off = torch.zeros_like(control)
        return lambda done: control if job.control_start <= done <= job.control_end else off
    condition = image_condition(job, checkpoint, latents) if checkpoint.task == "image" else known(job, checkpoint, latents)
    return lambda done: condition


def fit(condition: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A condition in ComfyUI's layout in that of the latents, once for each video of the batch."""
    condition = rearrange(condition, COMFYUI_TO_DIFFUSERS).to(device=latents.device, dtype=latents.dtype)
    return condition.expand(len(latents), -1, -1, -1, -1)


def image_condition(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> torch.Tensor:
    """The start image in the first frame, padding frames counted, then zeros."""
    condition = torch.zeros_like(latents)
    condition[:, :1] = fit(job.image, latents) * checkpoint.image_scale(job.image_scale)
    return condition


def known(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> torch.Tensor:
    """Where the video is known, and the video there; zeros where nothing is known."""
    if job.mask is None:
        return torch.zeros_like(latents[:, :, :1]).repeat(1, 1, 1 + latents.shape[2], 1, 1)
    seen = torch.cat([fit(1 - job.mask, latents), fit(job.masked_video, latents)], dim=2)
    return seen * checkpoint.scaling_factor


def between_images(start: torch.Tensor | None, end: torch.Tensor | None, *, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A video of which the first frames, the last frames, or both are known.

    Args:
        start, end: ``[frames, height, width, 3]`` in 0..1, of the video's size; at least one of them.
        frames: of the video.
    Returns:
        The video, black where it is not known, and its mask ``[frames, height, width]``, 1 there.
    """
    like = end if start is None else start
    video = torch.zeros(frames, *like.shape[1:])
    mask = torch.ones(video.shape[:3])
    if start is not None:
        start = start[:frames]
        video[: len(start)], mask[: len(start)] = start, 0
    if end is not None:
        end = end[-frames:]
        video[frames - len(end) :], mask[frames - len(end) :] = end, 0
    return video, mask


def fit_mask(mask: torch.Tensor, *, frames: int, width: int, height: int) -> torch.Tensor:
    """A mask ``[frames, rows, columns]`` brought to the video's size as the video is; a single one serves every frame.

    Raises:
        RequestError: when there are several, and fewer than the video has frames.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if 1 < len(mask) < frames:
        raise RequestError(f"the mask has {len(mask)} frames and the video {frames}; give one for all, or as many")
    return cover(mask[:frames, ..., None], width=width, height=height)[..., 0].expand(frames, -1, -1)


def shows_nothing(mask: torch.Tensor) -> bool:
    """Whether all of a video is made anew: then an inpaint model is given nothing, see above."""
    return bool((mask >= 0.5).all())


def shown(video: torch.Tensor, mask: torch.Tensor, *, noise: float = 0.0) -> torch.Tensor:
    """What an inpaint model is shown of a video: ``[frames, height, width, 3]`` in 0..1, ready to be encoded.

    Args:
        video: of the same shape.
        mask: ``[frames, height, width]``; where it is at least a half the result is black.
        noise: on what is not black; see ``Checkpoint.reference_noise``.
    """
    return add_noise(torch.where(mask[..., None] < 0.5, video, 0.0), noise)


def latent_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask ``[frames, height, width]``, cut at a half, as ``[1, 1, latent frames, height/8, width/8]``."""
    cut = (mask >= 0.5).float()[None, None]
    frames, height, width = mask.shape
    size = (height // SPATIAL, width // SPATIAL)
    parts = [F.interpolate(cut[:, :, :1], (1, *size), mode="trilinear", align_corners=False)]
    if frames > 1:
        parts.append(F.interpolate(cut[:, :, 1:], ((frames - 1) // TEMPORAL, *size), mode="trilinear", align_corners=False))
    return torch.cat(parts, dim=2)


def add_noise(video: torch.Tensor, strength: float, *, seed: int = 0) -> torch.Tensor:
    """Pixels in 0..1 with noise of a standard deviation that counts for -1..1; what is black stays black."""
    if not strength:
        return video
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed)) * (strength / 2)
    return torch.where(video == 0, video, video + noise)
