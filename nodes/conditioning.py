"""Latents to start from, and the core's conditioning as this pack's text states and start image."""

import logging

import torch
from comfy_api.latest import io

from ..parallel_backend.errors import RequestError
from ..parallel_backend.jobs import empty_latent
from .sockets import CATEGORY

logger = logging.getLogger(__name__)

START_IMAGE = "concat_latent_image"
"""The core's own name in a conditioning for the latent that is concatenated to the noise."""


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


def start_image(conditioning) -> torch.Tensor | None:
    """The latent of the start image that a conditioning carries, or None."""
    return conditioning[0][1].get(START_IMAGE)


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
    if ignored := sorted(set(options) - {"pooled_output", START_IMAGE}):
        logger.warning("%s carries %s, which CogVideoX does not use", name, ", ".join(ignored))
    if states.shape[1] > limit:
        logger.warning("%s has %d tokens; the model takes %d, the rest is cut off", name, states.shape[1], limit)
        states = states[:, :limit]
    return states
