"""CogVideoX Inpaint."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.pipeline import conditions
from ..parallel_backend.jobs import empty_latent
from .base import CogVideoXNode
from .comfy.types import CATEGORY
from .conditioning import with_values
from .videos import COVERED, conditioned_inputs, conditioned_outputs, fit_video, inpaint_values


class CogVideoXInpaint(CogVideoXNode):
    """A video and what of it is to be made anew into the conditioning, and an empty latent of its size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTCogVideoXInpaint",
            display_name="CogVideoX Inpaint",
            category=CATEGORY,
            description="Encodes a video without what the mask covers, for an inpaint model, such as CogVideoX-Fun-V1.1-5b-InP "
            "or CogVideoX-Fun-V1.5-5b-InP, which makes that anew.",
            inputs=[
                *conditioned_inputs(),
                io.Image.Input("video", tooltip=f"Its first frames are used, as many as length. {COVERED}"),
                io.Mask.Input("mask", tooltip="White is made anew. One for every frame, or one for all."),
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
