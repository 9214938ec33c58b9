"""The ``VAE`` of Load CogVideoX: the checkpoint's VAE behind the core's interface."""

import logging
from typing import Any

import torch

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.checkpoint.compression import SPATIAL, TEMPORAL
from ...parallel_backend.errors import RequestError
from ...parallel_backend.jobs import DecodeJob, EncodeJob
from ...parallel_backend.media.pictures import checked_latent, checked_pictures
from ...parallel_backend.model import Model
from . import runtime
from .handle import Handle, Placement


class VaeHandle(Handle):
    """The checkpoint's VAE with the interface of the core's ``VAE``. It runs in this process.

    Args:
        model: the same description as the transformer's.
    """

    kind, loader = "VAE", "VAELoader"
    latent_channels = 16
    latent_dim = 3

    def __init__(self, model: Model):
        self.model = model
        self.device = runtime.torch_device()
        self.patcher = Placement(self, self.device)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that contains the VAE."""
        return Checkpoint.of(self.model)

    def decode(self, samples: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Decodes a latent to ``[batch, frames, height, width, 3]`` in 0..1, in tiles if the whole does not fit in memory."""
        return self._run(DecodeJob(self.model, checked_latent(samples, "samples")))

    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None) -> torch.Tensor:
        """Decodes like :meth:`decode`, in tiles. Sizes are in latent units.

        ``tile_t`` and ``overlap_t`` have no effect: frames are always decoded a few at a time.
        """
        tile = SPATIAL * (tile_x or 32)
        overlap = min(SPATIAL * (8 if overlap is None else overlap), tile // 2)
        return self._run(DecodeJob(self.model, checked_latent(samples, "samples"), "on", tile, overlap))

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Encodes ``[frames, height, width, 3]``, or a batch of these, to a latent.

        The video is cropped to a size that the VAE takes; see :func:`fitting`.
        """
        return self._encode(pixel_samples)

    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """Encodes like :meth:`encode`, in tiles. Sizes are in pixels. ``tile_t`` and ``overlap_t`` have no effect."""
        tile = tile_x or 256
        return self._encode(pixel_samples, tiling="on", tile=tile, overlap=min(64 if overlap is None else overlap, tile // 2))

    def _encode(self, pixels: torch.Tensor, **tiles: Any) -> torch.Tensor:
        batch = pixels if isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and len(pixels) else [pixels]
        videos = [fitting(checked_pictures(video, "pixels")) for video in batch]
        return torch.cat([self._run(EncodeJob(self.model, video, **tiles)) for video in videos])

    def _run(self, job: DecodeJob | EncodeJob) -> torch.Tensor:
        return runtime.run(job, device=self.device).tensor

    def spacial_compression_decode(self) -> int:
        """Returns the pixels per latent column."""
        return SPATIAL

    def spacial_compression_encode(self) -> int:
        """Returns the pixels per latent column."""
        return SPATIAL

    def temporal_compression_decode(self) -> int:
        """Returns the frames per latent frame."""
        return TEMPORAL

    def throw_exception_if_invalid(self) -> None:
        """Does nothing: the checkpoint was checked when it was opened."""


def fitting(pixels: torch.Tensor) -> torch.Tensor:
    """Crops a video at its centre to sides that are multiples of 16, and to its first 4k+1 frames. Warns if it crops.

    Raises:
        RequestError: for a video smaller than 16x16.
    """
    frames, height, width = pixels.shape[0], pixels.shape[1], pixels.shape[2]
    if min(height, width) < 16:
        raise RequestError(f"the video is {width}x{height}; it must be at least 16x16")
    kept, rows, columns = (frames - 1) // 4 * 4 + 1, height // 16 * 16, width // 16 * 16
    if (kept, rows, columns) != (frames, height, width):
        line = f"the video of {frames} frames {width}x{height} is cropped to {kept} frames {columns}x{rows}"
        runtime.say(line, level=logging.WARNING)
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[:kept, top : top + rows, left : left + columns]
