"""Reads image and video files as a viewer or a player shows them."""

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, repeat
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ..errors import RequestError, reason_of

logger = logging.getLogger(__name__)

SURVEYED = 4096
"""Number of frames whose timestamps determine a video's frame rate."""
MOST_FPS = 120
"""Maximum rate at which a video with a variable frame rate is read."""
BT709, FCC, BT601, BT2020 = 1, 4, 5, 9
"""FFmpeg's numbers of YUV matrices."""
MATRICES = {BT709: BT709, FCC: FCC, BT601: BT601, 6: BT601, 7: 7, BT2020: BT2020, 10: BT2020}
"""The matrix to convert with, by the one that a file declares. If it declares none, it is guessed, as by players."""
FULL_RANGE = 2
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions by FFmpeg's numbers."""


def pictures(path: str | Path, kind: str) -> Iterator[torch.Tensor]:
    """Yields the images of an ``image`` or ``video`` file, ``[1, height, width, 3]`` in 0..1.

    Raises:
        RequestError: if the file does not exist or contains none.
    """
    path, found = existing(path, kind), 0
    with readable(path, kind):
        for picture, alpha in stills(path) if kind == "image" else ((frame, None) for frame in frames(path)):
            if alpha is not None and alpha.min() < 1 and not found:
                logger.warning("%s is partly transparent: the colours stored there are used", path)
            found += 1
            yield picture[None]
    if not found:
        raise RequestError(f"{path} holds no {kind}; give another file")


def images_and_masks(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads an image file as ComfyUI's Load Image does.

    Returns:
        Images ``[count, height, width, 3]`` in 0..1, and masks ``[count, height, width]``, 1 where transparent.
    Raises:
        RequestError: if the file does not exist or contains no image.
    """
    path = existing(path, "image")
    with readable(path, "image"):
        found = list(stills(path))
    masks = [torch.zeros(pixels.shape[:2]) if alpha is None else 1 - alpha for pixels, alpha in found]
    return torch.stack([pixels for pixels, _ in found]), torch.stack(masks)


def frames_per_second(path: str | Path) -> float:
    """Returns the rate at which :func:`pictures` yields a video's frames.

    Raises:
        RequestError: if the file does not exist or contains no video.
    """
    path = existing(path, "video")
    with readable(path, "video"):
        return float(Pace.of(path).fps)


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Within the context, PIL's and PyAV's errors for unreadable files are raised as RequestErrors."""
    import av
    from PIL import Image

    try:
        yield
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, av.FFmpegError, Image.DecompressionBombError) as error:
        formats = "a JPEG, PNG or WebP file" if kind == "image" else "another file, such as an MP4"
        raise RequestError(f"{path} cannot be read as {kind}: {why_unreadable(error)}; give {formats}") from error


def why_unreadable(error: Exception) -> str:
    """Returns why a file cannot be read. What PIL and FFmpeg say of its contents has names of their own."""
    import av
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError):
        return "it has too many pixels"
    if isinstance(error, (av.InvalidDataError, SyntaxError, EOFError)) or (isinstance(error, OSError) and not error.errno):
        return "it is damaged, or of another kind"
    return reason_of(error)


def existing(path: str | Path, kind: str) -> Path:
    """Returns the path of an existing file; raises RequestError if there is none."""
    path = Path(path).expanduser()
    if not os.path.isfile(path):  # unlike Path.is_file, does not raise for a name that is too long
        raise RequestError(f"there is no {kind} file {path}; give one")
    return path


