"""The image and the video that a person starts from, read and brought to the size of the video to make."""

from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from .cogvideox.checkpoint import TEMPORAL, Checkpoint
from .cogvideox.image import cover
from .errors import RequestError
from .jobs import check_size

READERS = {"image": {"plugin": "pillow", "mode": "RGB", "rotate": True}, "video": {"plugin": "pyav"}}


def pictures(path: str, kind: str) -> Iterator[torch.Tensor]:
    """The pictures of an ``image`` or ``video`` file, one by one, ``[1, height, width, 3]`` in 0..1.

    Raises:
        RequestError: when there is no such file, or it holds none.
    """
    import imageio.v3 as iio

    path = Path(path).expanduser()
    if not path.is_file():
        raise RequestError(f"there is no {kind} file {path}; give one")
    found = 0
    try:
        for picture in iio.imiter(path, **READERS[kind]):
            found += 1
            yield torch.from_numpy(picture)[None].float() / 255
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as {kind}: {error}; give another file") from error
    if not found:
        raise RequestError(f"{path} holds no {kind}; give another file")


def read(args: Namespace, size: dict[str, int], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The pixels of the files that were given, by the field of a SampleJob that they are encoded for.

    Args:
        args: with ``image``, ``video`` and ``frames``.
        size: width and height of the video to make, and the most frames.
        checkpoint: that they are for.
    Raises:
        RequestError: for a size no CogVideoX makes, a file that cannot be read, or too short a video.
    """
    check_size(**size)
    edges = {"width": size["width"], "height": size["height"]}
    found = {}
    if args.image is not None:
        found["image"] = cover(next(pictures(args.image, "image")), **edges)
    if args.video is not None:
        video = torch.cat([cover(picture, **edges) for picture in islice(pictures(args.video, "video"), size["frames"])])
        frames = args.frames or whole_frames(len(video), checkpoint)
        if frames > len(video):
            raise RequestError(f"{args.video} has {len(video)} frames and {frames} were asked for; use fewer or a longer video")
        found["latent"] = video[:frames]
    return found


def frames_per_second(path: str) -> float:
    """How fast a video file that was read plays."""
    import imageio.v3 as iio

    return float(iio.immeta(Path(path).expanduser(), plugin="pyav")["fps"])


def whole_frames(frames: int, checkpoint: Checkpoint) -> int:
    """The most frames, 4k+1, that a video of so many gives without padding."""
    latent = (frames - 1) // TEMPORAL + 1
    together = checkpoint.patch_size_t or 1
    return (max(latent // together * together, 1) - 1) * TEMPORAL + 1
