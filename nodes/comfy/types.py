"""What passes between nodes: the pack's own sockets, and the objects under the core's ``CLIP`` and ``VAE``."""

import logging
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from comfy_api.latest import io

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.checkpoint.facts import SPATIAL, TEMPORAL
from ...parallel_backend.cogvideox.pipeline.text import WORKING_BYTES, TextEncoder, find_place
from ...parallel_backend.errors import RequestError
from ...parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob
from ...parallel_backend.media.pictures import checked_latent, checked_pictures
from ...parallel_backend.model import Model, Windows
from . import runtime

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


class NotHere(RequestError, AttributeError):
    """An attribute of the core's ``CLIP`` or ``VAE`` that this pack's has not. ``hasattr`` is False for it."""


class Handle:
    """Refuses in one sentence what a core object has and this pack's has not."""

    kind: str
    """The core's name of it."""
    loader: str
    """The core's node that gives the core's own."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # Python asks for these, not a node
            raise AttributeError(name)
        raise NotHere(
            f"this node needs '{name}', which the {self.kind} of Load CogVideoX does not have; use the core's {self.loader} here"
        )


class Placement(Handle):
    """Where a model runs, as the core's Select CLIP Device and Select VAE Device read and set it on a model patcher."""

    def __init__(self, of: Handle, device: torch.device):
        self.kind, self.loader = of.kind, of.loader
        self.load_device, self.offload_device = device, torch.device("cpu")
        self.model = SimpleNamespace()
        """The core's nodes note here where it ran at first."""

    def is_dynamic(self) -> bool:
        """No part of the model is loaded on demand."""
        return False

    def clone(self, disable_dynamic: bool = False) -> "Placement":
        """Returns another that can be set apart."""
        return copy(self)

    def deepclone_multigpu(self, new_load_device: torch.device) -> "Placement":
        """Returns another for a device."""
        clone = self.clone()
        clone.load_device = new_load_device
        return clone


class Tokens(dict):
    """Tokens by the name of their text encoder, of which CogVideoX has one."""

    def __missing__(self, name: str):
        raise RequestError(
            f"this node needs a text encoder '{name}', and CogVideoX has T5-XXL alone; use CLIP Text Encode (Prompt) instead"
        )


T5 = "t5xxl"
"""The core's name of CogVideoX's text encoder."""


