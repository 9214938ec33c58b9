"""Reads the user's images, videos and masks and resizes them to the video to make."""

import logging
import mimetypes
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.controlnet import open_all
from ..cogvideox.checkpoint.facts import whole_frames
from ..cogvideox.pipeline.conditions import between_images, fit_mask, to_show
from ..cogvideox.pipeline.image import cover
from ..cogvideox.pipeline.validation import check_end_image
from ..cogvideox.transformer.controlnet import encode
from ..errors import RequestError
from ..media.frame_rate import FrameRate
from ..media.reading import frames_per_second, pictures
from ..media.video import checked_fps
from ..model import ControlNet
from ..validation import between, check_size

logger = logging.getLogger(__name__)


def read(args: Namespace, size: dict[str, int], checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads the user's files, for the fields of a SampleJob.

    Args:
        args: with ``image``, ``end_image``, ``control_video``, ``controlnet``, ``video``, ``mask``, ``denoise`` and ``frames``.
        size: width, height and most frames of the video to make. ``frames`` is set to those of a video that is given.
        checkpoint: the model that they are for.
    Returns:
        Pixels ``[frames, height, width, 3]`` to encode, by field, and the fields that need no encoding.
    Raises:
        RequestError: for a size that no CogVideoX makes, a file that cannot be read, a video that is too short, or files that
            exclude each other.
    """
    check_size(**size)
    if args.mask is not None and args.video is None:
        raise RequestError("a mask says which part of a video is replaced, and there is no video; give --video too")
    if args.end_image is not None:
        check_end_image(checkpoint, has_start=args.image is not None)
    edges = {"width": size["width"], "height": size["height"]}
    pixels = read_videos(args, size, checkpoint)
    if pixels:
        size["frames"] = len(next(iter(pixels.values())))
    ready = read_controlnet(args, checkpoint, pixels.pop("controlnet", None))
    frames = size["frames"]
    start, end = (
        None if path is None else cover(next(pictures(path, "image")), **edges) for path in (args.image, args.end_image)
    )
    if args.mask is not None:
        if start is not None or end is not None:
            raise RequestError("an image and a mask both say what is kept of the video; give one of them")
        step = rate_of(args.video, args, checkpoint).step
        mask = read_mask(args.mask, frames, step)
        mask = fit_mask(1 - mask if args.invert_mask else mask, frames=frames, **edges)
        video = pixels["latent"] if args.denoise is not None and args.denoise < 1 else pixels.pop("latent")
    elif checkpoint.task == "inpaint" and (start is not None or end is not None):
        video, mask = between_images(start, end, frames=frames)
    else:
        return pixels | {name: image for name, image in (("image", start), ("end_image", end)) if image is not None}, ready
    noise = checkpoint.reference_noise if args.noise_aug_strength is None else args.noise_aug_strength
    between("noise-aug-strength", noise, 0.0, 1.0)
    shown, masks = to_show(video, mask, noise=noise, removes=checkpoint.removes)
    return pixels | shown, ready | masks


def read_controlnet(args: Namespace, checkpoint: Checkpoint, video: torch.Tensor | None) -> dict[str, Any]:
    """Returns the ControlNet and its encoded control video, for the fields of a SampleJob; empty if none is given.

    Args:
        args: with ``controlnet`` and its settings.
        checkpoint: the model.
        video: ``[frames, height, width, 3]`` in 0..1; None if none is given.
    Raises:
        RequestError: if one of both is missing, or the ControlNet does not fit the model.
    """
    if (args.controlnet is None) != (video is None):
        raise RequestError("--controlnet and --controlnet-video go together; give both")
    if args.controlnet is None:
        return {}
    path = Path(args.controlnet).expanduser().absolute()
    net = ControlNet(str(path), args.controlnet_strength, args.controlnet_start, args.controlnet_end)
    (file,) = open_all([net], checkpoint)
    logger.info(file.describe)
    return {"controlnets": (net,), "controlnet_videos": encode(file, video)}


def read_videos(args: Namespace, size: dict[str, int], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Reads the videos that are given, cut to one length: ``--frames``, or as many as all have and the model takes."""
    edges = {"width": size["width"], "height": size["height"]}
    given = {"latent": args.video, "control": args.control_video, "controlnet": args.controlnet_video}
    paths = {field: path for field, path in given.items() if path is not None}
    videos = {}
    for field, path in paths.items():
        rate = rate_of(path, args, checkpoint)
        logger.info("%s: %s", path, rate.describe(checkpoint.default_fps))
        used = islice(pictures(path, "video"), 0, size["frames"] * rate.step, rate.step)
        videos[field] = torch.cat([cover(picture, **edges) for picture in used])
    if not videos:
        return {}
    frames = args.frames or whole_frames(min(map(len, videos.values())), checkpoint.patch_size_t or 1)
    for field, video in videos.items():
        if frames > len(video):
            raise RequestError(
                f"{paths[field]} has {len(video)} frames at the model's rate, and --frames is {frames}; use fewer frames or a "
                "longer video, or every frame of it with --source-fps 0"
            )
    return {field: video[:frames] for field, video in videos.items()}


def rate_of(path: str, args: Namespace, checkpoint: Checkpoint) -> FrameRate:
    """Returns which frames of a video are used: those nearest to the model's own rate, or all if ``--source-fps`` is 0."""
    if args.source_fps == 0:
        return FrameRate(frames_per_second(path))
    source = frames_per_second(path) if args.source_fps is None else float(checked_fps(args.source_fps))
    return FrameRate.nearest(source, checkpoint.default_fps)


def read_mask(path: str, frames: int, step: int) -> torch.Tensor:
    """Reads a mask ``[1 or frames, rows, columns]`` in 0..1 from an image or a video. 1, white, is replaced.

    Args:
        path: of the file.
        frames: of the video that it is for.
        step: every how many frames of a video one is used; an image's are all used.
    """
    guessed = mimetypes.guess_type(path)[0] or ""
    kind, step = ("video", step) if guessed.startswith("video/") else ("image", 1)
    return torch.cat([picture.mean(dim=-1) for picture in islice(pictures(path, kind), 0, frames * step, step)])
