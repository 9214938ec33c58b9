"""The ``CLIP`` of Load CogVideoX: the checkpoint's text encoder behind the core's interface."""

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
    """Tokens by the name of their text encoder. CogVideoX has only one."""

    def __missing__(self, name: str):
        raise RequestError(
            f"this node needs a text encoder '{name}', but CogVideoX has only T5-XXL; use CLIP Text Encode (Prompt) instead"
        )


T5 = "t5xxl"
"""The core's name for CogVideoX's text encoder."""


class ClipHandle(Handle):
    """The checkpoint's text encoder with the interface of the core's ``CLIP``.

    Args:
        checkpoint: holds the text encoder, which is read at the first prompt.
        dtype: of the weights; see :class:`parallel_backend.model.Model`.
    """

    kind, loader = "CLIP", "CLIPLoader (type cogvideox)"

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self.checkpoint = checkpoint
        self.patcher = Placement(self, runtime.text_device())
        self._dtype = dtype
        self._shared: dict[str, TextEncoder] = {}
        """Shared with the clones, so that the encoder is read once."""

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, created on first use.

        Raises:
            RequestError: if the checkpoint has none. The message says what to use instead.
        """
        if T5 not in self._shared:
            device = self.patcher.load_device
            dtype = self.checkpoint.dtype(self._dtype, device)
            say = partial(runtime.say, level=logging.WARNING)
            self._shared[T5] = TextEncoder(self.checkpoint, device=device, dtype=dtype, say=say)
            self._shared[T5].go_on = runtime.is_wanted
        return self._shared[T5]

    def _find_room(self) -> None:
        """Frees memory for the text encoder and moves it to its device, or to the CPU if the memory does not suffice."""
        wanted = self.patcher.load_device
        dtype = self.checkpoint.dtype(self._dtype, wanted)
        runtime.make_room(self.checkpoint.weight_bytes("text_encoder", dtype) + WORKING_BYTES, wanted)
        place = find_place(self.checkpoint, [wanted], self._dtype)
        if place.note:
            runtime.say(place.note, level=logging.WARNING)
        self.encoder.move(place)

    def tokenize(self, text: str, return_word_ids: bool = False, **others: Any) -> dict[str, list]:
        """Returns the token ids of a prompt and their weights, padded or cut to the model's limit."""
        if unused := [name for name, value in others.items() if isinstance(value, str | list) and value]:
            runtime.say(f"not used: {', '.join(unused)}; CogVideoX uses only the prompt", level=logging.WARNING)
        return Tokens({T5: [self.encoder.weigh(text)]})

    def encode_from_tokens(self, tokens: dict[str, list], return_pooled: bool = False, return_dict: bool = False):
        """Encodes tokens to text states ``[1, tokens, features]``. CogVideoX has no pooled output."""
        self._find_room()
        prompts = tokens[T5] or self.tokenize("")[T5]  # CLIP Text Encode (SD3) passes none for an empty prompt
        try:
            ids, weights = ([[pair[part] for pair in prompt] for prompt in prompts] for part in (0, 1))
            with runtime.interruptible():
                states = self.encoder.encode(ids, weights)
        finally:
            self.encoder.unload()  # the transformer needs the memory, in this process or in the group
        if return_dict:
            return {"cond": states, "pooled_output": None}
        return (states, None) if return_pooled else states

    def encode_from_tokens_scheduled(self, tokens: dict[str, list], unprojected=False, add_dict=None, show_pbar=True):
        """Encodes tokens to the core's conditioning: one entry with the text states."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def encode(self, text: str) -> torch.Tensor:
        """Encodes a prompt to text states ``[1, tokens, features]``."""
        return self.encode_from_tokens(self.tokenize(text))

    def clone(self, disable_dynamic: bool = False) -> "ClipHandle":
        """Returns a handle of the same encoder whose device can be set separately."""
        clone = copy(self)
        clone.patcher = self.patcher.clone()
        return clone

    def clip_layer(self, layer: int) -> None:
        """Accepts only the last layer.

        Raises:
            RequestError: for another layer.
        """
        if layer != -1:
            raise RequestError(f"stop_at_clip_layer is {layer}; CogVideoX was trained on the text encoder's last layer: use -1")

    def set_tokenizer_option(self, name: str, value: int) -> None:
        """Warns that an option has no effect: CogVideoX pads every prompt to the same length."""
        if value and name.startswith(T5):
            line = f"{name} is not used: every prompt has {self.checkpoint.text_tokens} tokens with CogVideoX"
            runtime.say(line, level=logging.WARNING)
