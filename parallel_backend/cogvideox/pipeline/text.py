"""Encodes prompts with the checkpoint's own T5, on a GPU with enough free memory or on the CPU."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import proxy

import torch

from ...errors import readable
from ...planner.cost_model import HEADROOM
from ...system.limits import usable_memory
from .. import offload
from ..checkpoint import weights
from ..checkpoint.checkpoint import Checkpoint
from ..stopping import GoOn, always, check
from . import prompt_weights

logger = logging.getLogger(__name__)

WORKING_BYTES = 2**28
"""Activations for one prompt: T5-XXL's hidden features of 226 tokens and the scores of 64 heads, several times each."""
MOST_WORDS = 12
"""Words of a part of the prompt that are shown in a message."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EncoderPlace:
    """The device and dtype that text is encoded with."""

    device: torch.device
    dtype: torch.dtype
    alongside: bool
    """Whether the transformer fits into memory at the same time."""
    note: str | None = None
    """A note for the user if the encoder does not fit on any GPU."""


def find_place(
    checkpoint: Checkpoint, devices: Sequence[torch.device], dtype: str, *, transformer_bytes: int | None = None
) -> EncoderPlace:
    """Chooses the GPU with the most free memory if the encoder fits there, else the CPU.

    Args:
        checkpoint: must have a text encoder.
        devices: candidates.
        dtype: see :class:`parallel_backend.model.Model`.
        transformer_bytes: bytes that the transformer will need on each device; None if it is not loaded at the same time.
    """

    def needs(device: torch.device) -> int:
        return checkpoint.weight_bytes("text_encoder", checkpoint.dtype(dtype, device)) + WORKING_BYTES

    available = {device: int(offload.free_bytes(device) * HEADROOM) for device in devices if device.type != "cpu"}
    if available:
        device = max(available, key=available.get)
        need, found = needs(device), checkpoint.dtype(dtype, device)
        if need <= available[device]:
            return EncoderPlace(
                device, found, alongside=transformer_bytes is not None and need + transformer_bytes <= available[device]
            )
        gib, free = f"{need / 2**30:.1f} GiB", f"{available[device] / 2**30:.1f} GiB available"
        note = f"the text is encoded on the CPU: it needs {gib} and {device} has {free}"
        return EncoderPlace(CPU, on_cpu(checkpoint, dtype, device), alongside=transformer_bytes is not None, note=note)
    left = usable_memory() * HEADROOM - needs(CPU)
    return EncoderPlace(
        CPU,
        on_cpu(checkpoint, dtype, CPU),
        alongside=transformer_bytes is not None and transformer_bytes * len(devices) <= left,
    )


def on_cpu(checkpoint: Checkpoint, dtype: str, device: torch.device) -> torch.dtype:
    """Returns the encoder's dtype on the CPU: float32 for ``auto`` if it fits into memory, else what ``device`` would use."""
    found = checkpoint.dtype(dtype, CPU)
    fits = checkpoint.weight_bytes("text_encoder", found) <= usable_memory() * HEADROOM
    return found if fits else checkpoint.dtype(dtype, device)


def shortened(text: str) -> str:
    """Returns the first words of a long text, and how many follow."""
    words = text.split()
    more = len(words) - MOST_WORDS
    return text if more <= 0 else f"{' '.join(words[:MOST_WORDS])} … and {more} more words"


