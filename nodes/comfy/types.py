"""The pack's own sockets and their values."""

from dataclasses import dataclass

from comfy_api.latest import io

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.checkpoint.controlnet import ControlNetFile
from ...parallel_backend.jobs import SampleJob
from ...parallel_backend.model import Model, Windows

CATEGORY = "CogVideoX xDiT"
BACKEND = "The devices that share the work. Without it the work is done in ComfyUI's own process."
"""The tooltip of every backend input."""

ModelSocket = io.Custom("COGVIDEOX_XDIT_MODEL")
BackendSocket = io.Custom("XDIT_BACKEND")
ControlNetSocket = io.Custom("COGVIDEOX_XDIT_CONTROLNET")


@dataclass(frozen=True)
class ModelHandle:
    """The value of a model socket."""

    model: Model
    checkpoint: Checkpoint
    windows: Windows | None = None
    """How the sampler splits a long video; None samples all frames at once."""


@dataclass(frozen=True)
class BackendHandle:
    """The value of a backend socket: the user's devices and plan strings."""

    devices: str
    plan: str
    pipefusion_warmup: int = SampleJob.pipefusion_warmup


@dataclass(frozen=True)
class ControlNetHandle:
    """The value of a ControlNet socket."""

    file: ControlNetFile
