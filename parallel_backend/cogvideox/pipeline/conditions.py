"""Conditions that are concatenated to the noise: a start and an end image, a control video, or a video and its mask.

The channel order is that of the published models: 16 channels of noise, then 16 of a start image, 16 of a control video, or 1
of a mask and 16 of a masked video. The first two follow diffusers' pipelines. Inpainting follows VideoX-Fun
(aigc-apps/VideoX-Fun 804a425, ``pipeline_cogvideox_fun_inpaint.py``, and ``scripts/cogvideox_fun/train.py``, which trained the
models). Object removal is in :mod:`.removal`.

- The mask is thresholded at 0.5 to 0 or 1; 1 is to be replaced. The video is black (-1) there, and the VAE encodes all of it to
  the posterior's mean.
- The transformer sees ``1 - mask``, so 1 is known, resized to the latent's size: the first frame separately, the others
  together, both trilinear. Mask and masked video are multiplied by the VAE's scaling factor, never by its inverse.
- A first and a last frame are a video in which only those frames are known. Of every four frames, resizing averages the middle
  two, so the resized mask never shows a last frame. The model sees it only in the masked video, as in its training.
- If nothing is known, mask and masked video are zeros, and the model makes a video from text only (as for nine of ten training
  examples without an image).
- V1.1-5b was trained with noise on the images (``add_noise_in_inpaint_model``). Black pixels get no noise.

Weights for frame interpolation have the shapes of 5b-I2V. They take a second image, encoded alone, in the last latent frame
(feizc/CogvideX-Interpolation 7ed3938, ``cogvideox_interpolation/pipeline.py``).

Before its start and after its end a condition is zeros. To an image-to-video model that is no image, as in one of twenty of its
training examples (``noised_image_dropout`` of 0.05 in bilibili/Index-anisora 171fe63, whose training is that of zai-org/CogVideo), and
to an inpaint model it is that nothing is known.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from ...errors import RequestError
from ...jobs import SampleJob
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compression import SPATIAL, TEMPORAL
from . import removal
from .image import cover

COMFYUI_TO_DIFFUSERS = "batch channels frames height width -> batch frames channels height width"
Condition = Callable[[float], torch.Tensor | None]
"""Returns the condition ``[batch, frames, channels, height, width]``, or None, given the completed fraction of the steps."""


def make(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> Condition:
    """Creates the condition of a job.

    Args:
        job: checked by :func:`parallel_backend.cogvideox.pipeline.validation.check`.
        checkpoint: its task determines the condition.
        latents: ``[batch, frames, channels, height, width]`` with padding frames in front; for shape, device and dtype.
    """
    if checkpoint.task == "text":
        return lambda done: None
    condition = CONDITIONS[checkpoint.task](job, checkpoint, latents)
    name = "control" if checkpoint.task == "control" else "image"
    start, end = getattr(job, f"{name}_start"), getattr(job, f"{name}_end")
    off = torch.zeros_like(condition)
    return lambda done: condition if start <= done <= end else off


def fit(condition: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Converts a condition from ComfyUI's layout to the latents' layout, device and dtype, expanded to the batch."""
    condition = rearrange(condition, COMFYUI_TO_DIFFUSERS).to(device=latents.device, dtype=latents.dtype)
    return condition.expand(len(latents), -1, -1, -1, -1)


