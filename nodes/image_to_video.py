"""CogVideoX Image To Video."""

import node_helpers
from comfy_api.latest import io

from ..parallel_backend.cogvideox.image import cover
from ..parallel_backend.jobs import empty_latent
from .conditioning import START_IMAGE, check_conditioning, size_inputs
from .decoding import check_vae
from .sockets import CATEGORY


class CogVideoXImageToVideo(io.ComfyNode):
    """A start image into the conditioning, and an empty latent of the video's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's V3 nodes."""
        return io.Schema(
            node_id="XDiTCogVideoXImageToVideo",
            display_name="CogVideoX Image To Video",
            category=CATEGORY,
            description="Encodes a start image for an image-to-video model, such as CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V.",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Vae.Input("vae"),
                *size_inputs(),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The video's first frame. Resized to cover the video's size, its shape kept, and cropped at the "
                    "centre; of several images the first is used.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, width, height, length, batch_size, start_image=None) -> io.NodeOutput:
        """Encodes the image once, for both prompts and every video of the batch."""
        latent = {"samples": empty_latent(width=width, height=height, frames=length, batch=batch_size)}
        if start_image is None:
            return io.NodeOutput(positive, negative, latent)
        check_conditioning(positive, "positive")
        check_conditioning(negative, "negative")
        check_vae(vae)
        values = {START_IMAGE: vae.encode(cover(start_image[:1], width=width, height=height))}
        positive, negative = (node_helpers.conditioning_set_values(prompt, values) for prompt in (positive, negative))
        return io.NodeOutput(positive, negative, latent)