def stills(path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yields the images of an image file, usually one unless it is animated, and their alpha, if any.

    They are rotated as EXIF says, and colours are converted to sRGB. 16 bits keep their precision. Transparent pixels keep
    their colours, as in ComfyUI.
    """
    from PIL import Image, ImageOps, ImageSequence

    with Image.open(path) as file:
        size = None
        for page in ImageSequence.Iterator(file):
            page = ImageOps.exif_transpose(page)
            size = size or page.size
            if page.size == size:  # others are thumbnails or other pages
                yield pixels_of(page, path)
            if file.format == "MPO":  # in phones' files a depth or brightness map follows
                return


def pixels_of(page, path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Converts a PIL image to ``[height, width, 3]`` in 0..1, and its alpha to ``[height, width]`` or None."""
    if page.mode[0] in "IF":
        grey = np.asarray(page, np.float32) / (65535 if page.mode[0] == "I" else 1)
        if not (0 <= grey.min() and grey.max() <= 1):
            raise ValueError(f"its values run from {grey.min():g} to {grey.max():g} of what is white")
        return torch.from_numpy(grey)[..., None].repeat(1, 1, 3), None
    if "transparency" in page.info:
        page = page.convert("RGBA")
    alpha = torch.from_numpy(np.array(page.getchannel("A"))).float() / 255 if "A" in page.getbands() else None
    page = in_srgb(page, path)
    return torch.from_numpy(np.array(page.convert("RGB"))).float() / 255, alpha


def in_srgb(page, path: Path):
    """Applies the colour profile of a PIL image; returns it unchanged if it has none, or an invalid one."""
    from PIL import ImageCms

    profile = page.info.get("icc_profile")
    if not profile or page.mode not in ("L", "RGB", "CMYK"):
        return page
    try:
        return ImageCms.profileToProfile(page, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("%s: its colour profile is not used: %s", path, reason_of(error))
        return page


def opened(path: Path):
    """Opens a video file with PyAV and returns it with its video stream.

    Raises:
        RequestError: if it has none.
    """
    import av
    from av.stream import Disposition

    file = av.open(path)
    for stream in file.streams.video:
        if Disposition.attached_pic not in stream.disposition:  # the cover of an audio file
            stream.thread_type = "AUTO"
            return file, stream
    sound = "sound and no video" if file.streams.audio else "no video"
    file.close()
    raise RequestError(f"{path} holds {sound}; give a video file")


@dataclass(frozen=True)
class Pace:
    """The timing of a video."""

    fps: Fraction
    constant: bool
    start: Fraction | None = None
    """When the first frame is shown, in seconds."""
    end: Fraction | None = None
    """When the last frame ends, in seconds; None if it was not determined."""

    @classmethod
    def of(cls, path: Path) -> "Pace":
        """Determines the rate from the frames' timestamps.

        If they are uneven, it is the rate of most frames, so that few are dropped.
        """
        file, stream = opened(path)
        with file:
            packets = [packet for packet in islice(file.demux(stream), SURVEYED) if packet.size and not packet.is_discard]
            said = stream.average_rate or stream.guessed_rate or Fraction(8)
            if len(packets) < 2 or any(packet.pts is None for packet in packets):
                return cls(said, constant=True)
            packets.sort(key=lambda packet: packet.pts)
            times = [packet.pts * packet.time_base for packet in packets]
            last = packets[-1].duration * packets[-1].time_base if packets[-1].duration else 0
        start = times[0]
        mean = (len(times) - 1) / (times[-1] - start) if times[-1] > start else said
        if all(round((time - start) * mean) == place for place, time in enumerate(times)):
            return cls(said if abs(said / mean - 1) < 0.02 else mean, constant=True)
        steps = [after - before for before, after in zip(times, times[1:]) if after > before]
        fps = min(1 / median(steps), Fraction(MOST_FPS))
        return cls(fps, False, start, times[-1] + (last or 1 / fps) if len(packets) < SURVEYED else None)


def frames(path: Path) -> Iterator[torch.Tensor]:
    """Yields the frames of a video, ``[height, width, 3]`` in 0..1, at the constant rate of :func:`frames_per_second`."""
    pace = Pace.of(path)
    file, stream = opened(path)
    with file:
        note = HDR.get(stream.codec_context.color_trc)
        if note:
            logger.warning("%s is HDR (%s) and read without tone mapping: convert it to SDR if it looks pale", path, note)
        show = shower(stream)
        if pace.constant:
            yield from map(show, file.decode(stream))
            return
        logger.warning("%s has a variable frame rate: it is read at a constant %.4g frames per second", path, pace.fps)
        yield from even(((frame.pts * frame.time_base, show(frame)) for frame in file.decode(stream)), pace)


def even(timed: Iterator[tuple[Fraction, torch.Tensor]], pace: Pace) -> Iterator[torch.Tensor]:
    """Repeats and drops frames with timestamps, to yield them at a constant rate.

    Args:
        timed: time in seconds at which each frame is shown, and the frame.
        pace: of the video.
    """
    shown, place = None, 0
    for time, frame in timed:
        due = round((time - pace.start) * pace.fps)
        if shown is not None:
            yield from repeat(shown, due - place)
            place = max(place, due)
        shown = frame
    if shown is not None:
        end = place + 1 if pace.end is None else round((pace.end - pace.start) * pace.fps)
        yield from repeat(shown, max(1, end - place))


def shower(stream) -> Callable[..., torch.Tensor]:
    """Returns a function that converts a frame to ``[height, width, 3]`` in 0..1.

    The result is upright, with square pixels, at the first frame's size.
    """
    ratio, size = stream.sample_aspect_ratio or 1, []

    def show(frame) -> torch.Tensor:
        size[:] = size or (max(1, round(frame.width * ratio)), frame.height)
        guessed = BT709 if frame.width >= 1280 or frame.height > 576 else BT601
        picture = frame.reformat(
            *size,
            format="rgb24",
            src_colorspace=MATRICES.get(int(frame.colorspace), guessed),
            src_color_range=int(frame.color_range),
            dst_colorspace=FCC,  # no effect on RGB, but up to PyAV 17 the source's matrix is ignored unless it differs
            dst_color_range=FULL_RANGE,
        )
        return torch.from_numpy(turned(picture.to_ndarray(), frame)).float() / 255

    return show


def turned(pixels: np.ndarray, frame) -> np.ndarray:
    """Rotates or flips pixels by the frame's display matrix: x' = ax + cy, y' = bx + dy."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
