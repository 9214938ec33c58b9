"""The node CogVideoX VAE Decode."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.compression import SPATIAL
from ..parallel_backend.jobs import DecodeJob
from ..parallel_backend.validation import TILINGS, check_latent
from .base import CogVideoXNode, schema
from .comfy import early_encoding, runtime
from .comfy.types import BACKEND, CATEGORY, BackendSocket
from .comfy.vae import VaeHandle


class CogVideoXDecode(CogVideoXNode):
    """Decodes a latent to exactly the requested number of frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXVAEDecode",
            display_name="CogVideoX VAE Decode",
            aliases="vae decode tiled, tiled decode, parallel vae",
            category=CATEGORY,
            description="Decodes a latent to frames: as a whole if it fits in memory, otherwise in blended tiles.",
            inputs=[
                io.Latent.Input("samples"),
                io.Vae.Input("vae"),
                io.Combo.Input(
                    "tiling",
                    options=list(TILINGS),
                    default="auto",
                    tooltip="Tiles need less memory and more time. auto: only if the whole does not fit in free memory.",
                ),
                io.Int.Input(
                    "tile_size",
                    default=256,
                    min=64,
                    max=4096,
                    step=32,
                    tooltip="Edge of a tile in pixels. Smaller tiles need less memory and more time.",
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=1024,
                    step=8,
                    tooltip="Pixels that neighbouring tiles share and blend. More takes more time and hides seams better.",
                ),
                BackendSocket.Input("backend", optional=True, tooltip=BACKEND),
            ],
            outputs=[io.Image.Output(display_name="images")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, samples, vae, tiling, tile_size, overlap, backend=None) -> io.NodeOutput:
        """Decodes with the checkpoint's VAE, or calls a core VAE."""
        latent = samples["samples"]
        check_latent(latent)
        if not isinstance(vae, VaeHandle):
            return io.NodeOutput(decode_with_core(vae, latent, tiling, tile_size, overlap))
        job = DecodeJob(vae.model, latent, tiling, tile_size, overlap)
        node_id = cls.hidden.unique_id
        encodings = early_encoding.begin(cls.hidden.prompt, node_id)
        videos = runtime.run(job, backend, node_id, vae.device, encodings and encodings.on_frames).tensor
        if len(videos) > 1:
            line = f"{len(videos)} videos of {videos.shape[1]} frames, one after the other"
            runtime.say(f"{line}: set videos of Save Video (MP4) to {len(videos)} to get one file for each", node_id)
        images = videos.flatten(0, 1)
        early_encoding.keep(images, encodings)
        return io.NodeOutput(images)


def decode_with_core(vae, latent, tiling: str, tile: int, overlap: int):
    """Decodes to frames ``[batch * frames, height, width, 3]`` with a VAE of the core's loaders.

    Args:
        vae: the core's VAE.
        latent: ``[batch, channels, latent frames, height/8, width/8]``.
        tiling: tiles only if it is ``on``; otherwise the core decides.
        tile, overlap: in pixels.
    """
    if tiling == "on":
        video = vae.decode_tiled(latent, tile_x=tile // SPATIAL, tile_y=tile // SPATIAL, overlap=overlap // SPATIAL)
    else:
        video = vae.decode(latent)
    frames = (latent.shape[2] - 1) * 4 + 1
    return video[:, -frames:].flatten(0, 1)
