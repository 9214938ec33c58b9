"""Save Video."""

import json
import re
from datetime import datetime
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..parallel_backend import video
from .base import CogVideoXNode
from .sockets import CATEGORY

DATE = re.compile("%date:([^%]*)%")
DATE_FIELDS = re.compile("yyyy|yy|MM?|dd?|hh?|mm?|ss?")


def with_dates(name: str, now: datetime) -> str:
    """A name with its ``%date:yyyy-MM-dd%`` filled in, which the front end does for nodes of the core alone."""
    values = {"y": now.year, "M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def digits(field: re.Match) -> str:
        return f"{values[field[0][0]]:0{len(field[0])}}"[-4 if field[0] == "yyyy" else -2 :]

    return DATE.sub(lambda date: DATE_FIELDS.sub(digits, date[1]), name)


class SaveVideo(CogVideoXNode):
    """Frames to an MP4 in the output folder, shown in the node, with the workflow inside it."""

    own_checks = frozenset({"images"})

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI's V3 nodes."""
        return io.Schema(
            node_id="XDiTSaveVideo",
            display_name="Save Video (MP4)",
            category=CATEGORY,
            description="Writes H.264 in MP4. Drag the file into ComfyUI to get its workflow back.",
            inputs=[
                io.Image.Input("images"),
                io.Float.Input(
                    "fps", default=8.0, min=1.0, max=120.0, step=1.0, tooltip="CogVideoX 1.0 makes 8, 1.5 makes 16."
                ),
                io.String.Input("filename_prefix", default="video/CogVideoX"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, fps: float, filename_prefix: str) -> io.NodeOutput:
        """Writes the file and hands it to the node's preview."""
        height, width = images.shape[1:3]
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            with_dates(filename_prefix, datetime.now()), folder_paths.get_output_directory(), width, height
        )
        path = Path(folder) / f"{name}_{counter:05}_.mp4"
        video.check_writable(path)
        video.save(path, images, fps=fps, metadata=cls.metadata())
        saved = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return io.NodeOutput(ui={"images": [saved], "animated": (True,)})

    @classmethod
    def metadata(cls) -> dict[str, str]:
        """The prompt and the workflow, unless ComfyUI was told to leave them out."""
        if getattr(args, "disable_metadata", False):
            return {}
        found = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        return {name: json.dumps(value) for name, value in found.items() if value is not None}