def control_video(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> torch.Tensor:
    """Returns the control video."""
    return fit(job.control * checkpoint.scaling_factor * job.control_strength, latents)


def start_image(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> torch.Tensor:
    """Returns the start image in the first frame, which may be a padding frame, an end image in the last, and zeros in the others."""
    condition, scale = torch.zeros_like(latents), checkpoint.image_scale(job.image_scale) * job.image_strength
    condition[:, :1] = fit(job.image, latents) * scale
    if job.end_image is not None:
        condition[:, -1:] = fit(job.end_image, latents) * scale
    return condition


def known(job: SampleJob, checkpoint: Checkpoint, latents: torch.Tensor) -> torch.Tensor:
    """Returns the inverted mask, or the encoded one, and the masked video; zeros if nothing is known."""
    if job.mask is None:
        return torch.zeros_like(latents[:, :, :1]).repeat(1, 1, 1 + latents.shape[2], 1, 1)
    mask = job.mask if checkpoint.removes else 1 - job.mask
    seen = torch.cat([fit(mask, latents), fit(job.masked_video, latents) * job.image_strength], dim=2)
    return seen * checkpoint.scaling_factor


CONDITIONS = {"control": control_video, "image": start_image, "inpaint": known, "removal": known}
"""What makes the condition of a task."""


def to_show(
    video: torch.Tensor, mask: torch.Tensor, *, noise: float, removes: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns what a model is shown of a video and a mask, by field of a :class:`SampleJob`.

    Args:
        video: ``[frames, height, width, 3]`` in 0..1.
        mask: ``[frames, height, width]`` in 0..1.
        noise: see :func:`shown`.
        removes: whether it is for an object removal model, else for an inpaint model.
    Returns:
        The pixels for the VAE to encode, and what needs no encoding. Both are empty if an inpaint model is shown nothing.
    """
    if removes:
        return {"masked_video": add_noise(video, noise), "mask": removal.shown_mask(mask)}, {}
    if shows_nothing(mask):
        return {}, {}
    return {"masked_video": shown(video, mask, noise=noise)}, {"mask": latent_mask(mask)}


def between_images(start: torch.Tensor | None, end: torch.Tensor | None, *, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a masked video in which only the first frames, the last frames, or both are known.

    Args:
        start, end: ``[frames, height, width, 3]`` in 0..1, of the video's size; at least one must be given.
        frames: number of frames of the video.
    Returns:
        The video, black where it is not known, and its mask ``[frames, height, width]``, 1 where it is not known.
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
    """Resizes and crops a mask ``[frames, rows, columns]`` as the video is resized. A single mask is used for every frame.

    Args:
        mask: may also be ``[rows, columns]``.
        frames, width, height: of the video.
    Raises:
        RequestError: if there are several masks, but fewer than frames.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if 1 < len(mask) < frames:
        raise RequestError(f"the mask has {len(mask)} frames and the video {frames}; give one for all, or as many")
    return cover(mask[:frames, ..., None], width=width, height=height)[..., 0].expand(frames, -1, -1)


def shows_nothing(mask: torch.Tensor) -> bool:
    """Returns whether the mask covers the entire video. An inpaint model then gets zeros; see the module's docstring."""
    return bool((mask >= 0.5).all())


def shown(video: torch.Tensor, mask: torch.Tensor, *, noise: float = 0.0) -> torch.Tensor:
    """Returns the masked video to encode for an inpaint model, ``[frames, height, width, 3]`` in 0..1.

    Args:
        video: of that shape.
        mask: ``[frames, height, width]``; the result is black where it is 0.5 or more.
        noise: standard deviation of the noise on other pixels; see ``Checkpoint.reference_noise``.
    """
    return add_noise(torch.where(mask[..., None] < 0.5, video, 0.0), noise)


def latent_mask(mask: torch.Tensor) -> torch.Tensor:
    """Thresholds a mask ``[frames, height, width]`` at 0.5 and resizes it to ``[1, 1, latent frames, height/8, width/8]``."""
    cut = (mask >= 0.5).float()[None, None]
    frames, height, width = mask.shape
    size = (height // SPATIAL, width // SPATIAL)
    parts = [F.interpolate(cut[:, :, :1], (1, *size), mode="trilinear", align_corners=False)]
    if frames > 1:
        parts.append(F.interpolate(cut[:, :, 1:], ((frames - 1) // TEMPORAL, *size), mode="trilinear", align_corners=False))
    return torch.cat(parts, dim=2)


def add_noise(video: torch.Tensor, strength: float, *, seed: int = 0) -> torch.Tensor:
    """Adds noise to pixels in 0..1, except black ones.

    Args:
        video: in 0..1.
        strength: standard deviation, for pixels in -1..1.
        seed: of the noise.
    """
    if not strength:
        return video
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed)) * (strength / 2)
    return torch.where(video == 0, video, video + noise)
