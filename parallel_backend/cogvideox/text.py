"""Prompt to text states: the checkpoint's own T5, padded or cut to its token limit, on a GPU that has room or on the CPU."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ..costs import HEADROOM
from . import memory
from .checkpoint import Checkpoint
from .stopping import GoOn, always, check

logger = logging.getLogger(__name__)

WORKING_BYTES = 2**28
"""Beside the weights, for one prompt: T5-XXL's hidden features of 226 tokens and its scores of 64 heads, several times; counted."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where text is encoded."""

    device: torch.device
    dtype: torch.dtype
    alongside: bool
    """Whether there is room for the transformer meanwhile."""
    note: str | None = None
    """A line for the person whose GPUs have no room for it."""


def find_place(checkpoint: Checkpoint, devices: Sequence[torch.device], dtype: str, *, beside: int | None = None) -> Place:
    """The GPU with most room, where the encoder fits beside what is there; else the CPU.

    Args:
        checkpoint: with a text encoder.
        devices: that may be used.
        dtype: as :class:`parallel_backend.jobs.Model` has it.
        beside: bytes that the transformer will need on each device, or None where it is not to be loaded meanwhile.
    """

    def needs(device: torch.device) -> int:
        return checkpoint.weight_bytes("text_encoder", checkpoint.dtype(dtype, device)) + WORKING_BYTES

    room = {device: int(memory.free_bytes(device) * HEADROOM) for device in devices if device.type != "cpu"}
    if room:
        device = max(room, key=room.get)
        need, found = needs(device), checkpoint.dtype(dtype, device)
        if need <= room[device]:
            return Place(device, found, alongside=beside is not None and need + beside <= room[device])
        note = f"the text is encoded on the CPU: that needs {need / 2**30:.1f} GiB and {device} can give {room[device] / 2**30:.1f}"
        return Place(CPU, on_cpu(checkpoint, dtype, device), alongside=beside is not None, note=note)
    left = psutil.virtual_memory().available * HEADROOM - needs(CPU)
    return Place(CPU, on_cpu(checkpoint, dtype, CPU), alongside=beside is not None and beside * len(devices) <= left)


def on_cpu(checkpoint: Checkpoint, dtype: str, device: torch.device) -> torch.dtype:
    """What to encode in on the CPU: ``auto`` is float32 where memory allows, else what a device would."""
    found = checkpoint.dtype(dtype, CPU)
    fits = checkpoint.weight_bytes("text_encoder", found) <= psutil.virtual_memory().available * HEADROOM
    return found if fits else checkpoint.dtype(dtype, device)


class TextEncoder:
    """T5 and its tokenizer, loaded at the first prompt.

    Args:
        checkpoint: with a text encoder.
        device: where to encode; the weights go back to the CPU with :meth:`unload`. Where it runs out of memory, the CPU
            does it, and a warning says so.
        dtype: of the weights and of the result.
    """

    go_on: GoOn = staticmethod(always)
    """Asked before each block of the encoder whether the text is still wanted."""

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
        self.read()
        try:
            return self._encode(token_ids)
        except torch.OutOfMemoryError:
            logger.warning("the text is encoded on the CPU: %s ran out of memory", self.device)
            self.unload()
            self.device = CPU
            return self._encode(token_ids)

    @memory.one_kind_of_error()
    def _encode(self, token_ids: list[list[int]]) -> torch.Tensor:
        self._encoder.to(self.device)
        states = self._encoder(torch.tensor(token_ids, device=self.device))[0]
        return states.to(device="cpu", dtype=self.dtype)

    def read(self) -> None:
        """Reads the weights, if they are not there. Changes torch's defaults meanwhile, so no other thread may make a model."""
        if self._encoder is None:
            check(self.go_on, "the text was encoded")
            self._encoder = self.checkpoint.load_text_encoder(self.dtype)
            for block in self._encoder.encoder.block:
                block.register_forward_pre_hook(lambda *_: check(self.go_on, "the text was encoded"))

    def move(self, place: Place) -> None:
        """Encodes there from now on; in another dtype the weights are read again."""
        if place.dtype != self.dtype:
            self._encoder = None
        self.device, self.dtype = place.device, place.dtype

    def unload(self) -> None:
        """Moves the weights back to the CPU."""
        if self._encoder is not None:
            self._encoder.to("cpu")
            memory.release(self.device)  # a group on the same GPU must see it as free
