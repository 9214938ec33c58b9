"""Latents to start from, and the core's conditioning as this pack's text states and conditions."""

import logging

import node_helpers
import torch
from comfy_api.latest import io

from ..parallel_backend.errors import RequestError
from ..parallel_backend.jobs import empty_latent
from .sockets import CATEGORY

logger = logging.getLogger(__name__)

CONCAT, CONCAT_MASK = "concat_latent_image", "concat_mask"
"""The core's own names in a conditioning for a latent that is concatenated to the noise, and for where it is made anew."""
IMAGE_SCALE, CONTROL = "cogvideox_image_scale", "cogvideox_control"
"""This pack's: a name of ``jobs.IMAGE_SCALES``, and the fields of a job that a control video sets."""


def size_inputs() -> list:
    """Width, height, length and batch size of a video."""
    return [
        io.Int.Input("width", default=720, min=16, max=4096, step=16, tooltip="A multiple of 16."),
        io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="A multiple of 16."),
        io.Int.Input(
            "length",
            default=49,
            min=1,
            max=1025,
            step=4,
            tooltip="Frames, 4k+1. CogVideoX 1.0 was trained with 49 (8 fps), 1.5 with 81 or 161 (16 fps).",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos at once."),
    ]


class EmptyCogVideoXLatent(io.ComfyNode):
    """A latent of zeros: its size is the video's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's V3 nodes."""
        return io.Schema(
            node_id="XDiTEmptyCogVideoXLatent",
            display_name="Empty CogVideoX Latent",
            category=CATEGORY,
            description="An empty latent for text to video.",
            inputs=size_inputs(),
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int) -> io.NodeOutput:
        """Makes the zeros."""
        return io.NodeOutput({"samples": empty_latent(width=width, height=height, frames=length, batch=batch_size)})


def check_conditioning(conditioning, name: str) -> None:
    """Raises RequestError for another pack's tensors under the same socket name."""
    if isinstance(conditioning, torch.Tensor):
        raise RequestError(
            f"{name} comes from the CogVideoX wrapper, whose conditioning is a bare tensor; "
            "use CLIP Text Encode with Load CogVideoX or the core's CLIPLoader (type cogvideox)"
        )


def with_values(positive, negative, values: dict) -> tuple:
    """Both prompts with values of a conditioning.

    Raises:
        RequestError: for another pack's tensors under the same socket name.
    """
    check_conditioning(positive, "positive")
    check_conditioning(negative, "negative")
    return tuple(node_helpers.conditioning_set_values(prompt, values) for prompt in (positive, negative))


def conditions_of(conditioning) -> dict:
    """The conditions that a conditioning carries, as fields of a sampling job."""
    options = conditioning[0][1]
    fields = dict(options.get(CONTROL, {}))
    if CONCAT not in options:
        return fields
    if CONCAT_MASK in options:
        return {**fields, "masked_video": options[CONCAT], "mask": options[CONCAT_MASK]}
    return {**fields, "image": options[CONCAT], "image_scale": options.get(IMAGE_SCALE, "auto")}


def text_states(conditioning, name: str, *, limit: int) -> torch.Tensor:
    """The text states of a conditioning, cut to a model's token limit.

    Args:
        conditioning: the core's, ``[[states, options], …]``; the first entry is used.
        name: of the input, for messages.
        limit: tokens the model takes.
    Raises:
        RequestError: for another pack's tensors under the same socket name.
    """
    check_conditioning(conditioning, name)
    states, options = conditioning[0]
    if len(conditioning) > 1:
        logger.warning("%s has %d entries; the first is used", name, len(conditioning))
    if ignored := sorted(set(options) - {"pooled_output", CONCAT, CONCAT_MASK, IMAGE_SCALE, CONTROL}):
        logger.warning("%s carries %s, which CogVideoX does not use", name, ", ".join(ignored))
    if states.shape[1] > limit:
        logger.warning("%s has %d tokens; the model takes %d, the rest is cut off", name, states.shape[1], limit)
        states = states[:, :limit]
    return states
