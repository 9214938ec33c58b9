"""The node CogVideoX Video To Video."""

from comfy_api.latest import io

from .base import CogVideoXNode, schema
from .comfy.types import CATEGORY
from .conditioning import size_inputs
from .videos import FITTED, checkpoint_of, fit_video, rate_inputs, rate_output


class CogVideoXVideoToVideo(CogVideoXNode):
    """Encodes a video to the latent that the sampler starts from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXVideoToVideo",
            display_name="CogVideoX Video To Video",
            aliases="v2v, vid2vid, video to video",
            category=CATEGORY,
            description="Resizes, shortens and encodes a video for the sampler, whose denoise sets how much is replaced.",
            inputs=[
                io.Vae.Input("vae"),
                *size_inputs(),
                io.Image.Input("video", tooltip=f"The video to change. {FITTED}"),
                *rate_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="latent"), rate_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, width, height, length, batch_size, video, source_fps=0.0, model=None) -> io.NodeOutput:
        """Encodes the video once, for every video of the batch."""
        checkpoint, size = checkpoint_of(vae, model), (width, height, length)
        video, rate = fit_video(video, checkpoint, source_fps, size=size, node_id=cls.hidden.unique_id)
        return io.NodeOutput({"samples": vae.encode(video).repeat(batch_size, 1, 1, 1, 1)}, rate.fps)
