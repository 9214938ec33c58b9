"""PipeFusion: ranks hold consecutive blocks as pipeline stages, and pass the tokens on in patches.

The idea is xDiT's (arXiv 2405.14430): neighbouring steps are similar, so a patch may attend to keys and values of the previous
step. During warm-up, a step sends the full sequence through one stage after the other. It is exact, and each block's keys and
values are kept. After warm-up all stages work at the same time, each on another patch. The patch's keys and values replace the
kept ones, which are of this step for earlier patches and of the previous step for later ones.

Everything before the first block and after the last is diffusers' own, and runs on every rank: it is small.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..cogvideox.attention import choice
from ..cogvideox.attention.function import AttentionFunction
from ..cogvideox.attention.torch_attention import Attention
from ..cogvideox.transformer import block
from ..notes import Information
from ..planner.work import patches
from .sequence import Chunk
from .ulysses import UlyssesAttention


class Kept:
    """The state that one window's forward passes share during a job.

    Args:
        warmup: number of exact forward passes at the start.
    """

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.forwards = 0
        self.states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Keys and values ``[batch, tokens, heads, head_dim]`` of the full sequence, for this rank's heads, by block number."""

    @property
    def is_warming_up(self) -> bool:
        """Whether the next forward pass is an exact one."""
        return self.forwards < self.warmup

    @property
    def nbytes(self) -> int:
        """Bytes of all kept keys and values."""
        return sum(states.nbytes for pair in self.states.values() for states in pair)


class KeptOfJob:
    """The kept states of one job by window.

    It has the interface of :class:`parallel_backend.cogvideox.pipeline.caches.JobCaches`.

    Args:
        warmup: see :class:`Kept`.
    """

    restarted = "pipefusion warmed up again on the way"

    def __init__(self, warmup: int):
        self.warmup = warmup
        self._windows: dict[tuple[int, int], Kept] = {}

    def of(self, frames: slice, *, spared: bool = False) -> Kept:
        """Returns the state of the window with these frames."""
        return self._windows.setdefault((frames.start, frames.stop), Kept(self.warmup))

    def guidance(self, frames: slice) -> None:
        """Returns no guidance cache, as a pipeline refuses one."""

    def expire(self) -> None:
        """Does nothing when the prompt changes: text is in the first patch, whose keys and values are always current."""

    @property
    def notes(self) -> list[str]:
        """A note for the user: how many forward passes were inexact, and the memory used; none if all were exact."""
        windows = self._windows.values()
        late = sum(max(kept.forwards - kept.warmup, 0) for kept in windows)
        if not late:
            return []
        return [
            Information(
                f"pipefusion: {late} of {sum(kept.forwards for kept in windows)} forwards attended to keys and values of the step "
                f"before, of which a rank kept {sum(kept.nbytes for kept in windows) / 2**20:.0f} MiB: similar to the video of "
                "other plans, but not the same"
            )
        ]


