"""Ulysses whose ranks write into each other's memory, with threads for ranks: every part arrives where it belongs.

What needs streams and copy engines is in test_gpu.py.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from parallel_backend.cogvideox.attention.function import KEY, QUERY, VALUE, AttentionFunction
from parallel_backend.cogvideox.attention.torch_attention import attend_torch
from parallel_backend.cogvideox.kernels.block_torch import TorchBlockOps
from parallel_backend.parallel import ulysses

TOKENS, HEADS, HEAD_DIM, PADDING = 5, 12, 8, 2
PATIENCE = 60.0
"""Seconds after which a signal that did not come is a failure."""


class Memory:
    """The memory and the signals of all ranks, once per layout."""

    def __init__(self, size: int):
        self.size, self.barrier, self.made = size, threading.Barrier(size, timeout=PATIENCE), {}
        self.signals = {}
        self.lock = threading.Lock()

    def signal(self, *name: int) -> threading.Semaphore:
        with self.lock:
            return self.signals.setdefault(name, threading.Semaphore(0))

    def inbox(self, rank: int, nbytes: int) -> SimpleNamespace:
        """Returns what ``symmetric_memory.Inbox`` would be on a rank."""
        with self.lock:  # NaN wherever nothing is written
            buffers = self.made.setdefault(nbytes, [torch.full((nbytes,), 255, dtype=torch.uint8) for _ in range(self.size)])
        others = [(rank + distance) % self.size for distance in range(1, self.size)]

        def announce(kind: int, number: int) -> None:
            for other in others:
                self.signal(rank, other, kind, number).release()

        def await_all(kind: int, number: int) -> None:
            for other in others:
                assert self.signal(other, rank, kind, number).acquire(timeout=PATIENCE)

        return SimpleNamespace(
            others=others, nbytes=nbytes, announce=announce, await_all=await_all,
            views=lambda layout: [layout.views(buffer) for buffer in buffers],
        )  # fmt: skip


@pytest.fixture
def threads(monkeypatch):
    """Threads take the place of ranks, and streams do nothing."""
    memory, here = Memory(0), threading.local()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *given, **options: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(ulysses.dist, "get_process_group_ranks", lambda group: [])
    monkeypatch.setattr(ulysses.dist, "barrier", lambda group: memory.barrier.wait())
    monkeypatch.setattr(ulysses.symmetric_memory, "Inbox", lambda group, device, nbytes: memory.inbox(here.rank, nbytes))

    def run(size: int, work) -> list:
        memory.__init__(size)

        def of_rank(rank: int):
            here.rank = rank
            return work(ulysses.CopyingUlyssesAttention(None, torch.device("cpu"), rank=rank, size=size, heads=HEADS // size))

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(of_rank, range(size)))

    return run


@pytest.mark.parametrize("batch, size", [(1, 2), (2, 2), (1, 4), (3, 4), (2, 3)])
def test_ranks_that_write_into_each_other_attend_as_one(batch, size, threads):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, batch, size * TOKENS, HEADS, HEAD_DIM)  # two blocks: the second meets the first one's memory
    blocks = torch.randn(shape, generator=generator)
    ops, function = TorchBlockOps(), AttentionFunction("torch", attend_torch)

    def work(shared: ulysses.CopyingUlyssesAttention) -> torch.Tensor:
        made = []
        for states in blocks.unflatten(3, (size, TOKENS))[:, :, :, shared.rank]:
            parts = shared.begin(function, batch=batch, padding=PADDING, kernels=ops)
            sent = {}
            for place in (VALUE, KEY, QUERY):
                own = shared.own(place, states[place])
                sent[place] = ops.spread(states[place], parts, own)
                sent[place][:, own.parts] = torch.nan  # what others must not get
                if place != QUERY:
                    shared.send(place, sent[place])
            made.append(ops.join(shared.attend(sent[QUERY], sent[KEY], sent[VALUE])))
        return torch.stack(made)

    found = torch.cat(threads(size, work), dim=2)
    valid = slice(size * TOKENS - PADDING)
    expected = torch.stack([attend_torch(query, key[:, valid], value[:, valid]).flatten(2) for query, key, value in blocks])
    assert torch.allclose(found, expected, atol=1e-5)
