"""The job of enlarging a video with a super-resolution model, in tiles."""

from dataclasses import dataclass

import torch

from .errors import RequestError
from .model import Model
from .validation import TILINGS, between, check_text, choice

TOGETHER = 8
"""Tiles have 8k+1 frames, as the models were trained."""
EDGE = 16
"""Tiles have multiples of 16 rows and columns."""


@dataclass(frozen=True)
class UpscaleJob:
    """Enlarges a video. The result is ``[frames, height * scale, width * scale, 3]``, float32 in 0..1.

    Executors divide it into tiles, and each tile into jobs of the VAE and the transformer: see
    :mod:`parallel_backend.executor.upscaling`. No group receives it as a whole.
    """

    kind = "upscale"
    model: Model
    pixels: torch.Tensor
    """``[frames, height, width, 3]`` in 0..1."""
    positive: torch.Tensor
    """Text states ``[1, tokens, features]``, of the empty prompt in the training."""
    scale: int = 4
    """1 keeps the size and restores details only."""
    tile: int = 1024
    """Most rows and columns of a tile in the enlarged video; a multiple of 16."""
    overlap: int = 64
    """Rows or columns that neighbouring tiles share and blend, at least."""
    frames: int = 33
    """Most frames of a tile, 8k+1."""
    frame_overlap: int = 8
    """Frames that successive tiles share and blend, at least."""
    tiling: str = "auto"
    """Whether the VAE works in tiles of its own within each tile, as in :class:`parallel_backend.jobs.DecodeJob`."""
    place: int | None = None
    """The number of the only tile to make; the result is then that tile. None for all."""

    def __post_init__(self):
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3 or min(self.pixels.shape) < 1:
            raise RequestError(f"the video is {tuple(self.pixels.shape)}; it must be [frames, height, width, 3]")
        between("scale", self.scale, 1, 8)
        between("tile size", self.tile, 64, 4096)
        if self.tile % EDGE:
            raise RequestError(f"the tile size is {self.tile}; it must be a multiple of 16, such as {self.tile // EDGE * EDGE}")
        between("overlap", self.overlap, 0, self.tile // 2)
        if self.frames < 1 or self.frames % TOGETHER != 1:
            near = max(round((self.frames - 1) / TOGETHER), 0) * TOGETHER + 1
            raise RequestError(f"a tile has {self.frames} frames; it must be 8k+1, such as {near}")
        between("overlap of frames", self.frame_overlap, 0, self.frames // 2)
        choice("tiling", self.tiling, TILINGS)
        check_text("positive", self.positive, (), 1)
