"""The node CogVideoX Control To Video."""

from comfy_api.latest import io

from ..parallel_backend.jobs import empty_latent
from .base import CogVideoXNode, schema
from .comfy.types import CATEGORY
from .conditioning import CONTROL, with_values
from .videos import (
    FITTED,
    checkpoint_of,
    conditioned_inputs,
    conditioned_outputs,
    fit_video,
    rate_inputs,
    rate_output,
    strength_inputs,
)


class CogVideoXControlToVideo(CogVideoXNode):
    """Adds a control video to the conditioning and returns an empty latent of the video's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXControlToVideo",
            display_name="CogVideoX Control To Video",
            aliases="pose, canny, depth, controlnet, control video",
            category=CATEGORY,
            description="Encodes a control video (poses, edges, depth …) for a control model, such as "
            "CogVideoX-Fun-V1.1-5b-Control or CogVideoX-Fun-V1.1-5b-Pose.",
            inputs=[
                *conditioned_inputs(),
                io.Image.Input("control_video", tooltip=f"The poses, edges or depth that the video follows. {FITTED}"),
                *strength_inputs(
                    strength="How strongly the video follows the control video: 1 is as trained, 0 is no control.",
                    start="Share of the steps after which control starts. 0: at once.",
                    end="Share of the steps after which control ends. With 0.5 the prompt alone decides the details.",
                ),
                *rate_inputs(),
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
        control_video,
        strength,
        start_percent,
        end_percent,
        source_fps=0.0,
        model=None,
    ) -> io.NodeOutput:
        """Encodes the control video once, for both prompts and every video of the batch."""
        checkpoint, size = checkpoint_of(vae, model), (width, height, length)
        video, rate = fit_video(control_video, checkpoint, source_fps, size=size, node_id=cls.hidden.unique_id)
        latent = empty_latent(width=width, height=height, frames=len(video), batch=batch_size)
        control = {
            "control": vae.encode(video),
            "control_strength": strength,
            "control_start": start_percent,
            "control_end": end_percent,
        }
        return io.NodeOutput(*with_values(positive, negative, {CONTROL: control}), {"samples": latent}, rate.fps)
