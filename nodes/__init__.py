"""The pack's nodes. They are thin: inputs become a job, and :mod:`.comfy.runtime` runs it."""

from comfy_api.latest import ComfyExtension, io

from ..parallel_backend.config import CONFIG
from ..parallel_backend.plan import AUTO
from .apply_controlnet import ApplyCogVideoXControlNet
from .backend import XDiTBackend
from .comfy import errors, examples, routes, runtime, submission
from .conditioning import EmptyCogVideoXLatent
from .control_to_video import CogVideoXControlToVideo
from .controlnet import LoadCogVideoXControlNet
from .decoding import CogVideoXDecode
from .image_to_video import CogVideoXImageToVideo
from .inpainting import CogVideoXInpaint
from .loaders import LoadCogVideoX
from .lora import LoadCogVideoXLora
from .sampling import CogVideoXSampler
from .saving import SaveVideo
from .upscale import CogVideoXUpscale
from .video_to_video import CogVideoXVideoToVideo
from .windows import CogVideoXContextWindows

NODES: list[type[io.ComfyNode]] = [
    LoadCogVideoX,
    LoadCogVideoXLora,
    EmptyCogVideoXLatent,
    CogVideoXImageToVideo,
    CogVideoXContextWindows,
    CogVideoXVideoToVideo,
    CogVideoXControlToVideo,
    CogVideoXInpaint,
    LoadCogVideoXControlNet,
    ApplyCogVideoXControlNet,
    CogVideoXSampler,
    CogVideoXDecode,
    CogVideoXUpscale,
    SaveVideo,
    XDiTBackend,
]


class CogVideoXExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Returns the pack's nodes in the order of the menu, and adds the pack's routes to ComfyUI's server."""
        errors.name_plainly()
        submission.watch()
        examples.offer()
        routes.register()  # not in on_load, which ComfyUI 0.3.64 does not call
        if CONFIG.preload:
            runtime.warm_up(AUTO, AUTO)
        return NODES