class TextEncoder:
    """T5 and its tokenizer. They are loaded at the first prompt, and again when their files change.

    If the device runs out of memory, the text is encoded on the CPU and a note is reported.

    Args:
        checkpoint: must have a text encoder.
        device: to encode on; :meth:`unload` moves the weights back to the CPU.
        dtype: of the weights and of the result.
        say: called with each note for the user: which part of a prompt is ignored, or that the CPU encodes it.
    """

    go_on: GoOn = staticmethod(always)
    """Called before each of the encoder's blocks; False cancels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        say: Callable[[str], None] = logger.warning,
    ):
        checkpoint.check_text()
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.say = say
        self._tokenizer = None
        self._encoder = None
        self._files: tuple = ()
        """Fingerprint of the files that tokenizer and encoder were read from."""

    def tokenize(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt, padded or truncated to the transformer's number of text tokens."""
        return [token for token, _ in self.weigh(prompt)]

    def weigh(self, prompt: str) -> list[tuple[int, float]]:
        """Returns token ids with their weights, padded or truncated to the transformer's number of text tokens.

        Parts of the prompt with different weights are tokenized separately, as ComfyUI does.
        """
        prompt = readable(prompt)
        self._forget_changed()
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.load_tokenizer()
        limit, found = self.checkpoint.text_tokens, []
        for text, weight in prompt_weights.parse(prompt):
            text, embeddings = prompt_weights.without_embeddings(text)
            for name in embeddings:
                self.say(f"{name} is not used: CogVideoX's text encoder takes no embeddings")
            ids = self._tokenizer(text, truncation=False, add_special_tokens=False, verbose=False).input_ids
            found += [(token, weight) for token in ids]
        if words := prompt_weights.foreign(prompt):
            self.say(f"{', '.join(words)} in the prompt has no special effect: it is read as plain words")
        if len(found) >= limit:
            lost = self._tokenizer.decode([token for token, _ in found[limit - 1 :]])
            self.say(f"the prompt has {len(found) + 1} tokens, {limit} are used; cut off: '{shortened(lost)}'")
        end, padding = (self._tokenizer.eos_token_id, 1.0), (self._tokenizer.pad_token_id, 1.0)
        found = [*found[: limit - 1], end]
        return found + [padding] * (limit - len(found))

    @torch.inference_mode()
    def encode(self, token_ids: list[list[int]], token_weights: list[list[float]] | None = None) -> torch.Tensor:
        """Encodes prompts to text states ``[prompts, tokens, features]`` on the CPU, without an attention mask, as in training.

        Args:
            token_ids: of each prompt.
            token_weights: of each token; None means 1. A weight scales the difference of a token's states from those of the
                empty prompt.
        """
        self.read()
        try:
            return self._encode(token_ids, token_weights)
        except torch.OutOfMemoryError:
            self.say(f"the text is encoded on the CPU: {self.device} ran out of memory")
            self.unload()
            self.device = CPU
            return self._encode(token_ids, token_weights)

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """Encodes a prompt to text states ``[1, tokens, features]``."""
        token_ids, token_weights = zip(*self.weigh(prompt))
        return self.encode([list(token_ids)], [list(token_weights)])

    @offload.one_kind_of_error()
    def _encode(self, token_ids: list[list[int]], token_weights: list[list[float]] | None) -> torch.Tensor:
        self._encoder.to(self.device)
        states = self._encoder(torch.tensor(token_ids, device=self.device))[0]
        scale = torch.tensor(token_weights or 1.0, device=self.device)
        if (scale != 1).any():
            empty = self._encoder(torch.tensor([self.tokenize("")], device=self.device))[0].float()
            weighted = empty + (states.float() - empty) * scale[..., None]
            states = torch.where(scale[..., None] == 1, states, weighted)
        return states.to(device="cpu", dtype=self.dtype)

    def read(self) -> None:
        """Reads the weights if they are not loaded.

        transformers changes torch's default dtype meanwhile, for all threads: whatever may run beside this names its dtype.
        """
        self._forget_changed()
        if self._encoder is None:
            check(self.go_on, "the text was encoded")
            self._encoder = self.checkpoint.load_text_encoder(self.dtype)
            own = proxy(self)  # the hooks would keep the weights until garbage is collected
            for block in self._encoder.encoder.block:
                block.register_forward_pre_hook(lambda *_: check(own.go_on, "the text was encoded"))

    def _forget_changed(self) -> None:
        """Drops tokenizer and encoder if their files have changed."""
        folders = [self.checkpoint.folder(part) for part in ("text_encoder", "tokenizer")]
        files = weights.fingerprint(path for folder in folders for path in sorted(folder.iterdir()) if path.is_file())
        if files != self._files:
            self._tokenizer = self._encoder = None
            self._files = files

    def move(self, place: EncoderPlace) -> None:
        """Changes device and dtype; with another dtype the weights are read again."""
        if place.dtype != self.dtype:
            self._encoder = None
        self.device, self.dtype = place.device, place.dtype

    def unload(self) -> None:
        """Moves the weights back to the CPU."""
        if self._encoder is not None:
            self._encoder.to("cpu")
            offload.empty_caches(self.device)  # a group on the same GPU must see it as free
