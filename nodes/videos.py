"""Videos and masks, fitted to what a model takes and encoded."""

import logging

import torch
from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.facts import TEMPORAL, whole_frames
from ..parallel_backend.cogvideox.pipeline import conditions
from ..parallel_backend.cogvideox.pipeline.image import cover
from ..parallel_backend.validation import check_size
from .comfy import runtime
from .comfy.vae import VaeHandle
from .conditioning import CONCAT, CONCAT_MASK, size_inputs

COVERED = "It is resized to cover the video's size, keeps its aspect ratio, and is cropped at the centre."
FITTED = f"At most the first length frames are used. {COVERED}"


def conditioned_inputs() -> list:
    """Returns inputs for both prompts, a VAE and the video's size."""
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative"), io.Vae.Input("vae"), *size_inputs()]


def conditioned_outputs() -> list:
    """Returns outputs for both prompts and a latent."""
    return [
        io.Conditioning.Output(display_name="positive"),
        io.Conditioning.Output(display_name="negative"),
        io.Latent.Output(display_name="latent"),
    ]


def fit_video(video: torch.Tensor, vae, *, width: int, height: int, length: int, node_id: str | None) -> torch.Tensor:
    """Resizes the first frames of a video. Warns if there are fewer than requested.

    Args:
        video: ``[frames, height, width, channels]`` in 0..1.
        vae: if it is this pack's, its checkpoint determines how many latent frames make a whole token.
        width, height: of the result, in pixels.
        length: frames of the result at most; it has 4k+1, or 8k+5 with tokens of two latent frames.
        node_id: the node that shows the warning.
    Raises:
        RequestError: for a size that no CogVideoX makes.
    """
    check_size(width, height, length)
    together = isinstance(vae, VaeHandle) and vae.checkpoint.patch_size_t or 1
    frames = whole_frames(min(length, len(video)), together)
    if frames < length:
        rule = f"{TEMPORAL * together}k+{TEMPORAL * (together - 1) + 1}"
        line = f"{frames} of the video's {len(video)} frames are used, not {length}: this kind of model takes {rule}"
        runtime.say(line, node_id, level=logging.WARNING)
    return cover(video[:frames], width=width, height=height)


def inpaint_values(vae, video: torch.Tensor, mask: torch.Tensor) -> dict:
    """Returns an inpaint model's inputs as values of a conditioning: the encoded video without the masked part, and the mask.

    Empty if the mask covers the whole video.
    """
    if conditions.shows_nothing(mask):
        return {}
    noise = vae.checkpoint.reference_noise if isinstance(vae, VaeHandle) else 0.0
    return {CONCAT: vae.encode(conditions.shown(video, mask, noise=noise)), CONCAT_MASK: conditions.latent_mask(mask)}
