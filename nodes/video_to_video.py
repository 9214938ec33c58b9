"""The node CogVideoX Video To Video."""

from comfy_api.latest import io

from .base import CogVideoXNode
from .comfy.types import CATEGORY
from .conditioning import size_inputs
from .videos import FITTED, fit_video


class CogVideoXVideoToVideo(CogVideoXNode):
    """Encodes a video to the latent that the sampler starts from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTCogVideoXVideoToVideo",
            display_name="CogVideoX Video To Video",
            category=CATEGORY,
            description="Resizes, shortens and encodes a video for the sampler, whose denoise sets how much is replaced.",
            inputs=[
                io.Vae.Input("vae"),
                *size_inputs(),
                io.Image.Input("video", tooltip=f"The video to change. {FITTED}"),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, width, height, length, batch_size, video) -> io.NodeOutput:
        """Encodes the video once, for every video of the batch."""
        node_id = cls.hidden.unique_id
        latent = vae.encode(fit_video(video, vae, width=width, height=height, length=length, node_id=node_id))
        return io.NodeOutput({"samples": latent.repeat(batch_size, 1, 1, 1, 1)})
