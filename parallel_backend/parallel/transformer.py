"""A CogVideoX transformer whose blocks see one rank's share of the tokens, by hooks alone.

The joint sequence, text first, is cut into equal contiguous chunks, so any size goes with any degree;
what is missing to the last chunk is padding whose keys attention leaves out. Everything before the first
block and after the last is diffusers' own, unchanged.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention import SequenceAttention


@dataclass(frozen=True)
class Chunk:
    """One rank's part of a joint sequence of ``text + video`` tokens in ``size`` equal chunks."""

    text: int
    video: int
    rank: int
    size: int

    @property
    def length(self) -> int:
        """Tokens in every chunk."""
        return -(-(self.text + self.video) // self.size)

    @property
    def padding(self) -> int:
        """Tokens of padding at the end of the last chunk."""
        return self.length * self.size - self.text - self.video

    @property
    def local_text(self) -> int:
        """Text tokens in this rank's chunk."""
        return min(max(self.text - self.rank * self.length, 0), self.length)

    def of_joint(self, joint: torch.Tensor) -> torch.Tensor:
        """This rank's chunk of ``[batch, text + video, features]``, padded with zeros."""
        padded = F.pad(joint, (0, 0, 0, self.padding))
        return padded[:, self.rank * self.length :][:, : self.length]

    def of_video(self, table: torch.Tensor) -> torch.Tensor:
        """The rows of ``[video, features]`` for this rank's video tokens, padded with zeros."""
        padded = F.pad(table, (0, 0, 0, self.padding))
        start = max(self.rank * self.length - self.text, 0)
        return padded[start : start + self.length - self.local_text]


class SequenceShare:
    """Attaches to one transformer; afterwards its forward takes and gives whole tensors, on every rank.

    Args:
        transformer: diffusers' ``CogVideoXTransformer3DModel``.
        group: xDiT's sequence group coordinator.
        ulysses, ring: its degrees.
    """

    def __init__(self, transformer, *, group, ulysses: int, ring: int):
        self.group = group
        self.config = transformer.config
        self.rank = group.rank_in_group
        self.attention = SequenceAttention(ulysses=ulysses, ring=ring, ring_rank=self.rank // ulysses)
        self.ulysses, self.ring = ulysses, ring
        self.chunk: Chunk | None = None
        transformer.set_attn_processor(self.attention)
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        transformer.transformer_blocks[0].register_forward_pre_hook(self._scatter, with_kwargs=True)
        transformer.proj_out.register_forward_hook(self._gather)

    def _begin(self, module, args, kwargs):
        """Measures the sequence and hands on this rank's rows of the rotary tables."""
        _, frames, _, height, width = kwargs["hidden_states"].shape
        patch = self.config.patch_size
        video = frames // (self.config.patch_size_t or 1) * (height // patch) * (width // patch)
        self.chunk = Chunk(kwargs["encoder_hidden_states"].shape[1], video, self.rank, self.group.world_size)
        self.attention.padding = self.chunk.padding
        if self.ring > 1 and self.chunk.padding >= self.chunk.length * self.ulysses:
            raise ValueError(f"{self.chunk.text + video} tokens are too few for {self.group.world_size} ranks")
        if kwargs.get("image_rotary_emb") is not None:
            rows = tuple(self.chunk.of_video(table) for table in kwargs["image_rotary_emb"])
            kwargs = {**kwargs, "image_rotary_emb": rows}
        return args, kwargs

    def _scatter(self, module, args, kwargs):
        """Gives the first block this rank's chunk; a rank past the text gets zero text tokens."""
        joint = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1)
        text, video = self.chunk.of_joint(joint).tensor_split([self.chunk.local_text], dim=1)
        return args, {**kwargs, "encoder_hidden_states": text, "hidden_states": video}

    def _gather(self, module, args, output):
        """Joins every rank's output rows, text and padding dropped."""
        chunk = self.chunk
        rows = F.pad(output, (0, 0, chunk.local_text, 0)).contiguous()
        joint = self.group.all_gather(rows, dim=1)
        return joint[:, chunk.text : chunk.text + chunk.video]
