"""The node CogVideoX Inpaint."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.pipeline import conditions
from ..parallel_backend.jobs import empty_latent
from .base import CogVideoXNode, schema
from .comfy.types import CATEGORY
from .conditioning import with_values
from .videos import (
    AS_TRAINED,
    FITTED,
    checkpoint_of,
    conditioned_inputs,
    conditioned_outputs,
    fit_video,
    inpaint_values,
    noise_input,
    rate_inputs,
    rate_output,
)


class CogVideoXInpaint(CogVideoXNode):
    """Adds a video and a mask of what to replace to the conditioning and returns an empty latent of the video's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXInpaint",
            display_name="CogVideoX Inpaint",
            aliases="inpainting, inpaint video, mask, outpaint, void, remove object",
            category=CATEGORY,
            description="Encodes a video without the masked part, for an inpaint model, such as CogVideoX-Fun-V1.1-5b-InP or "
            "CogVideoX-Fun-V1.5-5b-InP, which replaces that part; or the whole video and the mask for VOID, which removes an object.",
            inputs=[
                *conditioned_inputs(),
                io.Image.Input("video", tooltip=f"The video to change. {FITTED}"),
                io.Mask.Input(
                    "mask",
                    tooltip="White is replaced, black is kept. For VOID white is removed and grey is what the removal affects. One mask for every "
                    "frame, or one for all.",
                ),
                *rate_inputs(),
                noise_input(),
            ],
            outputs=[*conditioned_outputs(), rate_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        width,
        height,
        length,
        batch_size,
        video,
        mask,
        source_fps=0.0,
        model=None,
        noise_aug_strength=AS_TRAINED,
    ) -> io.NodeOutput:
        """Encodes the video once, for both prompts and every video of the batch."""
        checkpoint, node_id, given = checkpoint_of(vae, model), cls.hidden.unique_id, len(video)
        video, rate = fit_video(video, checkpoint, source_fps, size=(width, height, length), node_id=node_id)
        if mask.ndim == 3 and len(mask) == given:  # one for each frame of the clip
            mask = mask[:: rate.step]
        mask = conditions.fit_mask(mask, frames=len(video), width=width, height=height)
        values = inpaint_values(vae, video, mask, noise_aug_strength, checkpoint, node_id)
        latent = empty_latent(width=width, height=height, frames=len(video), batch=batch_size)
        return io.NodeOutput(*with_values(positive, negative, values), {"samples": latent}, rate.fps)
