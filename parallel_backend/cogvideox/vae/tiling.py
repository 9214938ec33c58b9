"""Decides whether the VAE works in tiles, and how large they are, from the memory that a job needs.

:mod:`parallel_backend.engine.vae_jobs` carries it out.
"""

from fractions import Fraction

import torch

from ...jobs import DecodeJob, EncodeJob
from ..checkpoint.compression import SPATIAL, TEMPORAL, latent_frames_of

BYTES_PER_PIXEL = 4_000
"""Peak memory of a decode without tiling, excluding weights, per output pixel and frame in flight, 16-bit. Measured at 480x720
with eight frames in flight: 20.1 GiB including 10.8 of weights, 3600 (h200-kernels.json); plus a tenth for the convolutions of
other GPUs. Diffusers' own layers need 5800."""
FRAMES_IN_FLIGHT = 8
STRIP_MARGIN = 1.2
"""Safety factor on the estimated memory of a strip: a rank that runs out of memory there ends the group."""


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
        frames, height, width = latent_frames_of(job.pixels.shape[0]), *(edge // SPATIAL for edge in job.pixels.shape[1:3])
    if job.tiling == "on":
        height, width = (min(edge, job.tile // SPATIAL) for edge in (height, width))
    return decode_bytes((1, 16, frames, height, width), dtype)


def starts_tiled(job: DecodeJob | EncodeJob, need: int, free: float) -> bool:
    """Returns whether a job starts in tiles: always with tiling on, and with tiling auto if ``need`` exceeds ``free``, in bytes."""
    return job.tiling == "on" or (job.tiling == "auto" and need > free)


def tiles_to_try(job: DecodeJob | EncodeJob, *, tiled: bool) -> list[int | None]:
    """Returns the tile edges in pixels to try, in order, when memory runs out; None is no tiling."""
    if job.tiling == "off":
        return [None]
    smaller = [tile for tile in (256, 128, 64) if tile < job.tile]
    return [*([] if tiled else [None]), job.tile, *smaller]


def set_tiling(vae, *, tiled: bool, tile: int, overlap: int) -> None:
    """Enables tiling with square tiles, or disables it.

    Args:
        vae: diffusers'.
        tiled: whether it is enabled.
        tile, overlap: in pixels, of which the last ones that are less than a latent's are left out.
    """
    if not tiled:
        vae.disable_tiling()
        return
    tile, overlap = (pixels // SPATIAL * SPATIAL for pixels in (tile, overlap))
    vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
    # Set here, as enable_tiling ignores an overlap of 0. diffusers rounds down what it multiplies by this, in pixels and in latents: with
    # a float some tiles would be joined elsewhere than they were cut.
    vae.tile_overlap_factor_height = vae.tile_overlap_factor_width = Fraction(overlap, tile)
