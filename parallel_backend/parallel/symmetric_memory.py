"""GPU memory that other GPUs write to by copy engines, while the processors compute attention.

NCCL moves data with kernels, which take processors from attention (benchmarks/NOTES.md). torch's symmetric memory maps each
rank's buffer into all other ranks. A copy into it needs no kernel; only the signal that it has arrived does.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist

from ..errors import reason_of

FLAGS = 8
"""Signals of each kind that may be pending between two ranks; another one waits until the first was received."""
ALIGNMENT = 256
"""Alignment of tensors in bytes, for fast copies and kernels."""
_made: "WeakSet[Inbox]" = WeakSet()


def why_not(group, device: torch.device, collect: Callable[[Any], list]) -> str | None:
    """Returns why the ranks of a group cannot write into each other's memory, in one line, or None.

    Args:
        group: process group with a backend for ``device``.
        device: of this rank.
        collect: gathers a value from every rank in the world; a collective.
    """
    members = dist.get_process_group_ranks(group)

    def first(reason: str | None) -> str | None:
        reasons = collect(reason)
        return next((reasons[rank] for rank in members if reasons[rank]), None)

    places = collect((socket.gethostname(), device.index))
    hosts, indices = zip(*(places[rank] for rank in members))
    reason = first(_obstacle(device, hosts, indices))
    failed = None
    if reason is None:
        try:
            failed = trial(group, device)
        except (RuntimeError, AttributeError, TypeError) as error:  # forbidden in a container, or torch is too old
            failed = reason_of(error)
    return first(failed) or reason


def trial(group, device: torch.device) -> str | None:
    """Makes every rank write to all others once, and returns what is wrong, or None.

    On some machines the data that arrives is not the data that was sent.
    """
    size = dist.get_world_size(group)
    layout = BufferLayout((((size, ALIGNMENT), torch.uint8),))
    inbox = Inbox(group, device, nbytes=layout.nbytes)
    buffers = [buffer for (buffer,) in inbox.views(layout)]
    here = buffers[inbox.rank].zero_()
    dist.barrier(group)
    for rank in inbox.others:
        buffers[rank][inbox.rank].copy_(torch.full_like(here[0], inbox.rank + 1))
    inbox.announce(0, 0)
    inbox.await_all(0, 0)
    right = all(bool((here[rank] == rank + 1).all()) for rank in inbox.others)
    return None if right else "what one GPU writes does not arrive at the other"


def _obstacle(device: torch.device, hosts: tuple[str, ...], indices: tuple[int | None, ...]) -> str | None:
    """Returns an obstacle that this rank knows of without a trial, or None."""
    if device.type != "cuda":
        return f"a {device.type} has no copy engines"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE is set"
    if len(set(hosts)) > 1:
        return "they are on several machines"
    others = (index for index in indices if index != device.index)
    if not all(torch.cuda.can_device_access_peer(device.index, index) for index in others):
        return "they have no peer-to-peer access"
    if find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} has no symmetric memory"
    return None


def held_bytes() -> int:
    """Returns the bytes of this process's buffers, which torch's memory statistics do not include."""
    return sum(inbox.nbytes for inbox in _made)


@dataclass(frozen=True)
class BufferLayout:
    """Tensors packed into a buffer."""

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of each."""

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self._offsets[-1]

    @property
    def _offsets(self) -> list[int]:
        sizes = (torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parts)
        return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Returns views of the tensors in a ``buffer`` ``[bytes]``."""
        return [
            buffer[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(self._offsets, self.parts)
        ]


class Inbox:
    """A buffer on every rank of a group that the other ranks write to. All ranks must create it together.

    Args:
        group: process group.
        device: of this rank.
        nbytes: size of the buffer.
    """

    def __init__(self, group, device: torch.device, *, nbytes: int):
        from torch.distributed import _symmetric_memory as symmetric

        self.rank, self.size, self.nbytes = dist.get_rank(group), dist.get_world_size(group), nbytes
        own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(own, group)
        self._buffers = [
            own if rank == self.rank else self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)
        ]
        self.others = [(self.rank + distance) % self.size for distance in range(1, self.size)]
        """In an order in which no two ranks write to the same one at a time."""
        _made.add(self)

    def views(self, layout: BufferLayout) -> list[list[torch.Tensor]]:
        """Returns views of a layout's tensors in the buffer of each rank."""
        return [layout.views(buffer) for buffer in self._buffers]

    def announce(self, kind: int, number: int) -> None:
        """Signals all others that earlier writes on this stream have arrived."""
        for rank in self.others:
            self._handle.put_signal(rank, kind * FLAGS + number % FLAGS)

    def await_all(self, kind: int, number: int) -> None:
        """Makes this stream wait for the signals of all others."""
        for rank in self.others:
            self._handle.wait_signal(rank, kind * FLAGS + number % FLAGS)
