"""What is asked for: frozen requests with their tensors, checked when they are made.

Tensors are in ComfyUI's layouts: latents ``[batch, channels, latent frames, height/8, width/8]``, unscaled
VAE latents; images ``[frames, height, width, 3]`` in 0..1. What a request means for one checkpoint
(channels, text tokens) is checked by :func:`parallel_backend.cogvideox.pipeline.validation.check`.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch

from .errors import RequestError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8S = ("off", "linears", "all")
COMPILES = ("auto", "on", "off")
OFFLOADS = ("auto", "none", "model", "group", "sequential")
SCHEDULERS = ("auto", "ddim", "dpm")
TILINGS = ("auto", "on", "off")
WINDOW_SCHEDULES = ("static", "uniform")
IMAGE_SCALES = ("auto", "inverse", "raw", "scaled")
"""What a start image's latent is multiplied by; see ``Checkpoint.image_scale``."""
CHANNELS = 16
"""Of a latent."""
MAX_SEED = 2**64 - 1
MAX_STRENGTH = 10.0
ROUNDING = 1e-6
"""By which a share of the steps may be off."""


def choice(name: str, value: Any, allowed) -> None:
    """Raises RequestError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise RequestError(f"{name} is '{value}'; use one of {', '.join(map(str, allowed))}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raises RequestError unless ``low <= value <= high``; NaN never is."""
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; use {low} to {high}")


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


def check_latent(latent: torch.Tensor) -> None:
    """Checks the layout and size of a latent in ComfyUI's layout.

    Raises:
        RequestError: naming what another pack's latent looks like, where it is recognised.
    """
    shape = tuple(latent.shape)
    if latent.ndim == 5 and shape[2] == 16 and shape[1] != 16:
        raise RequestError(
            f"the latent is {shape}: frames before channels, as the CogVideoX wrapper's nodes make it; "
            "use this pack's or the core's nodes for the latent"
        )
    if latent.ndim != 5:
        raise RequestError(
            f"the latent is {shape}; a video latent is [batch, 16, frames, height/8, width/8]: "
            "use Empty CogVideoX Latent or VAE Encode"
        )
    if min(shape) < 1:
        raise RequestError(f"the latent is {shape}; every dimension must be at least 1")
    if shape[1] != CHANNELS:
        raise RequestError(
            f"the latent has {shape[1]} channels, as another model's nodes make it; CogVideoX takes {CHANNELS}: "
            "use Empty CogVideoX Latent or VAE Encode"
        )
    if shape[3] % 2 or shape[4] % 2:
        raise RequestError(f"the size is {shape[4] * 8}x{shape[3] * 8}; width and height must be multiples of 16")


def check_image(image: torch.Tensor, latent: torch.Tensor) -> None:
    """Raises RequestError unless a start image's latent is one frame of the video's size."""
    batch, channels, _, height, width = latent.shape
    if image.ndim != 5 or image.shape[0] not in (1, batch) or tuple(image.shape[1:3]) != (channels, 1):
        raise RequestError(
            f"the start image's latent is {tuple(image.shape)}; it must be [1 or {batch}, {channels}, 1, height/8, width/8]: "
            "use CogVideoX Image To Video"
        )
    if tuple(image.shape[3:]) != (height, width):
        raise RequestError(
            f"the start image is encoded for {image.shape[4] * 8}x{image.shape[3] * 8} and the video is "
            f"{width * 8}x{height * 8}; use one size for both"
        )


def check_condition(name: str, condition: torch.Tensor, latent: torch.Tensor, *, channels: int, node: str) -> None:
    """Raises RequestError unless a condition has every frame of the video, at its size.

    Args:
        name: of the condition, for the message.
        condition: to check.
        latent: of the video.
        channels: that the condition must have.
        node: that makes one which fits.
    """
    batch, _, frames, height, width = latent.shape
    if condition.ndim != 5 or condition.shape[0] not in (1, batch) or condition.shape[1] != channels:
        raise RequestError(
            f"the {name} is {tuple(condition.shape)}; "
            f"it must be [1 or {batch}, {channels}, frames, height/8, width/8]: use {node}"
        )
    if tuple(condition.shape[2:]) != (frames, height, width):
        _, _, own_frames, own_height, own_width = condition.shape
        raise RequestError(
            f"the {name} is made for {own_width * 8}x{own_height * 8} and {own_frames} latent frames and the video has "
            f"{width * 8}x{height * 8} and {frames}; use the latent that {node} gives"
        )