class PatchAttention:
    """Attention from a patch to the full sequence, whose keys and values are kept. Its attributes are set before each call."""

    def __init__(self):
        self.whole: Attention | None = None
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.block = ""
        self.place, self.tokens = slice(0), 0
        """Position of the patch in the sequence without padding, and the length of the sequence."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See :data:`parallel_backend.cogvideox.attention.torch_attention.Attention`; keys and values may end in padding."""
        size = self.place.stop - self.place.start
        if size == self.tokens:  # no other patch writes to these, so they need no copy
            self.kept[self.block] = key[:, :size], value[:, :size]
        else:
            for everyone, own in zip(self.kept[self.block], (key, value)):
                everyone[:, self.place] = own[:, :size]
        return self.whole(query, *self.kept[self.block])

    def attend_alone(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same for one rank; see :func:`parallel_backend.cogvideox.attention.choice.alone`."""
        return choice.alone(self.attend, query, key, value)


class Pipe:
    """A rank's point-to-point communication in a pipeline, overlapped with computation.

    Args:
        group: xDiT's pipeline group coordinator.
    """

    def __init__(self, group):
        self.group = group
        self.stages, self.stage = group.world_size, group.rank_in_group
        self.is_first, self.is_last = group.is_first_rank, group.is_last_rank
        # Two ranks have a group per direction, so that neither waits for the other, as in xDiT.
        ways = group.device_groups if group.world_size == 2 else [group.device_group]
        self._forward, self._sent = ways[0], []
        self.is_under_way = False
        """Whether a forward pass is incomplete. If it fails then, tensors that were sent but not received would be taken for
        the next ones."""

    def blocks(self, layers: int) -> range:
        """Returns the block numbers of this stage. If ``layers`` is not divisible, the first stages have one more."""
        each, more = divmod(layers, self.stages)
        start = self.stage * each + min(self.stage, more)
        return range(start, start + each + (self.stage < more))

    def probe(self, tensor: torch.Tensor) -> None:
        """Sends a tensor through the pipeline and broadcasts it from the last stage."""
        if not self.is_first:
            (tensor,) = self.receive(tensor, 1)
        if not self.is_last:
            self.send(tensor)
        self.end()
        self.from_last(tensor)

    def send(self, tokens: torch.Tensor) -> None:
        """Sends tokens to the next stage, after waiting for the previous send."""
        if self._sent:
            self._sent.pop()[0].wait()
        tokens = tokens.contiguous()
        self._sent.append((dist.isend(tokens, self.group.next_rank, group=self._forward), tokens))

    def end(self) -> None:
        """Waits for pending sends."""
        while self._sent:
            self._sent.pop()[0].wait()

    def receive(self, like: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Yields ``count`` tensors from the previous stage; each is received while the one before it is processed."""
        coming = self._expect(like)
        for left in reversed(range(count)):
            transfer, tokens = coming
            transfer.wait()
            coming = self._expect(like) if left else None
            yield tokens

    def _expect(self, like: torch.Tensor) -> tuple[dist.Work, torch.Tensor]:
        tokens = torch.empty_like(like)
        return dist.irecv(tokens, self.group.prev_rank, group=self._forward), tokens

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """Broadcasts the last stage's tensor."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self.group.ranks[-1], group=self.group.device_group)
        return tensor


class Stage(torch.nn.Module):
    """This rank's blocks, with their original numbers, in place of all blocks. diffusers' forward sees one block.

    Args:
        transformer: diffusers' ``CogVideoXTransformer3DModel`` before its weights are read. The blocks of other ranks are
            removed.
        pipe: to the other stages.
        sequence: xDiT's sequence group coordinator, if ranks share each patch's tokens; else None.
    """

    def __init__(self, transformer, pipe: Pipe, sequence=None):
        super().__init__()
        self.pipe = pipe
        everyone = transformer.transformer_blocks
        for number in pipe.blocks(len(everyone)):
            self.add_module(str(number), everyone[number])
        self.sequence = sequence
        self.rank, self.size = (sequence.rank_in_group, sequence.world_size) if sequence else (0, 1)
        self.attention = PatchAttention()
        self.attend = self.attention.attend_alone
        if sequence:
            shared = UlyssesAttention(sequence.device_group, rank=self.rank, size=self.size)
            shared.whole, self.attend = self.attention.attend, shared.attend
        self._chunks: list[Chunk] = []
        transformer.transformer_blocks = self
        block.attach(transformer)
        transformer.proj_out.register_forward_hook(self._gather)

    def __iter__(self) -> Iterator["Stage"]:
        """Yields itself, as diffusers' forward iterates over the blocks."""
        yield self

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
        """Runs this rank's blocks, with the signature of a ``CogVideoXBlock``. Only the first stage uses the tokens.

        Args:
            hidden_states, encoder_hidden_states: video and text tokens ``[batch, tokens, features]``.
            temb, image_rotary_emb: as in diffusers, for all tokens.
            attention_kwargs: ``cache``: the window's :class:`Kept`; ``attention``: the function.
        Returns:
            On the last stage this rank's tokens, patch by patch, joint and padded; empty on the others. And no text tokens.
        """
        self.pipe.is_under_way = True
        kept: Kept = attention_kwargs["cache"]
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        count = 1 if kept.is_warming_up else patches(text + video, self.pipe.stages, self.size)
        self._chunks = [Chunk(text, video, self.rank + self.size * place, self.size * count) for place in range(count)]
        if self.pipe.is_first:
            joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            incoming = (chunk.of_joint(joint) for chunk in self._chunks)
        else:
            like = hidden_states.new_empty(len(hidden_states), self._chunks[0].length, hidden_states.shape[2])
            incoming = self.pipe.receive(like, count)
        function: AttentionFunction = attention_kwargs["attention"]
        choice.begin(function, hidden_states.device)
        self.attention.whole, scores = function.attend, {"base_two": function.base_two, "fp8": function.fp8}
        self.attention.kept, self.attention.tokens = kept.states, text + video
        made = []
        for place, (chunk, tokens) in enumerate(zip(self._chunks, incoming)):
            start = min(place * self.size * chunk.length, text + video)
            self.attention.place = slice(start, min(start + self.size * chunk.length, text + video))
            tokens = self._run(tokens, chunk, temb, image_rotary_emb, scores)
            made.append(tokens) if self.pipe.is_last else self.pipe.send(tokens)
        self.pipe.end()
        self.attention.kept = {}  # otherwise they would live as long as the weights
        kept.forwards += 1
        none = hidden_states.new_empty(len(hidden_states), 0, hidden_states.shape[2])
        return torch.cat(made, dim=1) if made else none, none

    def _run(self, tokens: torch.Tensor, chunk: Chunk, temb: torch.Tensor, tables, scores: dict[str, bool]) -> torch.Tensor:
        """Runs one patch through this rank's blocks."""
        rows = None if tables is None else chunk.of_rotary(*tables)
        about = {"cache": None, "text": chunk.local_text, "attend": self.attend, "parts": self.size, **scores}
        none = tokens.new_empty(len(tokens), 0, tokens.shape[2])
        for number, own_block in self.named_children():
            self.attention.block = number
            tokens, _ = own_block(
                hidden_states=tokens,
                encoder_hidden_states=none,
                temb=temb,
                image_rotary_emb=rows,
                attention_kwargs=about,
            )
        return tokens

    def _gather(self, module, args, output):
        """Gathers the last stage's output rows on all ranks; drops text and padding."""
        chunk, count = self._chunks[0], len(self._chunks)
        if not self.pipe.is_last:
            output = output.new_empty(len(output), count * chunk.length, output.shape[2])
        joint = self.pipe.from_last(output)
        if self.sequence:
            joint = self.sequence.all_gather(joint, dim=1)
            joint = joint.unflatten(1, (self.size, count, chunk.length)).transpose(1, 2).flatten(1, 3)
        self.pipe.is_under_way = False
        return joint[:, chunk.text :][:, : chunk.video]
