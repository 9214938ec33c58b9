"""Writes frames to video files."""

import logging
import math
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch

from ..errors import RequestError, WriteFailure
from ..system.files import whole_file
from .encoding import Encoding, encode, write
from .pictures import checked_pictures

logger = logging.getLogger(__name__)

FPS = (1, 240)
"""Minimum and maximum frame rate."""


def check_video_name(path: Path) -> None:
    """Raises RequestError unless the name ends in ``.mp4``."""
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"the output is {path.name}; its name must end in .mp4")


def checked_fps(fps: float) -> Fraction:
    """Returns frames per second as a fraction.

    Raises:
        RequestError: if it is not a number in the range :data:`FPS`.
    """
    try:
        value = float(fps)
    except (TypeError, ValueError):
        value = math.nan
    if not FPS[0] <= value <= FPS[1]:
        raise RequestError(f"fps is {fps}; use a number from {FPS[0]} to {FPS[1]}")
    return Fraction(value).limit_denominator(1001)


def save(
    path: Path,
    frames: torch.Tensor,
    *,
    fps: float,
    metadata: dict[str, str] | None = None,
    say: Callable[[str], None] = logger.warning,
    early: Encoding | None = None,
) -> None:
    """Writes frames as H.264 in MP4. The file gets its name only once it is complete.

    Args:
        path: ending in ``.mp4``.
        frames: ``[frames, height, width, 3]`` in 0..1, or anything that :func:`.pictures.checked_pictures` accepts; the last
            row or column is dropped if height or width is odd.
        fps: frames per second.
        metadata: stored in the file; ComfyUI's front end looks for a workflow there.
        say: called with a note if frames are cropped.
        early: encoded before, and used if it was made of the same frames at the same rate.
    Raises:
        RequestError: if the frames or the rate are invalid.
        WriteFailure: if the disk is full, or the folder no longer exists.
    """
    rate, frames = checked_fps(fps), checked_pictures(frames, "images")
    rows, columns = frames.shape[1:3]
    height, width = rows // 2 * 2, columns // 2 * 2
    if not height or not width:
        raise RequestError(f"images are {columns}x{rows}; a video is at least 2x2")
    if (height, width) != (rows, columns):
        say(f"frames of {columns}x{rows} are cropped to {width}x{height}: H.264 needs even sizes")
        frames = frames[:, :height, :width]
    mp4 = (early and early.mp4_of(frames, rate)) or encode(frames, rate).mp4()
    with whole_file(path) as partial:
        write(partial, mp4, metadata or {})


def save_or_rescue(path: Path, frames: torch.Tensor, **settings) -> None:
    """Like :func:`save`. If it fails, saves the video in the system's temporary folder, and the error says where."""
    try:
        save(path, frames, **settings)
    except WriteFailure as error:
        try:
            rescued = Path(tempfile.mkdtemp(prefix="xdit-video-")) / path.name
            save(rescued, frames, **settings)
        except (OSError, WriteFailure):
            raise error from None
        raise WriteFailure(f"{error}; this video is kept as {rescued}") from error


def save_latent(path: Path, latent: torch.Tensor) -> None:
    """Writes ComfyUI's latent file format: ``latent_tensor`` in ComfyUI's layout, unscaled.

    Raises:
        WriteFailure: if the disk is full, or the folder no longer exists.
    """
    from safetensors.torch import save

    with whole_file(path) as partial:
        partial.write_bytes(save({"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([])}))
