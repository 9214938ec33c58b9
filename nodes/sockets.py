"""What passes between nodes: the pack's own sockets, and the objects under the core's ``CLIP`` and ``VAE``."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint import SPATIAL, TEMPORAL, Checkpoint
from ..parallel_backend.cogvideox.text import WORKING_BYTES, TextEncoder, find_place
from ..parallel_backend.errors import RequestError
from ..parallel_backend.jobs import DecodeJob, EncodeJob, Model, SampleJob, Windows
from . import host

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
    """What a backend socket carries: the person's words."""

    devices: str
    plan: str
    pipefusion_warmup: int = SampleJob.pipefusion_warmup


class ClipHandle:
    """The checkpoint's text encoder, answering what core nodes ask of a ``CLIP``.

    Args:
        checkpoint: whose text encoder it is; read at the first prompt.
        dtype: of the weights; see :class:`parallel_backend.jobs.Model`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self.checkpoint = checkpoint
        self._dtype = dtype
        self._encoder: TextEncoder | None = None

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder.

        Raises:
            RequestError: when the checkpoint has none, saying what to use.
        """
        if self._encoder is None:
            device = host.text_device()
            dtype = self.checkpoint.dtype(self._dtype, device)
            say = partial(host.say, level=logging.WARNING)
            self._encoder = TextEncoder(self.checkpoint, device=device, dtype=dtype, say=say)
            self._encoder.go_on = host.is_wanted
        return self._encoder

    def _find_room(self) -> None:
        """Has ComfyUI make room where it wants text encoders to run; where that does not suffice, the CPU encodes."""
        wanted = host.text_device()
        dtype = self.checkpoint.dtype(self._dtype, wanted)
        host.make_room(self.checkpoint.weight_bytes("text_encoder", dtype) + WORKING_BYTES, wanted)
        place = find_place(self.checkpoint, [wanted], self._dtype)
        if place.note:
            host.say(place.note, level=logging.WARNING)
        self.encoder.move(place)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        """Token ids of a prompt and their weights, padded or cut to the model's limit."""
        return {"t5": [self.encoder.weigh(text)]}

    def encode_from_tokens(self, tokens: dict[str, list], return_pooled: bool = False, return_dict: bool = False):
        """Text states ``[1, tokens, features]``; CogVideoX has no pooled output."""
        self._find_room()
        try:
            ids, weights = ([[pair[part] for pair in prompt] for prompt in tokens["t5"]] for part in (0, 1))
            with host.interruptible():
                states = self.encoder.encode(ids, weights)
        finally:
            self.encoder.unload()  # the transformer, here or in the group, wants the room
        if return_dict:
            return {"cond": states, "pooled_output": None}
        return (states, None) if return_pooled else states

    def encode_from_tokens_scheduled(self, tokens: dict[str, list], unprojected=False, add_dict=None, show_pbar=True):
        """The core's conditioning: one entry of text states."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def clone(self, disable_dynamic: bool = False) -> "ClipHandle":
        """Another handle of the same encoder; it has no state to keep apart."""
        return self


class VaeHandle:
    """The checkpoint's VAE, answering what core nodes ask of a ``VAE``. Works in this process.

    Args:
        model: the description that also the transformer has.
    """

    latent_channels = 16
    latent_dim = 3

    def __init__(self, model: Model):
        self.model = model

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the VAE is of."""
        return Checkpoint.open(self.model.path)

    def decode(self, samples: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Latent to ``[batch, frames, height, width, 3]`` in 0..1; in tiles where the whole would not fit."""
        return host.decode(DecodeJob(self.model, samples))

    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None) -> torch.Tensor:
        """As :meth:`decode`, in tiles; sizes in latent units. Frames are never cut: they are decoded a few at a time."""
        tile = SPATIAL * (tile_x or 32)
        return host.decode(
            DecodeJob(self.model, samples, "on", tile, min(SPATIAL * (8 if overlap is None else overlap), tile // 2))
        )

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """``[frames, height, width, 3]`` to a latent, cropped to what the VAE takes."""
        return host.encode(EncodeJob(self.model, fitting(pixel_samples)))

    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """As :meth:`encode`, in tiles; sizes in pixels."""
        tile = tile_x or 256
        return host.encode(
            EncodeJob(self.model, fitting(pixel_samples), "on", tile, min(64 if overlap is None else overlap, tile // 2))
        )

    def spacial_compression_decode(self) -> int:
        """Pixels of one latent column."""
        return SPATIAL

    def spacial_compression_encode(self) -> int:
        """Pixels of one latent column."""
        return SPATIAL

    def temporal_compression_decode(self) -> int:
        """Frames of one latent frame."""
        return TEMPORAL

    def throw_exception_if_invalid(self) -> None:
        """Nothing to say: the checkpoint was checked when it was loaded."""


def fitting(pixels: torch.Tensor) -> torch.Tensor:
    """The middle of a video whose size is a multiple of 16, and its first 4k+1 frames; says so when it crops."""
    frames, height, width = pixels.shape[0], pixels.shape[1], pixels.shape[2]
    if min(height, width) < 16:
        raise RequestError(f"the video is {width}x{height}; it must be at least 16x16")
    kept, rows, columns = (frames - 1) // 4 * 4 + 1, height // 16 * 16, width // 16 * 16
    if (kept, rows, columns) != (frames, height, width):
        line = f"the video of {frames} frames {width}x{height} is cropped to {kept} frames {columns}x{rows}"
        host.say(line, level=logging.WARNING)
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[:kept, top : top + rows, left : left + columns, :3]
