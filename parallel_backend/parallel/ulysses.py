"""Ulysses attention over a sequence that is sharded over ranks: an all-to-all before attention, and one after it."""

from itertools import product

import torch
import torch.distributed as dist

from ..cogvideox.attention.function import KEY, QUERY, VALUE
from ..cogvideox.attention.torch_attention import Attention
from . import symmetric_memory

ARRIVALS, RESULTS = 0, 1
"""Kinds of signals: for queries, keys and values, and for results."""


class UlyssesAttention:
    """Attention in which each rank computes some of the heads for all tokens.

    xfuser's USP does the same but copies tokens five times (benchmarks/NOTES.md). Here the block writes the layout to send, the
    layout received is the one that attention reads, and each all-to-all is one batched operation.

    Args:
        group: process group, ranked in the order of the chunks.
        rank, size: of this process in the group, and of the group.
    """

    def __init__(self, group, *, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size
        self.numbers = dist.get_process_group_ranks(group)
        """Global ranks of the group's processes."""
        self.whole: Attention | None = None
        self.padding = 0

    def begin(self, whole: Attention, *, batch: int, padding: int) -> int:
        """Prepares a forward pass.

        Args:
            whole: attention on one rank.
            batch: prompts times videos.
            padding: padding tokens at the end of the full sequence.
        Returns:
            Number of parts that heads must be laid out in: ranks times the parts per rank.
        """
        self.whole, self.padding = whole, padding
        return self.size

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Computes attention from this rank's tokens to all tokens.

        Args:
            query, key, value: ``[batch, parts, tokens, heads, head_dim]``: this rank's tokens, with heads grouped by the rank
                that computes them; parts as returned by :meth:`begin`.
        Returns:
            In the same shape; may be overwritten in the next block.
        """
        ranks, tokens = query.shape[1:3]
        query, key, value = (states.flatten(1, 2) for states in self._exchange(query, key, value))
        valid = slice(ranks * tokens - self.padding)
        attended = self.whole(query, key[:, valid], value[:, valid])
        return self._exchange(attended.unflatten(1, (ranks, tokens)).contiguous())[0]

    def _exchange(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """All-to-all of tensors ``[batch, ranks, …]``."""
        received, transfers = [torch.empty_like(states) for states in tensors], []
        for sent, found in zip(tensors, received):
            if sent.dtype.itemsize == 1:
                sent, found = sent.view(torch.uint8), found.view(torch.uint8)
            found[:, self.rank].copy_(sent[:, self.rank])
            for peer in (rank for rank in range(self.size) if rank != self.rank):
                for from_here, to_here in zip(sent[:, peer], found[:, peer]):
                    transfers.append(dist.P2POp(dist.isend, from_here, self.numbers[peer], self.group))
                    transfers.append(dist.P2POp(dist.irecv, to_here, self.numbers[peer], self.group))
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        return received


class CopyingUlyssesAttention(UlyssesAttention):
    """Ulysses by writing into other ranks' memory, overlapping communication with computation.

    The work is split into parts. A part is the tokens of one prompt, or half of a rank's heads if there is only one prompt. Values
    and keys are sent as soon as they are made, while queries are computed. No barrier is needed between blocks: a peer overwrites
    my buffer only after it has my result for its previous contents.

    Args:
        group: process group, ranked in the order of the chunks.
        device: of this rank.
        rank, size: of this process in the group, and of the group.
        heads: per rank.
    """

    def __init__(self, group, device: torch.device, *, rank: int, size: int, heads: int):
        super().__init__(group, rank=rank, size=size)
        self.device = device
        self.heads = heads
        self.pieces = 1
        # Kernels set the signals. With priority, they run before the remaining blocks of an attention that occupies the GPU.
        self.side = torch.cuda.Stream(device, priority=-1)
        self.inbox: symmetric_memory.Inbox | None = None
        self.layout: symmetric_memory.BufferLayout | None = None
        self.buffers: list[list[torch.Tensor]] = []
        """Per rank: queries, keys, values ``[batch, pieces, ranks, …]`` and results ``[batch, ranks, pieces, …]``."""
        self.sent: set[int] = set()
        """What this block has sent before its attention: ``KEY``, ``VALUE``."""

    def begin(self, whole: Attention, *, batch: int, padding: int) -> int:
        """See :meth:`UlyssesAttention.begin`. Each part costs the idle processors at the end of one attention."""
        self.sent.clear()
        self.pieces = 2 if batch == 1 and self.heads % 2 == 0 else 1
        return super().begin(whole, batch=batch, padding=padding) * self.pieces

    def send(self, place: int, states: torch.Tensor) -> None:
        """Sends keys or values before attention, unless the buffers are not laid out for them yet.

        Args:
            place: ``KEY`` or ``VALUE``.
            states: as for :meth:`attend`, where they are given again.
        """
        split = self._split(states)
        if self.layout and self.layout.parts[place] == (self._turned(split), states.dtype):
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                for part in self._parts(len(split)):
                    self._copy(place, split, part)
            self.sent.add(place)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        try:
            return self._copy_and_attend(query, key, value)
        except BaseException:
            self.inbox = self.layout = None  # stale signals must not be taken for the next ones
            raise

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        """Returns a view ``[batch, ranks, pieces, tokens, heads, head_dim]``."""
        return states.unflatten(1, (self.size, self.pieces))

    @staticmethod
    def _turned(split: torch.Tensor) -> tuple[int, ...]:
        """Returns the shape of what arrives, ``[batch, pieces, ranks, …]``."""
        batch, ranks, pieces, *others = split.shape
        return batch, pieces, ranks, *others

    def _parts(self, batch: int) -> list[tuple[int, int]]:
        """Returns the sample and the piece of each part."""
        return list(product(range(batch), range(self.pieces)))

    def _copy(self, place: int, split: torch.Tensor, part: tuple[int, int]) -> None:
        """Copies a part of queries, keys or values to all others."""
        sample, piece = part
        for peer in self.inbox.others:
            self.buffers[peer][place][sample, piece, self.rank].copy_(split[sample, peer, piece])

    def _copy_and_attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        asked = [self._split(states) for states in (query, key, value)]
        self._allocate(asked)
        *arriving, results = self.buffers[self.rank]
        parts = self._parts(len(query))
        valid = slice(self.size * query.shape[2] - self.padding)
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            for number, part in enumerate(parts):
                for place in {QUERY, KEY, VALUE} - self.sent:
                    self._copy(place, asked[place], part)
                self.inbox.announce(ARRIVALS, number)
        self.sent.clear()
        for sample, piece in parts:
            for states, here in zip(asked, arriving):
                here[sample, piece, self.rank].copy_(states[sample, self.rank, piece])
        made = []
        for number, (sample, piece) in enumerate(parts):
            self.inbox.await_all(ARRIVALS, number)
            queries, keys, values = (here[sample, piece].flatten(0, 1)[None] for here in arriving)
            made.append(self.whole(queries, keys[:, valid], values[:, valid])[0].unflatten(0, (self.size, -1)))
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                for peer in self.inbox.others:
                    self.buffers[peer][-1][sample, self.rank, piece].copy_(made[-1][peer])
                self.inbox.announce(RESULTS, number)
        for (sample, piece), attended in zip(parts, made):
            results[sample, self.rank, piece].copy_(attended[self.rank])
        for number in range(len(parts)):
            self.inbox.await_all(RESULTS, number)
        main.wait_stream(self.side)  # before its source memory is reused
        return results.flatten(1, 2)

    def _allocate(self, asked: list[torch.Tensor]) -> None:
        """Allocates buffers for one block's tensors on every rank. All blocks need the same, so it happens once per size."""
        query, _, value = asked
        layout = symmetric_memory.BufferLayout(
            (*((self._turned(states), states.dtype) for states in asked), (tuple(query.shape), value.dtype))
        )
        if layout == self.layout:
            return
        torch.cuda.synchronize(self.device)  # no rank may write in one layout while another one is in use
        dist.barrier(self.group)
        self.sent.clear()
        if self.inbox is None or self.inbox.nbytes < layout.nbytes:
            self.buffers, self.inbox = [], None
            self.inbox = symmetric_memory.Inbox(self.group, self.device, nbytes=layout.nbytes)
        self.layout, self.buffers = layout, self.inbox.views(layout)
