"""Ulysses attention over a sequence that is sharded over ranks: an all-to-all before attention, and one after it."""

from itertools import product

import torch
import torch.distributed as dist

from ..cogvideox.attention.function import QUERY, AttentionFunction
from ..cogvideox.attention.torch_attention import Attention
from ..cogvideox.kernels.block_torch import FP8, Own
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
        self.padding, self.kernels = 0, None

    def begin(self, function: AttentionFunction, *, batch: int, padding: int, kernels) -> int:
        """Prepares a forward pass.

        Args:
            function: attention on one rank.
            batch: prompts times videos.
            padding: padding tokens at the end of the full sequence.
            kernels: the operations of the blocks, for ranks that lay out results themselves.
        Returns:
            Number of parts that heads must be laid out in: ranks times the parts per rank.
        """
        self.whole, self.padding, self.kernels = function.attend, padding, kernels
        return self.size

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Computes attention from this rank's tokens to all tokens.

        Args:
            query, key, value: ``[batch, parts, tokens, heads, head_dim]``: this rank's tokens, with heads grouped by the rank
                that computes them; parts as returned by :meth:`begin`.
        Returns:
            In the same shape.
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
    and keys are sent as soon as they are made, while queries are computed; what this rank attends to itself is made where attention
    reads it. No barrier is needed between blocks: a peer overwrites my buffer only after it has my result for its previous contents.

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
        self.fp8 = False
        # Kernels set the signals. With priority, they run before the remaining blocks of an attention that occupies the GPU.
        self.side = torch.cuda.Stream(device, priority=-1)
        self.inbox: symmetric_memory.Inbox | None = None
        self.layout: symmetric_memory.BufferLayout | None = None
        self.buffers: list[list[torch.Tensor]] = []
        """Per rank: queries, keys, values ``[batch, pieces, ranks, …]`` and results ``[batch, ranks, pieces, …]``."""

    def begin(self, function: AttentionFunction, *, batch: int, padding: int, kernels) -> int:
        """See :meth:`UlyssesAttention.begin`. Each part costs the idle processors at the end of one attention."""
        self.fp8 = function.fp8
        self.pieces = 2 if batch == 1 and self.heads % 2 == 0 else 1
        return super().begin(function, batch=batch, padding=padding, kernels=kernels) * self.pieces

    def own(self, place: int, states: torch.Tensor) -> Own:
        """Returns the memory for this rank's own parts.

        Args:
            place: ``QUERY``, ``KEY`` or ``VALUE``.
            states: ``[batch, tokens, heads, head_dim]``, as a linear layer returns them.
        """
        self._allocate(states)
        return Own(self.buffers[self.rank][place][:, :, self.rank], first=self.rank * self.pieces)

    def send(self, place: int, states: torch.Tensor) -> None:
        """Sends keys or values, while this rank computes.

        Args:
            place: ``KEY`` or ``VALUE``.
            states: as for :meth:`attend`, without this rank's own parts.
        """
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for part in self._parts(len(states)):
                self._copy(place, states, part)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See :meth:`UlyssesAttention.attend`. Keys and values were sent, and this rank's own parts are in their memory."""
        try:
            return self._copy_and_attend(query)
        except BaseException:
            self.inbox = self.layout = None  # stale signals must not be taken for the next ones
            raise

    def _parts(self, batch: int) -> list[tuple[int, int]]:
        """Returns the sample and the piece of each part."""
        return list(product(range(batch), range(self.pieces)))

    def _copy(self, place: int, states: torch.Tensor, part: tuple[int, int]) -> None:
        """Copies a part of queries, keys or values to all others."""
        sample, piece = part
        for peer in self.inbox.others:
            self.buffers[peer][place][sample, piece, self.rank].copy_(states[sample, peer * self.pieces + piece])

    def _copy_and_attend(self, query: torch.Tensor) -> torch.Tensor:
        batch, _, tokens, heads, head_dim = query.shape
        *arriving, results = self.buffers[self.rank]
        parts = self._parts(batch)
        valid = slice(self.size * tokens - self.padding)
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            for number, part in enumerate(parts):
                self._copy(QUERY, query, part)
                self.inbox.announce(ARRIVALS, number)
        joined, made = results.new_empty(batch, tokens, self.size, self.pieces, heads, head_dim), []
        for number, (sample, piece) in enumerate(parts):
            self.inbox.await_all(ARRIVALS, number)
            queries, keys, values = (here[sample, piece].flatten(0, 1)[None] for here in arriving)
            attended = self.whole(queries, keys[:, valid], values[:, valid])[0].unflatten(0, (self.size, -1))
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                for peer in self.inbox.others:
                    self.buffers[peer][-1][sample, self.rank, piece].copy_(attended[peer])
                self.inbox.announce(RESULTS, number)
            made.append(attended)  # kept until it was sent
            self.kernels.put(attended[self.rank], joined[sample, :, self.rank, piece])
        for number, (sample, piece) in enumerate(parts):
            self.inbox.await_all(RESULTS, number)
            for peer in self.inbox.others:
                self.kernels.put(results[sample, peer, piece], joined[sample, :, peer, piece])
        main.wait_stream(self.side)  # before the memory of what is sent is used again
        return joined.flatten(2, 3).transpose(1, 2)

    def _allocate(self, states: torch.Tensor) -> None:
        """Allocates buffers for one block's tensors on every rank. All blocks need the same, so it happens once per size."""
        batch, tokens, heads, head_dim = states.shape
        part = (tokens, heads // (self.size * self.pieces), head_dim)
        arriving, results = (batch, self.pieces, self.size, *part), (batch, self.size, self.pieces, *part)
        scored = (arriving, FP8 if self.fp8 else states.dtype)
        layout = symmetric_memory.BufferLayout((scored, scored, (arriving, states.dtype), (results, states.dtype)))
        if layout == self.layout:
            return
        torch.cuda.synchronize(self.device)  # no rank may write in one layout while another one is in use
        dist.barrier(self.group)
        if self.inbox is None or self.inbox.nbytes < layout.nbytes:
            self.buffers, self.inbox = [], None
            self.inbox = symmetric_memory.Inbox(self.group, self.device, nbytes=layout.nbytes)
        self.layout, self.buffers = layout, self.inbox.views(layout)
