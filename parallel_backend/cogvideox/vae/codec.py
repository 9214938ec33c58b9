"""Decodes latents to frames and encodes frames to latents, with or without tiling, in ComfyUI's layouts."""

import torch
from einops import rearrange

from ...jobs import DecodeJob, EncodeJob
from ..checkpoint.facts import SPATIAL, TEMPORAL

BYTES_PER_PIXEL = 4_000
"""Peak memory of a decode without tiling, excluding weights, per output pixel and frame in flight, 16-bit. Measured at 480x720
with eight frames in flight: 20.1 GiB including 10.8 of weights, 3600 (h200-kernels.json); plus a tenth for the convolutions of
other GPUs. Diffusers' own layers need 5800."""
FRAMES_IN_FLIGHT = 8
STAGED_BYTES = 2**25
"""Size of the buffer for copying a video from a GPU."""


def decode_bytes(latent_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns the peak memory in bytes of decoding one latent of this shape without tiling, excluding weights."""
    _, _, frames, height, width = latent_shape
    pixels = height * width * SPATIAL**2
    working = min(FRAMES_IN_FLIGHT, frames * TEMPORAL) * pixels * BYTES_PER_PIXEL * dtype.itemsize // 2
    return working + frames * TEMPORAL * pixels * 3 * dtype.itemsize


def working_bytes(job: DecodeJob | EncodeJob, dtype: torch.dtype) -> int:
    """Estimates the memory in bytes of a job, excluding weights; of one tile if tiling is on."""
    if isinstance(job, DecodeJob):
        frames, height, width = job.latent.shape[2:]
    else:
        frames, height, width = (job.pixels.shape[0] - 1) // TEMPORAL + 1, *(edge // SPATIAL for edge in job.pixels.shape[1:3])
    if job.tiling == "on":
        height, width = (min(edge, job.tile // SPATIAL) for edge in (height, width))
    return decode_bytes((1, 16, frames, height, width), dtype)


def ways_out(job: DecodeJob | EncodeJob, *, tiled: bool) -> list[int | None]:
    """Returns the tile edges in pixels to try, in order, when memory runs out; None is no tiling."""
    if job.tiling == "off":
        return [None]
    smaller = [tile for tile in (256, 128, 64) if tile < job.tile]
    return [*([] if tiled else [None]), job.tile, *smaller]


def set_tiling(vae, *, tiled: bool, tile: int, overlap: int) -> None:
    """Enables tiling with square tiles, or disables it; ``tile`` and ``overlap`` are in pixels."""
    if not tiled:
        vae.disable_tiling()
        return
    vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
    # Set here, as enable_tiling ignores an overlap of 0.
    vae.tile_overlap_factor_height = vae.tile_overlap_factor_width = overlap / tile


def stops(vae) -> list[torch.nn.Module]:
    """Returns the modules before which decoding and encoding can be cancelled.

    On a GPU that is before each batch of frames of a tile, at most a second apart. On other devices a batch may take half a
    minute, so it is before each residual block.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

    if vae.device.type == "cuda":
        return [vae.encoder, vae.decoder]
    return [module for module in vae.modules() if isinstance(module, CogVideoXResnetBlock3D)]


@torch.inference_mode()
def decode(vae, latent: torch.Tensor, strips=None) -> torch.Tensor:
    """Decodes ``[batch, 16, T, h, w]`` to ``[batch, 4T-3, 8h, 8w, 3]``, float32 in 0..1 on the CPU.

    An even T decodes to 4T frames, as the first latent frame gives four instead of one; the first three are dropped.

    Args:
        vae: on its device.
        latent: unscaled.
        strips: this rank's rows, if several ranks decode together; rank 0 gets the result. See
            :mod:`parallel_backend.parallel.vae_rows`.
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
    """Converts values in -1..1 to float32 in 0..1."""
    return (video.float() / 2 + 0.5).clamp_(0, 1)


def to_pixels(video: torch.Tensor) -> torch.Tensor:
    """Converts values in -1..1 to float32 in 0..1 on the CPU.

    From a GPU it copies a few frames at a time, on CUDA through pinned memory, which torch caches for the next video.
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
    """Encodes ``[frames, height, width, 3]`` in 0..1 to the mean latent ``[1, 16, T, h, w]``, float32 on the CPU.

    Args:
        vae: on its device.
        pixels: 4k+1 frames.
        strips: see :func:`decode`.
    """
    pixels = pixels if strips is None else strips.mine(pixels, dim=1)
    video = (pixels.to(vae.device) * 2 - 1).to(vae.dtype)
    latent = vae.encode(rearrange(video, "frames height width colours -> 1 colours frames height width")).latent_dist.mode()
    return (latent if strips is None else strips.join(latent, dim=3)).float().cpu()