class ClipHandle(Handle):
    """The checkpoint's text encoder, answering what core nodes ask of a ``CLIP``.

    Args:
        checkpoint: whose text encoder it is; read at the first prompt.
        dtype: of the weights; see :class:`parallel_backend.jobs.Model`.
    """

    kind, loader = "CLIP", "CLIPLoader (type cogvideox)"

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self.checkpoint = checkpoint
        self.patcher = Placement(self, runtime.text_device())
        self._dtype = dtype
        self._shared: dict[str, TextEncoder] = {}
        """Read once for this and its clones."""

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder.

        Raises:
            RequestError: when the checkpoint has none, saying what to use.
        """
        if T5 not in self._shared:
            device = self.patcher.load_device
            dtype = self.checkpoint.dtype(self._dtype, device)
            say = partial(runtime.say, level=logging.WARNING)
            self._shared[T5] = TextEncoder(self.checkpoint, device=device, dtype=dtype, say=say)
            self._shared[T5].go_on = runtime.is_wanted
        return self._shared[T5]

    def _find_room(self) -> None:
        """Has ComfyUI make room where the text encoder is to run; where that does not suffice, the CPU encodes."""
        wanted = self.patcher.load_device
        dtype = self.checkpoint.dtype(self._dtype, wanted)
        runtime.make_room(self.checkpoint.weight_bytes("text_encoder", dtype) + WORKING_BYTES, wanted)
        place = find_place(self.checkpoint, [wanted], self._dtype)
        if place.note:
            runtime.say(place.note, level=logging.WARNING)
        self.encoder.move(place)

    def tokenize(self, text: str, return_word_ids: bool = False, **others: Any) -> dict[str, list]:
        """Token ids of a prompt and their weights, padded or cut to the model's limit."""
        if unused := [name for name, value in others.items() if isinstance(value, str | list) and value]:
            runtime.say(f"not used: {', '.join(unused)}; CogVideoX reads the prompt alone", level=logging.WARNING)
        return Tokens({T5: [self.encoder.weigh(text)]})

    def encode_from_tokens(self, tokens: dict[str, list], return_pooled: bool = False, return_dict: bool = False):
        """Text states ``[1, tokens, features]``; CogVideoX has no pooled output."""
        self._find_room()
        prompts = tokens[T5] or self.tokenize("")[T5]  # CLIP Text Encode (SD3) passes none for an empty prompt
        try:
            ids, weights = ([[pair[part] for pair in prompt] for prompt in prompts] for part in (0, 1))
            with runtime.interruptible():
                states = self.encoder.encode(ids, weights)
        finally:
            self.encoder.unload()  # the transformer, here or in the group, wants the room
        if return_dict:
            return {"cond": states, "pooled_output": None}
        return (states, None) if return_pooled else states

    def encode_from_tokens_scheduled(self, tokens: dict[str, list], unprojected=False, add_dict=None, show_pbar=True):
        """The core's conditioning: one entry of text states."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def encode(self, text: str) -> torch.Tensor:
        """Text states of a prompt."""
        return self.encode_from_tokens(self.tokenize(text))

    def clone(self, disable_dynamic: bool = False) -> "ClipHandle":
        """Returns another handle of the same encoder, whose device is set apart."""
        clone = copy(self)
        clone.patcher = self.patcher.clone()
        return clone

    def clip_layer(self, layer: int) -> None:
        """Takes the last layer alone.

        Raises:
            RequestError: for another.
        """
        if layer != -1:
            raise RequestError(f"stop_at_clip_layer is {layer}; CogVideoX was trained on the text encoder's last layer: use -1")

    def set_tokenizer_option(self, name: str, value: int) -> None:
        """Says that an option is not used: CogVideoX pads every prompt alike."""
        if value and name.startswith(T5):
            line = f"{name} is not used: every prompt has {self.checkpoint.text_tokens} tokens with CogVideoX"
            runtime.say(line, level=logging.WARNING)


class VaeHandle(Handle):
    """The checkpoint's VAE, answering what core nodes ask of a ``VAE``. Works in this process.

    Args:
        model: the description that also the transformer has.
    """

    kind, loader = "VAE", "VAELoader"
    latent_channels = 16
    latent_dim = 3

    def __init__(self, model: Model):
        self.model = model
        self.device = runtime.torch_device()
        self.patcher = Placement(self, self.device)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the VAE is of."""
        return Checkpoint.open(self.model.path)

    def decode(self, samples: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Latent to ``[batch, frames, height, width, 3]`` in 0..1; in tiles where the whole would not fit."""
        return self._run(DecodeJob(self.model, checked_latent(samples, "samples")))

    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None) -> torch.Tensor:
        """As :meth:`decode`, in tiles; sizes in latent units. Frames are never cut: they are decoded a few at a time."""
        tile = SPATIAL * (tile_x or 32)
        overlap = min(SPATIAL * (8 if overlap is None else overlap), tile // 2)
        return self._run(DecodeJob(self.model, checked_latent(samples, "samples"), "on", tile, overlap))

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """``[frames, height, width, 3]``, or a batch of these, to a latent, cropped to what the VAE takes."""
        return self._encode(pixel_samples)

    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """As :meth:`encode`, in tiles; sizes in pixels."""
        tile = tile_x or 256
        return self._encode(pixel_samples, tiling="on", tile=tile, overlap=min(64 if overlap is None else overlap, tile // 2))

    def _encode(self, pixels: torch.Tensor, **tiles: Any) -> torch.Tensor:
        batch = pixels if isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and len(pixels) else [pixels]
        videos = [fitting(checked_pictures(video, "pixels")) for video in batch]
        return torch.cat([self._run(EncodeJob(self.model, video, **tiles)) for video in videos])

    def _run(self, job: DecodeJob | EncodeJob) -> torch.Tensor:
        return runtime.run(job, device=self.device).tensor

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
        runtime.say(line, level=logging.WARNING)
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[:kept, top : top + rows, left : left + columns]
