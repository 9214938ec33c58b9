"""The model of a job: its files, precision, offload, LoRAs, ControlNets and windows."""

from dataclasses import dataclass, replace

import torch

from .errors import RequestError
from .plan import AUTO
from .validation import between, choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8S = ("off", "linears", "all")
QUANTIZES = ("off", "fp8", "int8")
COMPILES = ("auto", "on", "off")
ATTENTIONS = (AUTO, "hopper", "cudnn", "flash", "efficient", "flash3", "flash2", "torch", "int8", "sage", "fp8")
"""Attention functions; see :mod:`parallel_backend.cogvideox.attention.registry`. The last three are not exact."""
OFFLOADS = ("auto", "none", "model", "group", "sequential")
TASKS = ("auto", "text", "image", "control", "inpaint", "removal")
"""What a checkpoint makes a video from; see :mod:`parallel_backend.cogvideox.checkpoint.tasks`."""
SNR_SHIFTS = ("auto", "on", "off")
WINDOW_SCHEDULES = ("static", "uniform")
RIFLEXES = ("off", "on", "finetuned")
"""Temporal positions of a long window; see :mod:`parallel_backend.cogvideox.transformer.positions`."""
MAX_STRENGTH = 10.0
MAX_SPARED = 10
"""Most steps in a row of a guidance cache."""


@dataclass(frozen=True)
class Lora:
    """A LoRA: a low-rank change of the transformer's weights."""

    path: str
    """A ``.safetensors`` file; see :mod:`parallel_backend.cogvideox.transformer.lora`."""
    strength: float = 1.0
    """Factor for the change; 0 leaves the model as it is."""

    def __post_init__(self):
        between("LoRA strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet: blocks beside the transformer's, which make it follow a control video. LoRAs and quantisation do not apply to it."""

    path: str
    """A folder with ``config.json`` and weights, or a ``.safetensors`` file."""
    strength: float = 1.0
    """Factor for what it adds; 0 leaves the model as it is."""
    start: float = 0.0
    """Share of the steps at which it starts."""
    end: float = 1.0
    """Share of the steps at which it ends."""

    def __post_init__(self):
        between("ControlNet strength", self.strength, 0.0, MAX_STRENGTH)
        between("ControlNet start", self.start, 0.0, 1.0)
        between("ControlNet end", self.end, self.start, 1.0)

    def at(self, done: float) -> "ControlNet":
        """Returns it as it is after a share of the steps: without strength if it is off then."""
        return self if self.start <= done <= self.end else replace(self, strength=0.0)


@dataclass(frozen=True)
class Model:
    """Describes a model. Holds no weights: they are loaded where they run."""

    path: str
    """A checkpoint folder in diffusers layout, or a transformer's ``.safetensors`` file."""
    dtype: str = "auto"
    """``auto`` is the checkpoint's own on a GPU and fp32 on the CPU."""
    offload: str = "auto"
    """Where weights wait between uses; ``auto`` decides by free memory."""
    compile: str = "auto"
    """Whether blocks and the VAE use kernels that are compiled for the device; ``auto``: on a GPU, except for small models and
    small videos."""
    fp8: str = "off"
    """``linears`` is the older form of ``quantize`` fp8; ``all`` rounds attention to FP8 too."""
    step_cache: float = 0.0
    """Relative change of the first block's residual below which the other blocks' residual is extrapolated; 0 disables. See
    :class:`parallel_backend.cogvideox.transformer.step_cache.StepCache`."""
    guidance_cache: int = 0
    """Maximum number of steps after a full one that make guidance's unconditional half from its difference; 0 disables. See
    :class:`parallel_backend.cogvideox.pipeline.guidance_cache.GuidanceCache`."""
    loras: tuple[Lora, ...] = ()
    """All are added to the weights. Their order affects only rounding."""
    task: str = "auto"
    """What it makes a video from; ``auto`` concludes it from the configuration."""
    snr_shift: str = "auto"
    """Whether the noise schedule has the SNR shift in the checkpoint's configuration; ``auto``: as it was trained."""
    attention: str = AUTO
    """The attention function; ``auto`` is the fastest exact one, or with ``fp8`` all the one in FP8 where it works."""
    quantize: str = "off"
    """What the blocks' linear layers are rounded to; with ``off``, ``fp8`` may still say so."""

    def __post_init__(self):
        choice("dtype", self.dtype, ("auto", *DTYPES))
        choice("offload", self.offload, OFFLOADS)
        choice("compile", self.compile, COMPILES)
        choice("fp8", self.fp8, FP8S)
        choice("attention", self.attention, ATTENTIONS)
        choice("quantize", self.quantize, QUANTIZES)
        if self.quantize == "int8" and self.fp8 != "off":
            raise RequestError(
                f"fp8 '{self.fp8}' and quantize 'int8' both round the linear layers; set one of them to 'off' "
                "(attention 'fp8' rounds attention alone)"
            )
        between("step_cache", self.step_cache, 0, 2)
        between("guidance_cache", self.guidance_cache, 0, MAX_SPARED)
        choice("task", self.task, TASKS)
        choice("snr_shift", self.snr_shift, SNR_SHIFTS)

    @property
    def attention_function(self) -> str:
        """The name of the attention function that is tried first, or ``auto``."""
        return "fp8" if self.attention == AUTO and self.fp8 == "all" else self.attention

    @property
    def quantization(self) -> str:
        """What the blocks' linear layers are rounded to: ``off``, ``fp8`` or ``int8``."""
        return "fp8" if self.fp8 != "off" else self.quantize


def two_thirds(frames: int) -> int:
    """Returns two thirds of a window's frames as a multiple of 4. With half, the demo's videos sometimes jumped."""
    return round((frames - 1) / 6) * 4


@dataclass(frozen=True)
class Windows:
    """Overlapping windows for sampling a long video. Lengths are frames of the video, rounded up to whole tokens when used."""

    frames: int = 49
    """Length of one window, 4k+1: what the model was trained for. A video that is not longer is sampled whole."""
    overlap: int = two_thirds(49)
    """Least overlap of neighbouring windows, which is blended; a multiple of 4."""
    schedule: str = "static"
    """``static`` windows stay in place; ``uniform`` windows shift from step to step."""
    shuffle_noise: bool = True
    """Whether later windows start from the first one's noise in another order (FreeNoise), not from noise of their own."""
    riflex: str = "off"
    """``on`` stretches the model to windows of twice its training length; ``finetuned`` is for the weights of RIFLEx's authors."""

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
        choice("riflex", self.riflex, RIFLEXES)
