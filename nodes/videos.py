"""Videos and masks, fitted to what a model takes and encoded."""

import logging

import torch
from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ..parallel_backend.cogvideox.checkpoint.compression import TEMPORAL
from ..parallel_backend.cogvideox.checkpoint.controlnet import ControlNetFile
from ..parallel_backend.cogvideox.checkpoint.facts import whole_frames
from ..parallel_backend.cogvideox.pipeline import conditions
from ..parallel_backend.cogvideox.pipeline.image import cover
from ..parallel_backend.media.frame_rate import FrameRate
from .comfy import runtime
from .comfy.types import ModelSocket
from .comfy.vae import VaeHandle
from .conditioning import CONCAT, CONCAT_MASK, size_inputs

COVERED = "It is resized to cover the video's size, keeps its aspect ratio, and is cropped at the centre."
AS_TRAINED = -1.0
"""Noise on the images as the checkpoint says."""
FITTED = f"At most the first length frames are used. {COVERED}"
FITTED_TO_LATENT = f"At most the first frames are used, as many as the latent has. {COVERED}"


def conditioned_inputs() -> list:
    """Returns inputs for both prompts, a VAE and the video's size."""
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative"), io.Vae.Input("vae"), *size_inputs()]


def model_input() -> io.Input:
    """Returns the input for the model that the VAE's checkpoint is taken for otherwise."""
    return ModelSocket.Input(
        "model",
        optional=True,
        tooltip="The model that will sample. Connect it if the VAE is the core's, which does not say what kind of model it is for.",
    )


def strength_inputs(*, strength: str, start: str, end: str, optional: bool = False) -> list:
    """Returns inputs for how strongly and in which steps the model is shown an image or a video.

    Args:
        strength, start, end: tooltips.
        optional: for a node that had no such inputs at first.
    """
    share = {"min": 0.0, "max": 1.0, "step": 0.01, "optional": optional}
    return [
        io.Float.Input("strength", default=1.0, tooltip=strength, **{**share, "max": 10.0}),
        io.Float.Input("start_percent", default=0.0, tooltip=start, **share),
        io.Float.Input("end_percent", default=1.0, tooltip=end, **share),
    ]


def source_fps_input() -> io.Input:
    """Returns the input for the clip's rate."""
    return io.Float.Input(
        "source_fps",
        default=0.0,
        min=0.0,
        max=1000.0,
        step=0.01,
        optional=True,
        tooltip="Frames a second of the clip: connect fps of Get Video Components. Every n-th frame is used, so that they are "
        "nearest to the rate that the model was trained at. 0: every frame is used.",
    )


def rate_inputs() -> list:
    """Returns inputs for the clip's rate and the model, which says what rate it was trained at."""
    return [source_fps_input(), model_input()]


def noise_input() -> io.Input:
    """Returns the input for the noise on an inpaint model's images."""
    return io.Float.Input(
        "noise_aug_strength",
        default=AS_TRAINED,
        min=AS_TRAINED,
        max=1.0,
        step=0.0001,
        round=0.0001,
        optional=True,
        tooltip="Noise on what an inpaint model is shown, for pixels in -1..1. More of it makes more motion. -1: as the model was "
        "trained, 0.0563 for CogVideoX-Fun-V1.1-5b-InP and 0 for others.",
    )


def rate_output() -> io.Output:
    """Returns the output for the rate of the frames that are used."""
    return io.Float.Output(display_name="fps")


def checkpoint_of(vae, model) -> Checkpoint | None:
    """Returns the checkpoint of the model or else of the VAE; None for a VAE of the core's alone."""
    if model is not None:
        return model.checkpoint
    return vae.checkpoint if isinstance(vae, VaeHandle) else None


def conditioned_outputs() -> list:
    """Returns outputs for both prompts and a latent."""
    return [
        io.Conditioning.Output(display_name="positive"),
        io.Conditioning.Output(display_name="negative"),
        io.Latent.Output(display_name="latent"),
    ]


def fit_video(
    video: torch.Tensor,
    checkpoint: Checkpoint | ControlNetFile | None,
    source_fps: float,
    *,
    size: tuple[int, int, int],
    node_id: str | None,
) -> tuple[torch.Tensor, FrameRate]:
    """Resizes the first frames of a video that are used. Shows what is done, and warns if there are fewer than requested.

    Args:
        video: ``[frames, height, width, channels]`` in 0..1.
        checkpoint: of the model, or a ControlNet: determines the rate and how many latent frames make a whole token; None if unknown.
        source_fps: rate of the video; 0 if unknown.
        size: width and height of the result in pixels, and its frames at most; it has 4k+1, or 8k+5 with tokens of two latent
            frames.
        node_id: the node that shows the lines.
    Returns:
        The frames that are used, and which these are.
    """
    width, height, length = size
    rate = rate_of(checkpoint, source_fps, node_id)
    video = video[:: rate.step]
    together = checkpoint and checkpoint.patch_size_t or 1
    frames = whole_frames(min(length, len(video)), together)
    if frames < length:
        rule = f"{TEMPORAL * together}k+{TEMPORAL * (together - 1) + 1}"
        line = f"{frames} of the video's {len(video)} frames are used, not {length}: this kind of model takes {rule}"
        runtime.say(line, node_id, level=logging.WARNING)
    return cover(video[:frames], width=width, height=height), rate


def rate_of(checkpoint: Checkpoint | ControlNetFile | None, source_fps: float, node_id: str | None) -> FrameRate:
    """Returns which frames of a video are used, and shows it."""
    trained = checkpoint.default_fps if checkpoint else None
    if source_fps and trained:
        rate = FrameRate.nearest(source_fps, trained)
        runtime.say(rate.describe(trained), node_id)
        return rate
    if source_fps:
        line = "every frame is used: the core's VAE does not say what rate the model was trained at; connect the model too"
        runtime.say(line, node_id, level=logging.WARNING)
        return FrameRate(source_fps)
    at = f"the model was trained at {trained}" if trained else "models were trained at 8 or 16"
    runtime.say(
        f"every frame is used, as if the clip had the model's rate ({at} fps); connect source_fps to use every n-th", node_id
    )
    return FrameRate(float(trained or 8))


def inpaint_values(
    vae, video: torch.Tensor, mask: torch.Tensor, noise: float, checkpoint: Checkpoint | None, node_id: str | None
) -> dict:
    """Returns an inpaint model's inputs as values of a conditioning: the encoded video without the masked part, and the mask.

    Empty if the mask covers the whole video. For an object removal model both are in one latent, as of the core's VOIDInpaintConditioning.

    Args:
        vae: encodes the video.
        video, mask: see :func:`.conditions.to_show`.
        noise: for pixels in -1..1; ``AS_TRAINED`` follows the checkpoint.
        checkpoint: of the model; None if unknown.
        node_id: the node that shows a warning.
    """
    removes = checkpoint is not None and checkpoint.removes
    if not removes and conditions.shows_nothing(mask):
        return {}
    if noise < 0:
        noise = checkpoint.reference_noise if checkpoint else 0.0
        if checkpoint is None:
            line = "no noise on what the model is shown: the core's VAE does not say how it was trained; connect the model too"
            runtime.say(line, node_id, level=logging.WARNING)
    pixels, ready = conditions.to_show(video, mask, noise=noise, removes=removes)
    encoded = {name: vae.encode(shown) for name, shown in pixels.items()}
    if removes:
        return {CONCAT: torch.cat([encoded["mask"], encoded["masked_video"]], dim=1)}
    return {CONCAT: encoded["masked_video"], CONCAT_MASK: ready["mask"]}
