"""Enlarging a video with a super-resolution model of one step (DOVE, SparkVSR): the formula of a tile, and how tiles make a video.

The formula is that of DOVE's authors (zhengchen1999/DOVE ad649cc, ``inference_script.py``):

- The video is padded to 8k+1 frames with its last frame, enlarged bilinearly, and encoded by the VAE.
- The transformer sees the encoded video, without noise, at timestep 399, with the states of the empty prompt. Its velocity gives the clean
  latent, which is decoded.
- Latent frames that do not fill a token follow copies of the first one.
- SparkVSR has the shape of CogVideoX1.5-5B-I2V (taco-group/SparkVSR 8dbd703, ``sparkvsr_wrapper/infer.py``). Its other 16 channels are
  for frames that another model has enlarged. Without such frames they are zeros.

It differs in three things. The VAE gives the mean of its posterior, not a sample. Sizes that do not fit are padded with the pixels of the
border, where the authors' black ones darken the border. Tiles are blended over what they share, where the authors cut in the middle.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from threading import Lock

import torch
import torch.nn.functional as F
from einops import rearrange

from ...jobs import DecodeJob, EncodeJob, WindowJob
from ...upscale_job import EDGE, TOGETHER, UpscaleJob
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compression import SPATIAL, latent_frames_of
from .conditions import COMFYUI_TO_DIFFUSERS
from .windows import Layout, Window

TIMESTEP = 399
"""The noise level that the models were trained to remove."""
DIFFUSERS_TO_COMFYUI = "batch frames channels height width -> batch channels frames height width"


def rounded_up(size: int, unit: int, first: int = 0) -> int:
    """Returns the smallest number of the form ``first + k * unit`` that is at least ``size``."""
    return first + math.ceil((size - first) / unit) * unit


def windows(size: int, most: int, overlap: int, unit: int, first: int = 0) -> tuple[Window, ...]:
    """Divides frames, rows or columns into windows of one length.

    Args:
        size: to cover; of the form ``first + k * unit``, as ``most`` is.
        most: the largest length.
        overlap: of neighbours, at least.
        unit, first: see :func:`rounded_up`.
    """
    if size <= most:
        return Layout(size, size).at(0)
    count = math.ceil((size - overlap) / (most - overlap))
    length = min(most, rounded_up(math.ceil((size + (count - 1) * overlap) / count), unit, first))
    return Layout(size, length, overlap).at(0)


@dataclass(frozen=True)
class Tile:
    """A part of the enlarged video, with the weight of each of its frames, rows and columns."""

    frames: Window
    rows: Window
    columns: Window

    @property
    def size(self) -> tuple[int, int, int]:
        """Numbers of frames, rows and columns."""
        return tuple(len(window.weights) for window in (self.frames, self.rows, self.columns))

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """Its frames, rows and columns in the enlarged video."""
        return self.frames.frames, self.rows.frames, self.columns.frames

    def pixels(self, video: torch.Tensor, scale: int) -> torch.Tensor:
        """Returns this part of a video ``[frames, height, width, 3]``, enlarged. Beyond the video's end its border goes on."""
        frames, *edges = self.place
        starts = [edge.start // scale - 1 for edge in edges]  # a pixel more at each side, which the enlarged ones depend on
        stops = [-(-edge.stop // scale) + 1 for edge in edges]
        for dim, numbers in enumerate([range(frames.start, frames.stop), *map(range, starts, stops)]):
            video = video.index_select(dim, torch.tensor(numbers).clamp(0, video.shape[dim] - 1))
        size = [scale * (stop - start) for start, stop in zip(starts, stops)]
        large = F.interpolate(video.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", align_corners=False)
        top, left = (edge.start - start * scale for edge, start in zip(edges, starts))
        return large[:, :, top : top + self.size[1], left : left + self.size[2]].permute(0, 2, 3, 1).contiguous()


def tiles_of(job: UpscaleJob) -> list[Tile]:
    """Returns the tiles that a job makes, all of one size; one tile if the job is for that."""
    frames, height, width, _ = job.pixels.shape
    in_time = windows(rounded_up(frames, TOGETHER, 1), job.frames, job.frame_overlap, TOGETHER, 1)
    in_space = [windows(rounded_up(edge * job.scale, EDGE), job.tile, job.overlap, EDGE) for edge in (height, width)]
    found = [Tile(*parts) for parts in product(in_time, *in_space)]
    return found if job.place is None else found[job.place : job.place + 1]


def counted(tiles: int) -> str:
    """Returns a number of tiles in words."""
    return f"{tiles} tiles" if tiles > 1 else "one tile"


def describe(job: UpscaleJob) -> str:
    """Returns one line for the user: what is made, in which tiles."""
    frames, height, width, _ = job.pixels.shape
    tiles = tiles_of(job)
    own_frames, rows, columns = tiles[0].size
    return (
        f"{frames} frames of {width}x{height} to {width * job.scale}x{height * job.scale} in {counted(len(tiles))} of "
        f"{own_frames} frames of {columns}x{rows}"
    )


def taken_for(checkpoint: Checkpoint) -> str:
    """Returns one line for the user: which model's weights these must be."""
    model, base = ("SparkVSR", "CogVideoX1.5-5B-I2V") if checkpoint.takes_image else ("DOVE", "CogVideoX1.5-5B")
    return (
        f"{checkpoint.name} is taken for {model}, whose configuration is that of {base}: nothing in it shows whether the weights were "
        "trained to enlarge videos"
    )


def latent_shape(job: UpscaleJob) -> tuple[int, ...]:
    """Returns the shape of a tile's latent, without padding frames."""
    frames, height, width = tiles_of(job)[0].size
    return 1, 16, latent_frames_of(frames), height // SPATIAL, width // SPATIAL


def blank_parts(job: UpscaleJob, checkpoint: Checkpoint) -> tuple[WindowJob, DecodeJob]:
    """Returns the jobs of a tile that need most memory, with latents that have no data."""
    latent = torch.empty(latent_shape(job), device="meta")
    return forward_job(job, model_input(latent, checkpoint)), DecodeJob(job.model, latent, job.tiling)


def encode_job(job: UpscaleJob, tile: Tile) -> EncodeJob:
    """Returns the job that encodes a tile."""
    return EncodeJob(job.model, tile.pixels(job.pixels, job.scale), job.tiling)


def model_input(latent: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """Returns what the transformer sees of an encoded tile: ``[1, frames, channels, height/8, width/8]`` with padding frames in front."""
    seen = rearrange(latent * checkpoint.scaling_factor, COMFYUI_TO_DIFFUSERS)
    padding = seen[:, :1].repeat(1, checkpoint.padding_frames(seen.shape[1]), 1, 1, 1)
    seen = torch.cat([padding, seen], dim=1)
    return torch.cat([seen, *[torch.zeros_like(seen)] * (checkpoint.in_channels // checkpoint.channels - 1)], dim=2)


def forward_job(job: UpscaleJob, seen: torch.Tensor) -> WindowJob:
    """Returns the job of the forward pass for a :func:`model_input`."""
    return WindowJob(job.model, seen, job.positive, TIMESTEP, 1.0)


def clean_latent(seen: torch.Tensor, velocity: torch.Tensor, frames: int, checkpoint: Checkpoint) -> torch.Tensor:
    """Returns the unscaled latent of the enlarged tile.

    Args:
        seen: the model's input.
        velocity: that the model predicted.
        frames: of the latent, without padding frames.
        checkpoint: of the model.
    """
    alpha = checkpoint.make_scheduler("auto").alphas_cumprod[TIMESTEP]
    clean = alpha**0.5 * seen[:, :, : checkpoint.channels] - (1 - alpha) ** 0.5 * velocity
    return rearrange(clean[:, -frames:], DIFFUSERS_TO_COMFYUI) / checkpoint.scaling_factor


class Mosaic:
    """Puts tiles together as they are finished, in any order and from any thread.

    They are added in their own order, so that rounding does not depend on which was finished first.

    Args:
        job: of all tiles.
    """

    def __init__(self, job: UpscaleJob):
        frames, height, width, _ = job.pixels.shape
        self.video = torch.zeros(frames, height * job.scale, width * job.scale, 3)
        self._tiles = iter(enumerate(tiles_of(job)))
        self._finished: dict[int, torch.Tensor] = {}
        self._next = next(self._tiles)
        self._lock = Lock()

    @torch.inference_mode()
    def add(self, number: int, pixels: torch.Tensor) -> None:
        """Adds a tile ``[frames, height, width, 3]``."""
        with self._lock:
            self._finished[number] = pixels
            for tile, part in self._in_order():
                self._blend(tile, part)

    def _in_order(self) -> Iterator[tuple[Tile, torch.Tensor]]:
        while self._next and self._next[0] in self._finished:
            number, tile = self._next
            self._next = next(self._tiles, None)
            yield tile, self._finished.pop(number)

    def _blend(self, tile: Tile, pixels: torch.Tensor) -> None:
        own = self.video[tile.place]  # less at the ends, which were padded
        pixels = pixels[: own.shape[0], : own.shape[1], : own.shape[2]]
        for dim, window in enumerate((tile.frames, tile.rows, tile.columns)):
            if any(weight != 1 for weight in window.weights):
                weights = pixels.new_tensor(window.weights[: own.shape[dim]])
                pixels = pixels * weights.view([-1 if axis == dim else 1 for axis in range(4)])
        own += pixels
