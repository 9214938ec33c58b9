"""The node CogVideoX Inpaint."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.pipeline import conditions
from ..parallel_backend.jobs import empty_latent
from .base import CogVideoXNode
from .comfy.types import CATEGORY
from .conditioning import with_values
from .videos import FITTED, conditioned_inputs, conditioned_outputs, fit_video, inpaint_values


class CogVideoXInpaint(CogVideoXNode):
    """Adds a video and a mask of what to replace to the conditioning and returns an empty latent of the video's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTCogVideoXInpaint",
            display_name="CogVideoX Inpaint",
            category=CATEGORY,
            description="Encodes a video without the masked part, for an inpaint model, such as CogVideoX-Fun-V1.1-5b-InP or "
            "CogVideoX-Fun-V1.5-5b-InP, which replaces that part.",
            inputs=[
                *conditioned_inputs(),
                io.Image.Input("video", tooltip=f"The video to change. {FITTED}"),
                io.Mask.Input("mask", tooltip="White is replaced, black is kept. One mask for every frame, or one for all."),
            ],
            outputs=conditioned_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, positive, negative, vae, width, height, length, batch_size, video, mask) -> io.NodeOutput:
        """Encodes the video once, for both prompts and every video of the batch."""
        node_id = cls.hidden.unique_id
        video = fit_video(video, vae, width=width, height=height, length=length, node_id=node_id)
        mask = conditions.fit_mask(mask, frames=len(video), width=width, height=height)
        latent = empty_latent(width=width, height=height, frames=len(video), batch=batch_size)
        return io.NodeOutput(*with_values(positive, negative, inpaint_values(vae, video, mask)), {"samples": latent})
