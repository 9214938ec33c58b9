"""What a checkpoint's configuration says: task, sizes, position embeddings, scheduler."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...jobs import empty_latent
from . import tasks
from .compression import SPATIAL, TEMPORAL, frames_of, latent_frames_of

SCHEDULER_CLASSES = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
REFERENCE_NOISE = 0.0563
"""Standard deviation, for pixels in -1..1, of the noise on an inpaint model's masked video, if it was trained with noise
(``noise_aug_strength`` of VideoX-Fun's CogVideoXFunInpaintPipeline)."""
ANISORA_SIZE = (1280, 720)
"""Width and height in the configuration of AniSora V1, and of no other model of CogVideoX 1.0."""
TRAINED_AT = (1360, 768)
"""Width and height that CogVideoX 1.5 was trained for."""
REACH = 300 * SPATIAL
"""Width and height that the positions of CogVideoX 1.5 reach, in its published configurations. Early ones had the trained size, of the
same weights."""
REMOVAL_SIZE, REMOVAL_FPS = (672, 384), 12
"""Width, height and frames per second of object removal (Netflix/void-model 66e9c0e, ``config/quadmask_cogvideox.py``)."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known of a checkpoint without reading its weights."""

    path: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    elements: dict[str, int] = field(default_factory=dict)
    """Number of weight elements of each part."""
    pipeline: str | None = None
    """The pipeline class in ``model_index.json``; None without that file."""
    lender: Path | None = None
    """The sibling folder that provides missing parts, named in ``model_index.json`` (see ``LENDER``)."""
    asked_task: str = "auto"
    """The user's choice instead of what is concluded; see :class:`parallel_backend.model.Model`."""
    asked_snr_shift: str = "auto"
    """Likewise."""

    @property
    def has_text(self) -> bool:
        """Whether the checkpoint has a text encoder; the CogVideoX wrapper's folders have none."""
        return "text_encoder" in self.elements

    @property
    def heads(self) -> int:
        return self.transformer.get("num_attention_heads", 30)

    @property
    def head_dim(self) -> int:
        return self.transformer.get("attention_head_dim", 64)

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return self.transformer.get("num_layers", 30)

    @property
    def channels(self) -> int:
        """Latent channels of the noise and of the result."""
        return self.transformer.get("out_channels") or 16

    @property
    def in_channels(self) -> int:
        """Input channels of the transformer: those of the noise, then those of the condition."""
        return self.transformer.get("in_channels", 16)

    @property
    def possible_tasks(self) -> tuple[str, ...]:
        """The tasks that its channels allow."""
        return tasks.possible(self.channels, self.in_channels)

    @property
    def concluded_task(self) -> tuple[str | None, str]:
        """The task that its configuration suggests, and why; see :func:`.tasks.infer`."""
        return tasks.infer(self.possible_tasks, self.transformer, self.pipeline)

    @property
    def task(self) -> str | None:
        """A key of ``TASKS``, as asked or concluded; None if the number of channels is unknown."""
        return self.concluded_task[0] if self.asked_task == "auto" else self.asked_task

    @property
    def takes_image(self) -> bool:
        """Whether it makes a video from a start image only."""
        return self.task == "image"

    @property
    def is_anisora(self) -> bool:
        """Whether it is AniSora V1, which has the shape of 5b-I2V.

        It was trained at several sizes up to 1280x720 and 16 frames per second, with positions that count from the corner, and with
        one or two images in any frames (bilibili/Index-anisora 171fe63, ``anisoraV1_train_gpu/sat``: ``dit_video_concat.py``,
        ``diffusion_video.py`` and ``configs/cogvideox_5b_sft_fix_pretrain_gpu_720.yaml``).
        """
        return self.takes_image and self.rotary and self.patch_size_t is None and self.positions_size == ANISORA_SIZE

    @property
    def counts_from_corner(self) -> bool:
        """Whether positions are whole numbers from the corner at every size: CogVideoX 1.5 and AniSora V1."""
        return self.patch_size_t is not None or self.is_anisora

    @property
    def is_fun(self) -> bool:
        """Whether it belongs to VideoX-Fun's family, as control, inpaint and removal models do.

        It was trained without padding frames, at many sizes (see :mod:`parallel_backend.cogvideox.transformer.positions`), and with a
        noise schedule of its own (:attr:`snr_shift_scale`).
        """
        return self.task in ("control", "inpaint", "removal")

    @property
    def removes(self) -> bool:
        """Whether it removes objects from a video, as VOID does."""
        return self.task == "removal"

    @property
    def configured_snr_shift(self) -> float:
        """The factor of the noise schedule's signal-to-noise ratio in the configuration: 3 for 2b, 1, which is none, for others."""
        return self.scheduler.get("snr_shift_scale", 3.0)  # diffusers' default

    @property
    def snr_shift_scale(self) -> float:
        """The factor to use.

        VideoX-Fun trained all its models with plain DDPM, which ignores the factor, although its 2b models are published with 3
        (``scripts/cogvideox_fun/train.py``; its sampler ``DDIM_Origin`` ignores it too). Base 2b was trained with 3.
        """
        shifted = not self.is_fun if self.asked_snr_shift == "auto" else self.asked_snr_shift == "on"
        return self.configured_snr_shift if shifted else 1.0

    @property
    def interpolates_positions(self) -> bool:
        """Whether the sinusoidal table of the configured size is resized to other sizes, as VideoX-Fun's 2b models were trained."""
        return self.is_fun and not self.rotary

    @property
    def reference_noise(self) -> float:
        """Standard deviation of the noise on an inpaint model's masked video, for pixels in -1..1.

        Only V1.1-5b was trained with noise.
        """
        return REFERENCE_NOISE if self.transformer.get("add_noise_in_inpaint_model") else 0.0

    @property
    def text_tokens(self) -> int:
        """Number of tokens that a prompt is padded or truncated to."""
        return self.transformer.get("max_text_seq_length", 226)

    @property
    def text_features(self) -> int:
        """Features of a text token."""
        return self.transformer.get("text_embed_dim", 4096)

    @property
    def patch_size_t(self) -> int | None:
        """Latent frames per token; None for CogVideoX 1.0, where it is one."""
        return self.transformer.get("patch_size_t")

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary (5b, 1.5) or sinusoidal and added (2b)."""
        return bool(self.transformer.get("use_rotary_positional_embeddings", False))

    @property
    def takes_riflex(self) -> bool:
        """Whether RIFLEx applies: it was published for CogVideoX-5b. Windows of 1.5 have half as many tokens."""
        return self.rotary and self.patch_size_t is None

    @property
    def learned_positions(self) -> bool:
        """Whether learned positions are added as well (5b-I2V). They are valid for one width and height only."""
        return bool(self.transformer.get("use_learned_positional_embeddings", False))

    @property
    def ofs(self) -> float | None:
        """The constant that CogVideoX1.5-5B-I2V takes in addition to the timestep; None for other models."""
        return 2.0 if self.transformer.get("ofs_embed_dim") else None

    @property
    def scaling_factor(self) -> float:
        """Factor from VAE latents to the transformer's latents."""
        return self.vae.get("scaling_factor", 1.15258426)

    def image_scale(self, name: str = "auto") -> float:
        """Returns the factor of a start image's latent.

        Args:
            name: one of ``jobs.IMAGE_SCALES``, the conventions in use for CogVideoX1.5-5B-I2V. ``auto`` is diffusers', which
                follows the VAE's ``invert_scale_latents``: the inverse of the scaling factor if set, else the factor.
                ``inverse`` is always the inverse. ``raw`` is 1, as in the CogVideoX wrapper and zai-org/CogVideo#761.
                ``scaled`` is always the factor, as in ComfyUI's own model.
        """
        if name == "auto":
            name = "inverse" if self.vae.get("invert_scale_latents") else "scaled"
        return {"inverse": 1 / self.scaling_factor, "raw": 1.0, "scaled": self.scaling_factor}[name]

    @property
    def default_scheduler(self) -> str:
        """``ddim`` or ``dpm``, from the checkpoint's configuration."""
        named = {value: key for key, value in SCHEDULER_CLASSES.items()}
        return named.get(self.scheduler.get("_class_name"), "ddim")

    @property
    def positions_size(self) -> tuple[int, int]:
        """Width and height in pixels that the configuration's positions are made for."""
        return self.transformer.get("sample_width", 90) * SPATIAL, self.transformer.get("sample_height", 60) * SPATIAL

    @property
    def reach(self) -> tuple[int, int]:
        """Largest width and height in pixels of CogVideoX 1.5, whose positions count from the corner."""
        width, height = self.positions_size
        return max(width, REACH), max(height, REACH)

    @property
    def default_size(self) -> tuple[int, int, int]:
        """Width in pixels, height in pixels, and number of frames that the model was trained for."""
        size, frames = self.positions_size, self.transformer.get("sample_frames", 49)
        if self.patch_size_t is not None:
            size = tuple(map(min, size, REMOVAL_SIZE if self.removes else TRAINED_AT))
        if self.is_fun:  # trained without padding: 85 frames for a configuration's 81
            frames += self.padding_frames(latent_frames_of(frames)) * TEMPORAL
        return *size, frames

    def empty_latent(self) -> torch.Tensor:
        """Returns an empty latent of the default size."""
        return empty_latent(**dict(zip(("width", "height", "frames"), self.default_size)), channels=self.channels)

    def blank_text(self) -> torch.Tensor:
        """Returns zeros as text states ``[1, tokens, features]``, for a job whose text is not known yet."""
        return torch.zeros(1, self.text_tokens, self.text_features)

    @property
    def most_frames(self) -> int:
        """Number of frames of the longest training videos: twice the default of CogVideoX 1.5 (161) and AniSora V1 (97).

        Object removal makes longer videos in windows of its default.
        """
        frames = self.default_size[2]
        return 2 * frames - 1 if self.counts_from_corner and not self.removes else frames

    @property
    def default_cfg(self) -> float:
        """Guidance scale: 6, and 1, which is none, for object removal."""
        return 1.0 if self.removes else 6.0

    @property
    def default_fps(self) -> int:
        """Frames per second: 16 for CogVideoX 1.5 and AniSora V1, 8 for others of 1.0 and for VideoX-Fun, 12 for object removal."""
        if self.removes:
            return REMOVAL_FPS
        return 16 if self.counts_from_corner and not self.is_fun else 8

    def weight_bytes(self, part: str, dtype: torch.dtype) -> int:
        """Returns the bytes of a part's weights once loaded in ``dtype``; 0 if the checkpoint does not have that part."""
        return self.elements.get(part, 0) * dtype.itemsize

    def padding_frames(self, latent_frames: int) -> int:
        """Returns the number of latent frames to prepend so that they divide into tokens. They are dropped after sampling.

        None for a single frame of VideoX-Fun's models, which zeros follow; see :meth:`.forward.Forward.predict`.
        """
        if self.is_fun and latent_frames == 1:
            return 0
        return -latent_frames % (self.patch_size_t or 1)

    def tokens(self, latent_frames: int, height: int, width: int) -> int:
        """Returns the number of video tokens of a latent; height and width in latent rows and columns."""
        patch = self.transformer.get("patch_size", 2)
        frames = math.ceil((latent_frames + self.padding_frames(latent_frames)) / (self.patch_size_t or 1))
        return frames * (height // patch) * (width // patch)


def whole_frames(frames: int, together: int = 1) -> int:
    """Returns the largest number of frames, 4k+1 and at most ``frames``, that needs no padding.

    Args:
        frames: of the video.
        together: latent frames per token.
    """
    return frames_of(max(latent_frames_of(frames) // together * together, 1))
