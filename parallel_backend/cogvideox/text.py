"""Prompt to text states: the checkpoint's own T5, padded or cut to its token limit."""

import logging

import torch

from . import memory
from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class TextEncoder:
    """T5 and its tokenizer, loaded at the first prompt.

    Args:
        checkpoint: with a text encoder.
        device: where to encode; the weights go back to the CPU with :meth:`unload`.
        dtype: of the weights and of the result.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype):
        checkpoint.check_text()
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self._tokenizer = None
        self._encoder = None

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids, exactly as many as the transformer takes; what is cut off is named in a warning."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.load_tokenizer()
        limit = self.checkpoint.text_tokens
        ids = self._tokenizer(prompt, truncation=False, add_special_tokens=True, verbose=False).input_ids
        if len(ids) > limit:
            lost = self._tokenizer.decode(ids[limit - 1 : -1])
            logger.warning("the prompt has %d tokens, %d are used; cut off: '%s'", len(ids), limit, lost)
            ids = ids[: limit - 1] + ids[-1:]
        return ids + [self._tokenizer.pad_token_id] * (limit - len(ids))

    @torch.inference_mode()
    def encode(self, token_ids: list[list[int]]) -> torch.Tensor:
        """Text states ``[prompts, tokens, features]`` on the CPU. No mask, as the model was trained."""
        if self._encoder is None:
            self._encoder = self.checkpoint.load_text_encoder(self.dtype)
        self._encoder.to(self.device)
        states = self._encoder(torch.tensor(token_ids, device=self.device))[0]
        return states.to(device="cpu", dtype=self.dtype)

    def unload(self) -> None:
        """Moves the weights back to the CPU."""
        if self._encoder is not None:
            self._encoder.to("cpu")
            memory.release(self.device)  # a group on the same GPU must see it as free

    @property
    def weight_bytes(self) -> int:
        """Bytes the encoder needs on its device."""
        return self.checkpoint.weight_bytes("text_encoder", self.dtype)
