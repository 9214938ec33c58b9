"""The node CogVideoX Context Windows."""

from dataclasses import replace

from comfy_api.latest import io

from ..parallel_backend.model import RIFLEXES, WINDOW_SCHEDULES, Windows
from .base import CogVideoXNode, schema
from .comfy.types import CATEGORY, ModelSocket


class CogVideoXContextWindows(CogVideoXNode):
    """Makes a model sample long videos in overlapping windows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXContextWindows",
            display_name="CogVideoX Context Windows",
            aliases="long video, context options, context window, sliding window, freenoise",
            category=CATEGORY,
            description="For videos longer than the model was trained for: every step runs the model on overlapping windows "
            "of frames and blends the results. A step takes as many times longer as there are windows, and needs the memory "
            "of one window. From a start image, windows come one after the other. Connect it between Load CogVideoX and the sampler.",
            inputs=[
                ModelSocket.Input("model"),
                io.Int.Input(
                    "window",
                    display_name="context_length",
                    default=Windows.frames,
                    min=5,
                    max=1025,
                    step=4,
                    tooltip="Frames of one window, 4k+1. The model's training length works best: 49 for CogVideoX 1.0, 81 "
                    "for 1.5. Longer windows need more memory.",
                ),
                io.Int.Input(
                    "overlap",
                    display_name="context_overlap",
                    default=Windows.overlap,
                    min=0,
                    max=1024,
                    step=4,
                    tooltip="Frames that neighbouring windows share and blend. Start with two thirds of a window. Less is "
                    "faster, but things may jump from one window to the next.",
                ),
                io.Combo.Input(
                    "schedule",
                    display_name="context_schedule",
                    options=list(WINDOW_SCHEDULES),
                    default=Windows.schedule,
                    tooltip="static: windows stay in place. uniform: windows shift from step to step, so that no seam stays "
                    "in one place.",
                ),
                io.Boolean.Input(
                    "shuffle_noise",
                    display_name="freenoise",
                    default=Windows.shuffle_noise,
                    tooltip="Later windows start from the noise of the first one in another order (FreeNoise), so that they "
                    "show similar things. If off, every frame has its own noise.",
                ),
                io.Combo.Input(
                    "riflex",
                    options=list(RIFLEXES),
                    default=Windows.riflex,
                    optional=True,
                    tooltip="on: stretches CogVideoX-5b to windows of twice its training length (RIFLEx): set window to 97. finetuned: for the "
                    "weights that RIFLEx's authors trained for it.",
                ),
            ],
            outputs=[ModelSocket.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls, model, window: int, overlap: int, schedule: str, shuffle_noise: bool, riflex: str = Windows.riflex
    ) -> io.NodeOutput:
        """Adds the windows to the model."""
        return io.NodeOutput(replace(model, windows=Windows(window, overlap, schedule, shuffle_noise, riflex)))