def check_size(width: int, height: int, frames: int, batch: int = 1) -> None:
    """Checks a size in pixels and frames, before any tensor of it is made.

    Raises:
        RequestError: naming the nearest allowed value.
    """
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            near = max(16, round(value / 16) * 16)
            raise RequestError(f"{name} is {value}; it must be a multiple of 16, such as {near}")
    if frames < 1 or frames % 4 != 1:
        near = max(1, round((frames - 1) / 4) * 4 + 1)
        raise RequestError(f"frames is {frames}; it must be 4k+1, such as {near}")
    if batch < 1:
        raise RequestError(f"batch is {batch}; it must be at least 1")


def empty_latent(*, width: int, height: int, frames: int, batch: int = 1, channels: int = CHANNELS) -> torch.Tensor:
    """Zeros of shape ``[batch, channels, (frames-1)/4+1, height/8, width/8]``.

    Raises:
        RequestError: for a size no CogVideoX can make.
    """
    check_size(width, height, frames, batch)
    return torch.zeros(batch, channels, (frames - 1) // 4 + 1, height // 8, width // 8)


@dataclass(frozen=True)
class Progress:
    """A sampling job after some of its steps: all that is needed to go on from there."""

    step: int
    """Steps done."""
    latents: torch.Tensor
    """Noisy, scaled, in the model's dtype: ``[batch, latent frames with padding, channels, height/8, width/8]``."""
    generator: torch.Tensor
    """State of the noise generator, bytes."""
    clean: torch.Tensor | None = None
    """The clean latents that the last step predicted, float32, shaped like ``latents``; what the DPM scheduler carries from step to step."""


@dataclass(frozen=True)
class SampleJob:
    """Denoise a latent. The result is a latent of the same shape, float32."""

    kind = "sample"
    model: Model
    positive: torch.Tensor
    """Text states ``[1 or batch, tokens, features]``; with ``positive_starts`` ``[1 or batch, prompts, tokens, features]``."""
    latent: torch.Tensor
    """``[batch, channels, latent frames, height/8, width/8]``; all zeros means empty."""
    negative: torch.Tensor | None = None
    """Like ``positive``; needed where ``cfg`` is above 1."""
    seed: int = 0
    steps: int = 50
    cfg: float = 6.0
    scheduler: str = "auto"
    """``auto`` is the checkpoint's own."""
    dynamic_cfg: bool = False
    denoise: float = 1.0
    """1 starts from noise; 0.6 runs the last 60 % of the steps on the latent given, as diffusers does."""
    image: torch.Tensor | None = None
    """The start image as an unscaled VAE latent ``[1 or batch, channels, 1, height/8, width/8]``; None for text to video."""
    progress: Progress | None = None
    """Where to go on from, as a lost group has reported it; None starts at the first step."""
    windows: Windows | None = None
    """For a video longer than the model's own; None runs all frames at once."""
    image_scale: str = "auto"
    """What the start image's latent is multiplied by: one of ``IMAGE_SCALES``; ``auto`` is the checkpoint's own."""
    control: torch.Tensor | None = None
    """A control video as an unscaled VAE latent ``[1 or batch, channels, latent frames, height/8, width/8]``."""
    control_strength: float = 1.0
    """The control video's latent is multiplied by this."""
    control_start: float = 0.0
    """Share of the steps before which there is no control."""
    control_end: float = 1.0
    """Share of the steps after which there is no control."""
    masked_video: torch.Tensor | None = None
    """For inpaint models: the video as an unscaled VAE latent like ``control``, black where it is replaced."""
    mask: torch.Tensor | None = None
    """Beside ``masked_video``: ``[1 or batch, 1, latent frames, height/8, width/8]``, 1 where the video is replaced."""
    batch_size: int = 0
    """For one video of a batch that is made apart from the others: how many they are together; 0 where the job is whole."""
    batch_index: int = 0
    """Which of them it is. It gets the noise that it would have had among them."""
    pipefusion_warmup: int = 4
    """Steps that a plan with ``pipefusion`` computes whole and exactly, at first; where all are, the video is ``single``'s, and
    with more of them it is nearer to that (benchmarks/results/pipefusion.md)."""
    preview: bool = False
    """Whether the caller is shown pictures of what steps take for the clean video."""
    positive_starts: tuple[float, ...] = ()
    """For several prompts one after the other: the share of the steps at which each begins, ascending from 0."""
    negative_starts: tuple[float, ...] = ()
    """Likewise for ``negative``."""

    def __post_init__(self):
        check_latent(self.latent)
        if self.image is not None:
            check_image(self.image, self.latent)
        self.check_conditions()
        choice("scheduler", self.scheduler, SCHEDULERS)
        between("steps", self.steps, 1, 1000)
        between("pipefusion_warmup", self.pipefusion_warmup, 1, 1000)
        between("seed", self.seed, 0, MAX_SEED)
        between("cfg", self.cfg, 0.0, 100.0)
        between("denoise", self.denoise, 0.0, 1.0)
        if self.steps_to_run < 1:
            raise RequestError(f"denoise {self.denoise} of {self.steps} steps leaves no step; raise either")
        if self.batch_size and not (self.latent.shape[0] == 1 and 0 <= self.batch_index < self.batch_size):
            raise RequestError(
                f"the latent has {self.latent.shape[0]} videos, as number {self.batch_index} of a batch of {self.batch_size}; "
                "such a job is of one video of the batch"
            )
        if self.denoise < 1 and not self.batch_size and not self.latent.any():
            raise RequestError(f"denoise is {self.denoise} but the latent is empty; encode a video, or use denoise 1")
        if self.guided and self.negative is None:
            raise RequestError(f"cfg is {self.cfg} but there is no negative conditioning; give one, or use cfg 1")
        self.check_text("positive", self.positive, self.positive_starts)
        if self.negative is not None:
            self.check_text("negative", self.negative, self.negative_starts)

    def check_text(self, name: str, text: torch.Tensor, starts: tuple[float, ...]) -> None:
        """Raises RequestError unless text states fit the batch, and several prompts their starts."""
        batch = self.latent.shape[0]
        if text.ndim != (4 if starts else 3) or text.shape[0] not in (1, batch):
            layout = f"[1 or {batch}, {'prompts, ' if starts else ''}tokens, features]"
            raise RequestError(f"{name} conditioning is {tuple(text.shape)}; it must be {layout}")
        ascending = all(start < after for start, after in pairwise((*starts, 1)))
        if starts and (len(starts) != text.shape[1] or starts[0] != 0 or not ascending):
            raise RequestError(f"{name}_starts is {starts}; it must be {text.shape[1]} ascending shares from 0 to below 1")

    def check_conditions(self) -> None:
        """Raises RequestError unless what is concatenated to the noise fits the latent."""
        choice("image_scale", self.image_scale, IMAGE_SCALES)
        between("control_strength", self.control_strength, 0.0, 10.0)
        between("control_start", self.control_start, 0.0, 1.0)
        between("control_end", self.control_end, self.control_start, 1.0)
        channels = self.latent.shape[1]
        if self.control is not None:
            node = "CogVideoX Control To Video"
            check_condition("control video's latent", self.control, self.latent, channels=channels, node=node)
        if (self.masked_video is None) != (self.mask is None):
            raise RequestError("a masked video and its mask go together; use CogVideoX Inpaint or CogVideoX Image To Video")
        if self.mask is not None:
            node = "CogVideoX Inpaint or CogVideoX Image To Video"
            check_condition("masked video's latent", self.masked_video, self.latent, channels=channels, node=node)
            check_condition("mask", self.mask, self.latent, channels=1, node=node)

    @property
    def guided(self) -> bool:
        """Whether each step runs the model on both prompts."""
        return self.cfg > 1

    @property
    def steps_to_run(self) -> int:
        """Of the steps, those that ``denoise`` leaves."""
        return int(self.steps * self.denoise)

    def prompts_of(self, step: int) -> tuple[int, int]:
        """The numbers of the negative and the positive prompt of a step, counted from the first that is run."""
        share = (self.steps - self.steps_to_run + step) / self.steps + ROUNDING
        return tuple(max(bisect_right(starts, share) - 1, 0) for starts in (self.negative_starts, self.positive_starts))

    @property
    def drawn(self) -> tuple[int, slice]:
        """For how many videos noise is drawn, and which of them are this job's."""
        if self.batch_size:
            return self.batch_size, slice(self.batch_index, self.batch_index + 1)
        return self.latent.shape[0], slice(None)


@dataclass(frozen=True)
class LoadJob(SampleJob):
    """Read the weights that a sampling job needs, whose text is not known yet. The result is an empty tensor."""

    kind = "load"

    @classmethod
    def of(cls, job: SampleJob) -> "LoadJob":
        """For one sampling job."""
        return cls(**{item.name: getattr(job, item.name) for item in fields(job)})


@dataclass(frozen=True)
class WindowJob:
    """Predict the frames of one window of a step. The result is ``[batch, frames, channels, height/8, width/8]``, float32."""

    kind = "window"
    model: Model
    seen: torch.Tensor
    """Noisy, scaled latents of whole tokens with what is concatenated to them, in the model's dtype, shaped like the result."""
    positive: torch.Tensor
    """As in :class:`SampleJob`."""
    timestep: int
    scale: float
    """Of the guidance; not used without ``negative``."""
    negative: torch.Tensor | None = None
    """None where the step is not guided."""

    @property
    def guided(self) -> bool:
        """Whether the model runs on both prompts."""
        return self.negative is not None

    def __post_init__(self):
        if self.seen.ndim != 5:
            raise RequestError(f"a window is {tuple(self.seen.shape)}; it must be [batch, frames, channels, height/8, width/8]")


@dataclass(frozen=True)
class DecodeJob:
    """Decode a latent. The result is ``[batch, frames, height, width, 3]``, float32 in 0..1."""

    kind = "decode"
    model: Model
    latent: torch.Tensor
    tiling: str = "auto"
    """``auto`` decodes in tiles where a whole decode would not fit in free memory."""
    tile: int = 256
    """Tile edge in pixels."""
    overlap: int = 64
    """Pixels by which tiles overlap and are blended."""

    def __post_init__(self):
        check_latent(self.latent)
        choice("tiling", self.tiling, TILINGS)
        between("tile", self.tile, 64, 4096)
        between("overlap", self.overlap, 0, self.tile // 2)


@dataclass(frozen=True)
class EncodeJob:
    """Encode a video. The result is a latent ``[1, channels, latent frames, height/8, width/8]``, float32."""

    kind = "encode"
    model: Model
    pixels: torch.Tensor
    """``[frames, height, width, 3]`` in 0..1; frames 4k+1."""
    tiling: str = "auto"
    tile: int = 256
    overlap: int = 64

    def __post_init__(self):
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3:
            raise RequestError(f"the video is {tuple(self.pixels.shape)}; it must be [frames, height, width, 3]")
        frames, height, width, _ = self.pixels.shape
        check_size(width, height, frames)
        choice("tiling", self.tiling, TILINGS)
        between("tile", self.tile, 64, 4096)
        between("overlap", self.overlap, 0, self.tile // 2)


Job = SampleJob | WindowJob | DecodeJob | EncodeJob
JOBS: dict[str, type] = {job.kind: job for job in (SampleJob, LoadJob, WindowJob, DecodeJob, EncodeJob)}


@dataclass(frozen=True)
class Report:
    """What a job cost."""

    plan: str = "single"
    world_size: int = 1
    load_seconds: float = 0.0
    """Spent reading and moving weights; 0 when they were there."""
    run_seconds: float = 0.0
    """From the first step's start to the result, loading not counted."""
    step_seconds: tuple[float, ...] = ()
    """The work of each step, reporting it to the caller not counted."""
    peak_memory: tuple[int, ...] = ()
    """Bytes by rank: the GPU's peak in the job, or the process's resident peak on the CPU."""
    notes: tuple[str, ...] = ()
    """One line for each fallback or degraded mode the job ran under."""


@dataclass(frozen=True)
class Result:
    """A job's tensor and what it cost."""

    tensor: torch.Tensor
    report: Report = field(default_factory=Report)


def split_fields(record: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A request as plain JSON values and tensors, for the wire."""
    plain: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, torch.Tensor):
            tensors[item.name] = value
        elif isinstance(value, Model):
            plain[item.name] = split_model(value)
        elif isinstance(value, Progress):
            plain[item.name], inner = split_fields(value)
            tensors |= {f"{item.name}.{name}": tensor for name, tensor in inner.items()}
        elif isinstance(value, Windows):
            plain[item.name] = asdict(value)
        elif value != item.default:  # a side that does not know the field yet need not see its default
            plain[item.name] = value
    return plain, tensors


def split_model(model: Model) -> dict[str, Any]:
    """A model as plain JSON values; a side that does not know a field yet need not see its default."""
    defaults = {item.name: item.default for item in fields(model)}
    return {name: value for name, value in asdict(model).items() if value != defaults[name]}


def join_model(plain: dict[str, Any]) -> Model:
    """The model that :func:`split_model` took apart, checked again."""
    if not isinstance(plain, dict):
        raise TypeError(f"a model is not {plain!r}")
    return Model(**{**plain, "loras": tuple(Lora(**lora) for lora in plain.get("loras", ()))})


def join_fields(kind: str, plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Job:
    """The request that :func:`split_fields` took apart, checked again.

    Raises:
        RequestError: for an unknown kind or unknown fields.
    """
    if kind not in JOBS:
        raise RequestError(f"job kind is '{kind}'; use one of {', '.join(JOBS)}")
    try:
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        values = {**plain, **tensors, "model": join_model(plain["model"])}
        if "progress" in plain:
            names = [name for name in tensors if name.startswith("progress.")]
            inner = {name.removeprefix("progress."): values.pop(name) for name in names}
            values["progress"] = Progress(**plain["progress"], **inner)
        if "windows" in plain:
            values["windows"] = Windows(**plain["windows"])
        return JOBS[kind](**values)
    except (KeyError, TypeError) as error:
        raise RequestError(f"a {kind} job does not fit: {error}") from error
