"""Sequence parallelism: hooks make the blocks of a transformer process one rank's share of the tokens.

The joint sequence, text first, is cut into equal contiguous chunks, so any size works with any degree. The last chunk is
padded, and attention ignores the padding's keys. Everything before the first block and after the last is diffusers' own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..cogvideox.attention import choice
from ..cogvideox.attention.function import AttentionFunction
from ..cogvideox.transformer import block
from ..cogvideox.transformer.step_cache import StepCache
from .ring import RingAttention
from .ulysses import CopyingUlyssesAttention, UlyssesAttention


@dataclass(frozen=True)
class Chunk:
    """One rank's part of a joint sequence of ``text + video`` tokens in ``size`` equal chunks."""

    text: int
    video: int
    rank: int = 0
    size: int = 1

    @property
    def length(self) -> int:
        """Tokens per chunk."""
        return -(-(self.text + self.video) // self.size)

    @property
    def padding(self) -> int:
        """Padding tokens at the end of the last chunk."""
        return self.length * self.size - self.text - self.video

    @property
    def local_text(self) -> int:
        """Text tokens in this rank's chunk."""
        return min(max(self.text - self.rank * self.length, 0), self.length)

    @property
    def real(self) -> int:
        """Tokens in this rank's chunk that are not padding."""
        return min(max(self.text + self.video - self.rank * self.length, 0), self.length)

    def of_joint(self, joint: torch.Tensor) -> torch.Tensor:
        """Returns a copy of this rank's chunk of ``[batch, text + video, features]``, padded with zeros."""
        part = joint[:, self.rank * self.length :][:, : self.length]
        return F.pad(part, (0, 0, 0, self.length - part.shape[1])).contiguous()

    def of_rotary(self, cosines: torch.Tensor, sines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows of tables ``[video, features]`` for this rank's tokens; angle 0 for text."""
        joint = F.pad(cosines, (0, 0, self.text, 0), value=1.0), F.pad(sines, (0, 0, self.text, 0))
        return tuple(self.of_joint(table[None])[0] for table in joint)


class SequenceSplit:
    """How ranks share the tokens of a forward pass.

    Args:
        heads: of this rank's transformer.
        group: xDiT's group coordinator; None if this rank has all tokens.
        ulysses, ring: degrees of the group.
        device: of this rank, if ranks write into each other's memory (:mod:`.symmetric_memory`); else None.
    """

    def __init__(self, heads: int, *, group=None, ulysses: int = 1, ring: int = 1, device=None):
        self.group = group
        self.rank, self.size = (group.rank_in_group, group.world_size) if group else (0, 1)
        self.ulysses, self.ring = ulysses, ring
        self.shared: UlyssesAttention | RingAttention | None = None
        if ring > 1:
            self.shared = RingAttention(ring=ring, rank=self.rank // ulysses)
        elif group and device:
            each = heads // self.size
            self.shared = CopyingUlyssesAttention(group.device_group, device, rank=self.rank, size=self.size, heads=each)
        elif group:
            self.shared = UlyssesAttention(group.device_group, rank=self.rank, size=self.size)


def heads_of(transformer) -> int:
    """Returns the attention heads of this rank's transformer."""
    return transformer.transformer_blocks[0].attn1.heads


class JointSequence:
    """Attaches to one transformer, whose forward then takes and returns full tensors on every rank.

    Args:
        transformer: diffusers' ``CogVideoXTransformer3DModel``.
        split: of the tokens; None if this rank has all.
        join: makes the split of steps that spare a half of guidance; None if that is no other one.
    """

    def __init__(self, transformer, split: SequenceSplit | None = None, *, join: Callable[[], SequenceSplit] | None = None):
        self.config = transformer.config
        self.own = self.split = split or SequenceSplit(heads_of(transformer))
        self.join, self.joined = join, None
        self.chunk: Chunk | None = None
        block.attach(transformer)
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        for own_block in transformer.transformer_blocks:
            own_block.register_forward_hook(self._add_controls, with_kwargs=True)
        transformer.transformer_blocks[0].register_forward_pre_hook(self._scatter, with_kwargs=True)
        transformer.transformer_blocks[0].register_forward_hook(self._after_first, with_kwargs=True)
        transformer.transformer_blocks[-1].register_forward_hook(self._after_last, with_kwargs=True)
        transformer.proj_out.register_forward_hook(self._gather)

    def _split_of(self, *, spared: bool) -> SequenceSplit:
        """Returns the split of a forward pass. The first one that spares a half of guidance makes the split for these."""
        if not spared or self.join is None:
            return self.own
        self.joined = self.joined or self.join()
        return self.joined

    def _begin(self, module, args, kwargs):
        """Determines this rank's chunk and replaces the blocks' arguments.

        A forward's ``attention_kwargs`` have ``attention``, the function, ``cache``, a
        :class:`parallel_backend.cogvideox.transformer.step_cache.StepCache` or None, ``spared``, whether a half of guidance is
        spared, and ``controls``, a :class:`parallel_backend.cogvideox.transformer.controlnet.Control` for each ControlNet that is on.
        """
        _, frames, _, height, width = kwargs["hidden_states"].shape
        patch = self.config.patch_size
        video = frames // (self.config.patch_size_t or 1) * (height // patch) * (width // patch)
        self.split = split = self._split_of(spared=kwargs["attention_kwargs"]["spared"])
        self.chunk = Chunk(kwargs["encoder_hidden_states"].shape[1], video, split.rank, split.size)
        if split.ring > 1 and self.chunk.padding >= self.chunk.length * split.ulysses:
            raise ValueError(f"{self.chunk.text + video} tokens are too few for {split.size} ranks")
        rotary = kwargs.get("image_rotary_emb")
        cache: StepCache | None = kwargs["attention_kwargs"]["cache"]
        if cache is not None:
            cache.begin()
        inputs = {"latents": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"], "timestep": kwargs["timestep"]}
        controls = [control.begin(self.chunk.of_joint, **inputs) for control in kwargs["attention_kwargs"]["controls"]]
        about = {"text": self.chunk.local_text, "cache": cache, "controls": controls}
        rows = None if rotary is None else self.chunk.of_rotary(*rotary)
        kernels = module.transformer_blocks[0].kernels
        about |= self._attention(kwargs["attention_kwargs"]["attention"], kwargs["hidden_states"], kernels)
        return args, {**kwargs, "image_rotary_emb": rows, "attention_kwargs": about}

    def _attention(self, function: AttentionFunction, latents: torch.Tensor, kernels) -> dict[str, Any]:
        """Returns the arguments for attention of :func:`parallel_backend.cogvideox.transformer.block.forward`."""
        choice.begin(function, latents.device)
        scores = {"base_two": function.base_two, "fp8": function.fp8}
        shared = self.split.shared
        if self.split.ring > 1:  # keys and values are sent in 16 bits and converted to FP8 on arrival
            shared.begin(function, padding=self.chunk.padding)
            return {**scores, "attend": shared.attend, "parts": 1, "fp8": False}
        if shared is None:
            return {**scores, "attend": partial(choice.alone, function.attend), "parts": 1}
        parts = shared.begin(function, batch=len(latents), padding=self.chunk.padding, kernels=kernels)
        early = {"own": shared.own, "send": shared.send} if isinstance(shared, CopyingUlyssesAttention) else {}
        return {**scores, "attend": shared.attend, "parts": parts, **early}

    def _scatter(self, module, args, kwargs):
        """Replaces the first block's input with this rank's chunk of the joint tokens."""
        joint = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1)
        chunk = self.chunk.of_joint(joint)
        none = chunk.new_empty(len(chunk), 0, chunk.shape[2])
        return args, {**kwargs, "encoder_hidden_states": none, "hidden_states": chunk}

    def _add_controls(self, module, args, kwargs, output):
        """Adds to a block's output what ControlNets add; not where the block was skipped."""
        about = kwargs["attention_kwargs"]
        if about["cache"] is None or not about["cache"].reusing:
            for control in about["controls"]:
                control.add_to(output[0], kwargs["image_rotary_emb"], about)

    def _after_first(self, module, args, kwargs, output):
        """Lets the step cache decide whether the other blocks run."""
        cache: StepCache | None = kwargs["attention_kwargs"]["cache"]
        if cache is not None:
            cache.after_first(kwargs["hidden_states"], output[0], self.chunk.real)

    def _after_last(self, module, args, kwargs, output):
        """Applies the step cache to the output."""
        cache: StepCache | None = kwargs["attention_kwargs"]["cache"]
        return output if cache is None else (cache.after_last(output[0]), *output[1:])

    def _gather(self, module, args, output):
        """Gathers the output rows of all ranks; drops text and padding."""
        group = self.split.group
        joint = group.all_gather(output.contiguous(), dim=1) if group else output
        return joint[:, self.chunk.text :][:, : self.chunk.video]
