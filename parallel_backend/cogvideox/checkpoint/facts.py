"""What a checkpoint's configuration says about it: task, sizes, positions, scheduler."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...jobs import empty_latent

SPATIAL, TEMPORAL = 8, 4
"""Pixels in a latent row or column, and frames in a latent frame after the first."""
SCHEDULER_CLASSES = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
TASKS = {
    "text": "text to video",
    "image": "image to video",
    "control": "control video to video",
    "inpaint": "inpainting, first and last frame",
}
"""What a checkpoint makes a video from, and how messages name it."""
IMAGE_PIPELINE = "CogVideoXImageToVideoPipeline"
"""Tells a start image from a control video where a transformer of 32 channels does not."""
REFERENCE_NOISE = 0.0563
"""Standard deviation, of pixels in -1..1, of the noise on what an inpaint model is shown, where it was trained with noise
(``noise_aug_strength`` of VideoX-Fun's CogVideoXFunInpaintPipeline)."""
TRAINED_AT = (1360, 768)
"""CogVideoX 1.5's own size: its published configurations say 300x300 latents, which is how far its positions reach."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known of a checkpoint without reading its weights."""

    path: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    elements: dict[str, int] = field(default_factory=dict)
    """Numbers in the weights of each part."""
    pipeline: str | None = None
    """The class that ``model_index.json`` names; None where there is no such file."""
    lender: Path | None = None
    """The folder beside it that has the parts it lacks; ``model_index.json`` names it (``LENDER``)."""

    @property
    def has_text(self) -> bool:
        """Whether the folder has a text encoder; the CogVideoX wrapper's folders have none."""
        return "text_encoder" in self.elements

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.transformer.get("num_attention_heads", 30)

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.transformer.get("attention_head_dim", 64)

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self.transformer.get("num_layers", 30)

    @property
    def channels(self) -> int:
        """Latent channels of noise and result."""
        return self.transformer.get("out_channels") or 16

    @property
    def in_channels(self) -> int:
        """Latent channels the transformer takes: the noise's, and after them what it is conditioned on."""
        return self.transformer.get("in_channels", 16)

    @property
    def task(self) -> str | None:
        """One of ``TASKS``, by the checkpoint's own configuration; None for channels this pack does not know.

        Published models: noise alone is 16 channels. 33 are VideoX-Fun's InP (noise, mask, masked video). 32 are noise and
        either a start image (5b-I2V has learned positions, 1.5-5B-I2V an ``ofs`` embedding) or a control video (Fun Control
        and Pose, which have neither: VideoX-Fun's issue 176). What is left, such as a start-image finetune of 2b, is known
        by the pipeline in ``model_index.json``; a folder without one, as the CogVideoX wrapper's, is taken for control.
        """
        if self.in_channels == self.channels:
            return "text"
        if self.in_channels == 2 * self.channels + 1:
            return "inpaint"
        if self.in_channels != 2 * self.channels:
            return None
        is_image = self.learned_positions or self.ofs is not None or self.pipeline == IMAGE_PIPELINE
        return "image" if is_image else "control"

    @property
    def takes_image(self) -> bool:
        """Whether it makes a video from a start image alone."""
        return self.task == "image"

    @property
    def is_fun(self) -> bool:
        """Whether it is of VideoX-Fun's family, which was trained on whole tokens and at 8 frames per second."""
        return self.task in ("control", "inpaint")

    @property
    def reference_noise(self) -> float:
        """Standard deviation of the noise on the pixels an inpaint model is shown: only V1.1-5b was trained with it."""
        return REFERENCE_NOISE if self.transformer.get("add_noise_in_inpaint_model") else 0.0

    @property
    def text_tokens(self) -> int:
        """Tokens a prompt is padded or cut to."""
        return self.transformer.get("max_text_seq_length", 226)

    @property
    def text_features(self) -> int:
        """Features of one text token."""
        return self.transformer.get("text_embed_dim", 4096)

    @property
    def patch_size_t(self) -> int | None:
        """Latent frames in one token; None in CogVideoX 1.0, where it is one."""
        return self.transformer.get("patch_size_t")

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary (5b, 1.5) or added sines (2b)."""
        return bool(self.transformer.get("use_rotary_positional_embeddings", False))

    @property
    def learned_positions(self) -> bool:
        """Whether learned positions are added too (5b-I2V): they hold for one width and height."""
        return bool(self.transformer.get("use_learned_positional_embeddings", False))

    @property
    def ofs(self) -> float | None:
        """The constant that CogVideoX1.5-5B-I2V takes along with the timestep; None where there is none."""
        return 2.0 if self.transformer.get("ofs_embed_dim") else None

    @property
    def scaling_factor(self) -> float:
        """What a VAE latent is multiplied by for the transformer."""
        return self.vae.get("scaling_factor", 1.15258426)

    def image_scale(self, name: str = "auto") -> float:
        """What a start image's latent is multiplied by.

        One of ``jobs.IMAGE_SCALES``, the conventions that there are for CogVideoX1.5-5B-I2V: ``auto`` is diffusers', which
        follows the VAE's ``invert_scale_latents`` (the inverse of the factor there, the factor elsewhere); ``inverse`` is
        always the inverse; ``raw`` is 1, as in the CogVideoX wrapper and zai-org/CogVideo#761; ``scaled`` is always the
        factor, as in ComfyUI's own model.
        """
        if name == "auto":
            name = "inverse" if self.vae.get("invert_scale_latents") else "scaled"
        return {"inverse": 1 / self.scaling_factor, "raw": 1.0, "scaled": self.scaling_factor}[name]

    @property
    def default_scheduler(self) -> str:
        """``ddim`` or ``dpm``, as the checkpoint's own configuration says."""
        named = {value: key for key, value in SCHEDULER_CLASSES.items()}
        return named.get(self.scheduler.get("_class_name"), "ddim")

    @property
    def positions_size(self) -> tuple[int, int]:
        """Width and height in pixels that the configuration's positions are made for."""
        return self.transformer.get("sample_width", 90) * SPATIAL, self.transformer.get("sample_height", 60) * SPATIAL

    @property
    def default_size(self) -> tuple[int, int, int]:
        """Width and height in pixels and frames that the model was trained for."""
        size = self.positions_size
        if self.patch_size_t is not None:
            size = tuple(map(min, size, TRAINED_AT))
        frames = self.transformer.get("sample_frames", 49)
        if self.is_fun:  # which pads nothing: 85 frames for a configuration's 81
            frames += self.padding_frames((frames - 1) // TEMPORAL + 1) * TEMPORAL
        return *size, frames

    def empty_latent(self) -> torch.Tensor:
        """An empty latent of the size that the model was trained for."""
        return empty_latent(**dict(zip(("width", "height", "frames"), self.default_size)), channels=self.channels)

    def blank_text(self) -> torch.Tensor:
        """Text states ``[1, tokens, features]`` for a job whose text is not known yet."""
        return torch.zeros(1, self.text_tokens, self.text_features)

    @property
    def most_frames(self) -> int:
        """Frames of the longest videos it was trained for; CogVideoX 1.5 also saw twice its own 81 (161)."""
        frames = self.default_size[2]
        return frames if self.patch_size_t is None else 2 * frames - 1

    @property
    def default_fps(self) -> int:
        """Frames per second: 8 in CogVideoX 1.0 and in all of VideoX-Fun's models, 16 in 1.5."""
        return 8 if self.patch_size_t is None or self.is_fun else 16

    def weight_bytes(self, part: str, dtype: torch.dtype) -> int:
        """Bytes of a part's weights once loaded in ``dtype``; 0 for one that is not there."""
        return self.elements.get(part, 0) * dtype.itemsize

    def padding_frames(self, latent_frames: int) -> int:
        """Latent frames put in front so that they divide into tokens, dropped after the loop."""
        return -latent_frames % (self.patch_size_t or 1)

    def tokens(self, latent_frames: int, height: int, width: int) -> int:
        """Video tokens of a latent of this size; height and width in latent rows and columns."""
        patch = self.transformer.get("patch_size", 2)
        frames = (latent_frames + self.padding_frames(latent_frames)) // (self.patch_size_t or 1)
        return frames * (height // patch) * (width // patch)


def whole_frames(frames: int, together: int = 1) -> int:
    """The most frames, 4k+1, that a video of so many gives without padding; ``together`` latent frames are one token."""
    latent = (frames - 1) // TEMPORAL + 1
    return (max(latent // together * together, 1) - 1) * TEMPORAL + 1
