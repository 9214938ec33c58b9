"""Frames to a video file, with imageio."""

import logging
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .errors import RequestError

logger = logging.getLogger(__name__)


def check_writable(path: Path) -> None:
    """Checks, before any work is done, that a file can be made there.

    Raises:
        RequestError: when its folder is missing or closed, or the name is a folder's.
    """
    folder = path.parent
    if not folder.is_dir():
        raise RequestError(f"cannot write {path}: there is no folder {folder}; make it first")
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder; give a file name")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise RequestError(f"cannot write {path}: no permission; choose another place")


def check_video_name(path: Path) -> None:
    """Raises RequestError unless the name ends in ``.mp4``."""
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"the output is {path.name}; its name must end in .mp4")


def save(path: Path, frames: torch.Tensor, *, fps: float, metadata: dict[str, str] | None = None) -> None:
    """Writes H.264 in MP4. The file appears under its name only once it is whole.

    Args:
        path: ending in ``.mp4``.
        frames: ``[frames, height, width, 3]`` in 0..1; an odd height or width loses its last row or column.
        fps: frames per second.
        metadata: kept in the file under its own names, where ComfyUI's front end looks for a workflow.
    Raises:
        RequestError: when the disk is full, or the folder has gone.
    """
    import imageio.v3 as iio

    height, width = (edge // 2 * 2 for edge in frames.shape[1:3])
    if (height, width) != tuple(frames.shape[1:3]):
        logger.warning("frames of %dx%d are cropped to %dx%d: H.264 needs even sizes", *frames.shape[1:3], height, width)
        frames = frames[:, :height, :width]
    with whole_file(path) as partial:
        with iio.imopen(partial, "w", plugin="pyav", options={"movflags": "use_metadata_tags+faststart"}) as file:
            file.container_metadata.update(metadata or {})
            file.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
            for frame in frames:
                file.write_frame((frame * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy())


@contextmanager
def whole_file(path: Path):
    """A name to write to; what is there at the end appears as ``path``, or nothing does.

    Raises:
        RequestError: naming what the system says, when the disk is full or the folder has gone.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise RequestError(
            f"cannot write {path}: {error.strerror}; make room or choose another place, and run it again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def save_or_rescue(path: Path, frames: torch.Tensor, **settings) -> None:
    """As :func:`save`; where that fails, the video goes to the system's folder for temporary files, and the error says so."""
    try:
        save(path, frames, **settings)
    except RequestError as error:
        rescued = Path(tempfile.mkdtemp(prefix="xdit-video-")) / path.name
        save(rescued, frames, **settings)
        raise RequestError(f"{error}; this video is kept as {rescued}") from error


def save_latent(path: Path, latent: torch.Tensor) -> None:
    """Writes ComfyUI's own latent file: ``latent_tensor`` in the core's layout, unscaled.

    Raises:
        RequestError: when the disk is full, or the folder has gone.
    """
    from safetensors.torch import save

    with whole_file(path) as partial:
        partial.write_bytes(save({"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([])}))
