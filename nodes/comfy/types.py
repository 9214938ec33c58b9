"""The pack's own sockets and what they carry."""

from dataclasses import dataclass

from comfy_api.latest import io

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.jobs import SampleJob
from ...parallel_backend.model import Model, Windows

CATEGORY = "CogVideoX xDiT"

ModelSocket = io.Custom("COGVIDEOX_XDIT_MODEL")
BackendSocket = io.Custom("XDIT_BACKEND")


@dataclass(frozen=True)
class ModelHandle:
    """What a model socket carries."""

    model: Model
    checkpoint: Checkpoint
    windows: Windows | None = None
    """How the sampler cuts a long video; None where it does not."""


@dataclass(frozen=True)
class BackendHandle:
    """What a backend socket carries: the user's devices and plan strings."""

    devices: str
    plan: str
    pipefusion_warmup: int = SampleJob.pipefusion_warmup
