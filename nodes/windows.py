"""CogVideoX Context Windows."""

from dataclasses import replace

from comfy_api.latest import io

from ..parallel_backend.model import WINDOW_SCHEDULES, Windows
from .base import CogVideoXNode
from .comfy.types import CATEGORY, ModelSocket


class CogVideoXContextWindows(CogVideoXNode):
    """A model that samples long videos in overlapping windows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTCogVideoXContextWindows",
            display_name="CogVideoX Context Windows",
            category=CATEGORY,
            description="For videos longer than the model was trained for: every step runs the model on overlapping windows of "
            "frames and blends what it says. Goes between Load CogVideoX and the sampler.",
            inputs=[
                ModelSocket.Input("model"),
                io.Int.Input(
                    "window",
                    default=Windows.frames,
                    min=5,
                    max=1025,
                    step=4,
                    tooltip="Frames of one window, 4k+1: what the model was trained for, 49 for CogVideoX 1.0, 81 for 1.5.",
                ),
                io.Int.Input(
                    "overlap",
                    default=Windows.overlap,
                    min=0,
                    max=1024,
                    step=4,
                    tooltip="Frames by which neighbours overlap and are blended: two thirds of a window are a good start. "
                    "Less is faster, and things may jump from one window to the next.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(WINDOW_SCHEDULES),
                    default=Windows.schedule,
                    tooltip="static: the windows stay where they are. uniform: they are shifted from step to step.",
                ),
                io.Boolean.Input(
                    "shuffle_noise",
                    default=Windows.shuffle_noise,
                    tooltip="Later windows start from the first one's noise in another order (FreeNoise), not from their own.",
                ),
            ],
            outputs=[ModelSocket.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, window: int, overlap: int, schedule: str, shuffle_noise: bool) -> io.NodeOutput:
        """Notes the windows beside the model."""
        return io.NodeOutput(replace(model, windows=Windows(window, overlap, schedule, shuffle_noise)))
