"""The object under the core's ``CLIP``."""

import logging
from copy import copy
from functools import partial
from typing import Any

import torch

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.pipeline.text import WORKING_BYTES, TextEncoder, find_place
from ...parallel_backend.errors import RequestError
from . import runtime
from .handle import Handle, Placement


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
