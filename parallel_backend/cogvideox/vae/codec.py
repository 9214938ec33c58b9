"""Latents to frames and back, whole or in tiles, in ComfyUI's layouts."""

import torch
from einops import rearrange

from ...jobs import DecodeJob, EncodeJob
from ..checkpoint.facts import SPATIAL, TEMPORAL

BYTES_PER_PIXEL = 4_000
"""Peak of a whole decode beside the weights, per output pixel and frame in flight, 16-bit. Measured at 480x720, where eight frames are in
flight: 20.1 GiB with 10.8 of weights, 3600 (h200-kernels.json); a tenth for other GPUs' convolutions. Diffusers' own layers need 5800."""
FRAMES_IN_FLIGHT = 8
STAGED_BYTES = 2**25
"""Of a video on its way from a GPU."""


def decode_bytes(latent_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Peak bytes of decoding one latent of this shape whole, weights not counted."""
    _, _, frames, height, width = latent_shape
    pixels = height * width * SPATIAL**2
    working = min(FRAMES_IN_FLIGHT, frames * TEMPORAL) * pixels * BYTES_PER_PIXEL * dtype.itemsize // 2
    return working + frames * TEMPORAL * pixels * 3 * dtype.itemsize


def working_bytes(job: DecodeJob | EncodeJob, dtype: torch.dtype) -> int:
    """Estimated bytes of a job beside the weights: whole, or in a tile where tiles are asked for."""
    if isinstance(job, DecodeJob):
        frames, height, width = job.latent.shape[2:]
    else:
        frames, height, width = (job.pixels.shape[0] - 1) // TEMPORAL + 1, *(edge // SPATIAL for edge in job.pixels.shape[1:3])
    if job.tiling == "on":
        height, width = (min(edge, job.tile // SPATIAL) for edge in (height, width))
    return decode_bytes((1, 16, frames, height, width), dtype)


def ways_out(job: DecodeJob | EncodeJob, *, tiled: bool) -> list[int | None]:
    """Tile edges in pixels to try one after the other as memory runs out; None is the whole frame."""
    if job.tiling == "off":
        return [None]
    smaller = [tile for tile in (256, 128, 64) if tile < job.tile]
    return [*([] if tiled else [None]), job.tile, *smaller]


def set_tiling(vae, *, tiled: bool, tile: int, overlap: int) -> None:
    """Turns tiling on with square tiles, or off; ``tile`` and ``overlap`` in pixels."""
    if not tiled:
        vae.disable_tiling()
        return
    vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
    # Set here because enable_tiling takes an overlap of 0 for "as before".
    vae.tile_overlap_factor_height = vae.tile_overlap_factor_width = overlap / tile


def stops(vae) -> list[torch.nn.Module]:
    """The modules before whose work decoding and encoding can be stopped.

    On a GPU that is before each batch of frames of each tile, which takes it a second at most. Elsewhere a batch may take half a
    minute, so there it is before each residual block.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

    if vae.device.type == "cuda":
        return [vae.encoder, vae.decoder]
    return [module for module in vae.modules() if isinstance(module, CogVideoXResnetBlock3D)]


@torch.inference_mode()
def decode(vae, latent: torch.Tensor, strips=None) -> torch.Tensor:
    """Decodes ``[batch, 16, T, h, w]`` to ``[batch, 4T-3, 8h, 8w, 3]``, float32 in 0..1 on the CPU.

    An even T decodes to 4T frames, the first latent to four instead of one; the first three are dropped. With ``strips``, see
    :mod:`parallel_backend.parallel.vae_rows`, this rank decodes its own and rank 0 has them all.
    """
    frames = (latent.shape[2] - 1) * TEMPORAL + 1
    videos = []
    for one in latent.split(1):
        one = one if strips is None else strips.mine(one, dim=3)
        video = vae.decode(one.to(device=vae.device, dtype=vae.dtype)).sample[:, :, -frames:]
        video = video if strips is None else strips.join(video, dim=3)
        videos.append(to_pixels(rearrange(video, "1 colours frames height width -> frames height width colours")))
    return torch.stack(videos) if len(videos) > 1 else videos[0][None]


def brightness(video: torch.Tensor) -> torch.Tensor:
    """Numbers in -1..1 as float32 in 0..1."""
    return (video.float() / 2 + 0.5).clamp_(0, 1)


def to_pixels(video: torch.Tensor) -> torch.Tensor:
    """Numbers in -1..1 as float32 in 0..1 on the CPU.

    From a GPU a few frames at a time, on CUDA through memory that the driver can write to, which torch keeps for the next video.
    """
    if video.device.type == "cpu":
        return brightness(video)
    pixels = torch.empty(video.shape)
    some = max(STAGED_BYTES * len(video) // max(pixels.nbytes, 1), 1)
    staged = torch.empty(video[:some].shape, pin_memory=video.is_cuda)
    for part, target in zip(video.split(some), pixels.split(some)):
        target.copy_(staged[: len(part)].copy_(brightness(part)))
    return pixels


@torch.inference_mode()
def encode(vae, pixels: torch.Tensor, strips=None) -> torch.Tensor:
    """Encodes ``[frames, height, width, 3]`` in 0..1 to the mean latent ``[1, 16, T, h, w]``, float32 on the CPU."""
    pixels = pixels if strips is None else strips.mine(pixels, dim=1)
    video = (pixels.to(vae.device) * 2 - 1).to(vae.dtype)
    latent = vae.encode(rearrange(video, "frames height width colours -> 1 colours frames height width")).latent_dist.mode()
    return (latent if strips is None else strips.join(latent, dim=3)).float().cpu()
