"""The node Apply CogVideoX ControlNet."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.compression import SPATIAL, frames_of
from ..parallel_backend.cogvideox.transformer.controlnet import encode
from ..parallel_backend.model import ControlNet
from ..parallel_backend.validation import check_latent
from .base import CogVideoXNode, schema
from .comfy.types import CATEGORY, ControlNetSocket
from .conditioning import with_controlnet
from .videos import FITTED_TO_LATENT, conditioned_outputs, fit_video, rate_output, source_fps_input, strength_inputs


class ApplyCogVideoXControlNet(CogVideoXNode):
    """Adds a ControlNet and its control video to the conditioning. Several in a chain add up."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTApplyCogVideoXControlNet",
            display_name="Apply CogVideoX ControlNet",
            aliases="apply controlnet, canny, hed, edges, control video",
            category=CATEGORY,
            description="Makes the video follow the edges of a control video, by a ControlNet. Chain the node for several.",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                ControlNetSocket.Input("controlnet"),
                io.Latent.Input("latent", tooltip="The latent that the sampler will start from. It sets the size."),
                io.Image.Input("control_video", tooltip=f"The edges that the video follows. {FITTED_TO_LATENT}"),
                *strength_inputs(
                    strength="How strongly the video follows the control video; 0 is no control.",
                    start="Share of the steps after which control starts. 0: at once.",
                    end="Share of the steps after which control ends. With 0.5 the prompt alone decides the details.",
                ),
                source_fps_input(),
            ],
            outputs=[*conditioned_outputs(), rate_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, positive, negative, controlnet, latent, control_video, strength, start_percent, end_percent, source_fps=0.0
    ) -> io.NodeOutput:
        """Encodes the control video, and shortens the latent if the video is shorter."""
        samples, file = latent["samples"], controlnet.file
        check_latent(samples)
        frames, height, width = samples.shape[2:]
        size = (width * SPATIAL, height * SPATIAL, frames_of(frames))
        video, rate = fit_video(control_video, file, source_fps, size=size, node_id=cls.hidden.unique_id)
        given = ControlNet(str(file.path), strength, start_percent, end_percent), encode(file, video)
        prompts = (with_controlnet(prompt, *given) for prompt in (positive, negative))
        return io.NodeOutput(*prompts, {**latent, "samples": samples[:, :, : given[1].shape[2]]}, rate.fps)
