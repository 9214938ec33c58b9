"""CogVideoX VAE Decode."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.facts import SPATIAL
from ..parallel_backend.jobs import TILINGS, DecodeJob
from ..parallel_backend.validation import check_latent
from .base import CogVideoXNode
from .comfy import runtime
from .comfy.types import CATEGORY, BackendSocket
from .comfy.vae import VaeHandle


class CogVideoXDecode(CogVideoXNode):
    """Latent to frames, exactly as many as were asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTCogVideoXVAEDecode",
            display_name="CogVideoX VAE Decode",
            category=CATEGORY,
            description="Decodes a latent, whole where it fits in memory and in blended tiles where it does not.",
            inputs=[
                io.Latent.Input("samples"),
                io.Vae.Input("vae"),
                io.Combo.Input(
                    "tiling",
                    options=list(TILINGS),
                    default="auto",
                    tooltip="auto: in tiles only where the whole would not fit.",
                ),
                io.Int.Input("tile_size", default=256, min=64, max=4096, step=32, tooltip="Edge of a tile in pixels."),
                io.Int.Input("overlap", default=64, min=0, max=1024, step=8, tooltip="Pixels that tiles share and blend."),
                BackendSocket.Input("backend", optional=True, tooltip="Without it the work is done in this process."),
            ],
            outputs=[io.Image.Output(display_name="images")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, tiling, tile_size, overlap, backend=None) -> io.NodeOutput:
        """Decodes with the checkpoint's VAE, or with a core VAE in its own way."""
        latent = samples["samples"]
        check_latent(latent)
        if not isinstance(vae, VaeHandle):
            return io.NodeOutput(decode_with_core(vae, latent, tiling, tile_size, overlap))
        job = DecodeJob(vae.model, latent, tiling, tile_size, overlap)
        node_id = cls.hidden.unique_id
        videos = runtime.run(job, backend, node_id, vae.device).tensor
        if len(videos) > 1:
            line = f"{len(videos)} videos of {videos.shape[1]} frames follow one another"
            runtime.say(f"{line}: set videos of Save Video (MP4) to {len(videos)} for a file each", node_id)
        return io.NodeOutput(videos.flatten(0, 1))


def decode_with_core(vae, latent, tiling: str, tile: int, overlap: int):
    """Frames ``[batch * frames, height, width, 3]`` from a VAE of the core's loaders."""
    if tiling == "on":
        video = vae.decode_tiled(latent, tile_x=tile // SPATIAL, tile_y=tile // SPATIAL, overlap=overlap // SPATIAL)
    else:
        video = vae.decode(latent)
    frames = (latent.shape[2] - 1) * 4 + 1
    return video[:, -frames:].flatten(0, 1)
