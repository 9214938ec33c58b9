"""Which model a job runs, and how: its files, precision, offload and LoRAs."""

from dataclasses import dataclass

import torch

from .errors import RequestError
from .validation import between, choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8S = ("off", "linears", "all")
COMPILES = ("auto", "on", "off")
OFFLOADS = ("auto", "none", "model", "group", "sequential")
WINDOW_SCHEDULES = ("static", "uniform")
MAX_STRENGTH = 10.0


@dataclass(frozen=True)
class Lora:
    """A change of the transformer's weights."""

    path: str
    """A ``.safetensors`` file; see :mod:`parallel_backend.cogvideox.transformer.lora`."""
    strength: float = 1.0
    """What the change is multiplied by; 0 leaves the model as it is."""

    def __post_init__(self):
        between("LoRA strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)


@dataclass(frozen=True)
class Model:
    """What to compute. Holds no weights: they are loaded where they run."""

    path: str
    """Checkpoint folder in diffusers layout, or a transformer's ``.safetensors`` file."""
    dtype: str = "auto"
    """``auto`` is the checkpoint's own on a GPU and fp32 on the CPU."""
    offload: str = "auto"
    """Where weights wait between uses; ``auto`` decides by free memory."""
    compile: str = "auto"
    """Whether blocks and the VAE have kernels that are compiled for the device; ``auto`` on a GPU, for all but small models and pictures."""
    fp8: str = "off"
    """What runs in FP8: nothing, the blocks' linear layers, or these and attention."""
    step_cache: float = 0.0
    """Change of the first block's work below which the other blocks are predicted from earlier steps; 0 never. See
    :class:`parallel_backend.cogvideox.transformer.step_cache.StepCache`."""
    loras: tuple[Lora, ...] = ()
    """All are added to the weights; their order changes nothing but rounding."""

    def __post_init__(self):
        choice("dtype", self.dtype, ("auto", *DTYPES))
        choice("offload", self.offload, OFFLOADS)
        choice("compile", self.compile, COMPILES)
        choice("fp8", self.fp8, FP8S)
        between("step_cache", self.step_cache, 0, 2)


def two_thirds(frames: int) -> int:
    """The overlap that suits a window of so many frames, a multiple of 4: with half, the demo's pictures jump at times."""
    return round((frames - 1) / 6) * 4


@dataclass(frozen=True)
class Windows:
    """How a long video is sampled in parts. Lengths are frames of the video; the model rounds them up to whole tokens."""

    frames: int = 49
    """Of one window, 4k+1: what the model was trained for. A video that is no longer has no windows."""
    overlap: int = two_thirds(49)
    """By which neighbours overlap at least and are blended; a multiple of 4."""
    schedule: str = "static"
    """``static`` windows stay where they are; ``uniform`` ones are shifted from step to step."""
    shuffle_noise: bool = True
    """Whether later windows start from the first one's noise in another order, not from noise of their own."""

    def __post_init__(self):
        if self.frames < 5 or self.frames % 4 != 1:
            raise RequestError(
                f"the window is {self.frames} frames; it must be 4k+1, such as {max(5, round((self.frames - 1) / 4) * 4 + 1)}"
            )
        if self.overlap < 0 or self.overlap % 4:
            raise RequestError(
                f"the windows' overlap is {self.overlap} frames; it must be a multiple of 4, "
                f"such as {max(0, round(self.overlap / 4) * 4)}"
            )
        if self.overlap >= self.frames:
            raise RequestError(
                f"windows of {self.frames} frames cannot overlap by {self.overlap}; use less, such as {two_thirds(self.frames)}"
            )
        choice("the windows' schedule", self.schedule, WINDOW_SCHEDULES)
