"""The node Save Video (MP4)."""

import json
import logging
import re
from datetime import datetime
from functools import partial
from pathlib import Path

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ..parallel_backend.errors import RequestError, WriteFailure, reason_of
from ..parallel_backend.media import video
from ..parallel_backend.media.pictures import checked_pictures
from ..parallel_backend.system.files import check_writable
from .base import CogVideoXNode, schema
from .comfy import early_encoding, runtime
from .comfy.types import CATEGORY

DATE = re.compile("%date:([^%]*)%")
DATE_FIELDS = re.compile("yyyy|yy|MM?|dd?|hh?|mm?|ss?")


def with_dates(name: str, now: datetime) -> str:
    """Fills in ``%date:yyyy-MM-dd%`` in a name. The front end does this only for nodes of the core."""
    values = {"y": now.year, "M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def digits(field: re.Match) -> str:
        return f"{values[field[0][0]]:0{len(field[0])}}"[-4 if field[0] == "yyyy" else -2 :]

    return DATE.sub(lambda date: DATE_FIELDS.sub(digits, date[1]), name)


def place(filename_prefix: str, *, width: int = 0, height: int = 0) -> tuple[Path, str, int, str]:
    """Returns a prefix's folder, name, first free number and subfolder, and checks that a file can be written there.

    Raises:
        RequestError: if the prefix cannot be used or the folder cannot be written to.
        WriteFailure: if the disk is full.
    """
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            with_dates(str(filename_prefix), datetime.now()), folder_paths.get_output_directory(), width, height
        )
    except Exception as error:  # the core raises a plain Exception if a prefix leads out of the folder
        raise RequestError(f"filename_prefix {filename_prefix!r} cannot be used: {reason_of(error)}; use another") from error
    check_writable(numbered(Path(folder), name, counter))
    return Path(folder), name, counter, subfolder


def numbered(folder: Path, name: str, counter: int) -> Path:
    """Returns the path of a numbered file, in the core's format."""
    return folder / f"{name}_{counter:05}_.mp4"


def clips(images: torch.Tensor, videos: int) -> list[torch.Tensor]:
    """Splits images into videos of equal length.

    Args:
        images: ``[frames, height, width, channels]``, or a batch of videos with one more dimension.
        videos: how many videos the images are; for a batch of videos, 1 means all of them.
    Returns:
        The videos, ``[frames, height, width, 3]`` each.
    Raises:
        RequestError: for a number of images that is not a multiple of ``videos``, or images that
            :func:`.pictures.checked_pictures` refuses.
    """
    if isinstance(images, torch.Tensor) and images.ndim == 5 and videos == 1:
        videos = max(1, len(images))
    frames = checked_pictures(images, "images")
    if videos < 1 or len(frames) % videos:
        raise RequestError(
            f"{len(frames)} images cannot be split into {videos} videos of equal length; "
            "set videos to the latent's batch_size, or to 1"
        )
    return list(frames.chunk(int(videos)))


class SaveVideo(CogVideoXNode):
    """Writes frames to MP4 files in the output folder, with the workflow inside, and shows them in the node."""

    own_checks = frozenset({"images"})

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTSaveVideo",
            display_name="Save Video (MP4)",
            aliases="mp4, video combine, h264",
            category=CATEGORY,
            description="Writes H.264 in MP4 to the output folder. Drag the file into ComfyUI to get its workflow back.",
            inputs=[
                io.Image.Input("images"),
                io.Float.Input(
                    "fps",
                    default=8.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second of the file. CogVideoX 1.0 makes 8, 1.5 makes 16. With another value the motion "
                    "is slower or faster.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/CogVideoX",
                    tooltip="Subfolder of the output folder and start of the file name. %date:yyyy-MM-dd% becomes the date.",
                ),
                io.Int.Input(
                    "videos",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="How many videos the images are, one after the other: the latent's batch_size. Each gets its own "
                    "file.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None) -> bool | str:
        """Refuses a place that cannot be written to before the workflow runs."""
        try:
            if isinstance(filename_prefix, str):  # it is None if it comes from another node
                place(filename_prefix)
        except (RequestError, WriteFailure) as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, images, fps: float, filename_prefix: str, videos: int = 1) -> io.NodeOutput:
        """Writes the files and passes them to the node's preview."""
        found = clips(images, videos)
        rows, columns = found[0].shape[1:3]
        folder, name, counter, subfolder = place(filename_prefix, width=columns, height=rows)
        say = partial(runtime.say, node_id=cls.hidden.unique_id, level=logging.WARNING)
        paths = [numbered(folder, name, counter + index) for index in range(len(found))]
        for path, frames, early in zip(paths, found, early_encoding.of(images, len(found))):
            video.save(path, frames, fps=fps, metadata=cls.metadata(), say=say, early=early)
        saved = [{"filename": path.name, "subfolder": subfolder, "type": "output"} for path in paths]
        return io.NodeOutput(ui={"images": saved, "animated": (True,)})

    @classmethod
    def metadata(cls) -> dict[str, str]:
        """Returns the prompt and the workflow, unless ComfyUI runs with ``--disable-metadata``."""
        if getattr(args, "disable_metadata", False):
            return {}
        found = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        return {name: json.dumps(value) for name, value in found.items() if value is not None}
