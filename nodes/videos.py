"""Videos and masks brought to what a model takes, and encoded."""

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

COVERED = "Resized to cover the video's size, its shape kept, and cropped at the centre."


def conditioned_inputs() -> list:
    """Both prompts, a VAE and the video's size."""
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative"), io.Vae.Input("vae"), *size_inputs()]


def conditioned_outputs() -> list:
    """Both prompts and a latent."""
    return [
        io.Conditioning.Output(display_name="positive"),
        io.Conditioning.Output(display_name="negative"),
        io.Latent.Output(display_name="latent"),
    ]


def fit_video(video: torch.Tensor, vae, *, width: int, height: int, length: int, node_id: str | None) -> torch.Tensor:
    """A video's first frames at a size; says so where they are fewer than were asked for.

    Args:
        video: ``[frames, rows, columns, colours]`` in 0..1.
        vae: whose checkpoint, where it is this pack's, says how many frames make whole tokens.
        width, height, length: of the result at most: as many frames as are there, 4k+1.
        node_id: where to say it.
    Raises:
        RequestError: for a size no CogVideoX makes.
    """
    check_size(width, height, length)
    together = isinstance(vae, VaeHandle) and vae.checkpoint.patch_size_t or 1
    frames = whole_frames(min(length, len(video)), together)
    if frames < length:
        rule = f"{TEMPORAL * together}k+{TEMPORAL * (together - 1) + 1}"
        line = f"{frames} of the video's {len(video)} frames are used, not {length}: a model of this kind takes {rule}"
        runtime.say(line, node_id, level=logging.WARNING)
    return cover(video[:frames], width=width, height=height)


def inpaint_values(vae, video: torch.Tensor, mask: torch.Tensor) -> dict:
    """What an inpaint model is given, as values of a conditioning: the video encoded where it is known, and the mask."""
    if conditions.shows_nothing(mask):
        return {}
    noise = vae.checkpoint.reference_noise if isinstance(vae, VaeHandle) else 0.0
    return {CONCAT: vae.encode(conditions.shown(video, mask, noise=noise)), CONCAT_MASK: conditions.latent_mask(mask)}
