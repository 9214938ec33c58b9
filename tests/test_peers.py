"""Ulysses by copies into the peers' memory: what is sent where, and when, with threads for ranks and flags that only CPUs know.

That GPUs' copies and flags keep the same order is for tests/test_gpu.py.
"""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from parallel_backend.cogvideox.attention.function import KEY, QUERY, VALUE, AttentionFunction
from parallel_backend.cogvideox.attention.torch_attention import attend_torch
from parallel_backend.cogvideox.kernels import block_torch
from parallel_backend.parallel import symmetric_memory, ulysses

OPS = block_torch.TorchBlockOps()
WAIT = 60


class Stream:
    """Work on a CPU is done when it is asked for."""

    def __init__(self, device, priority=0):
        pass

    def wait_stream(self, other):
        pass


class Hub:
    """What the threads share."""

    def __init__(self, size: int):
        self.size = size
        self.rooms: dict[int, torch.Tensor] = {}
        self.barrier = threading.Barrier(size, timeout=WAIT)
        self.flags = {
            (sender, receiver, flag): queue.Queue()  # on a GPU the side stream waits until one was seen, and not the program
            for sender in range(size)
            for receiver in range(size)
            for flag in range(2 * symmetric_memory.FLAGS)
        }


class ThreadInbox(symmetric_memory.Inbox):
    """An inbox whose group is a pair of hub and rank."""

    def __init__(self, group, device, *, nbytes):
        self.hub, self.rank = group
        self.nbytes = nbytes
        self.hub.rooms[self.rank] = torch.full((nbytes,), 0x7F, dtype=torch.uint8)
        self.hub.barrier.wait()
        self._buffers = [self.hub.rooms[rank] for rank in range(self.hub.size)]
        self.others = [(self.rank + distance) % self.hub.size for distance in range(1, self.hub.size)]
        self._handle = self

    def put_signal(self, rank, flag):
        self.hub.flags[self.rank, rank, flag].put(None)

    def wait_signal(self, rank, flag):
        self.hub.flags[rank, self.rank, flag].get(timeout=WAIT)


@pytest.fixture
def threads_for_ranks(monkeypatch):
    monkeypatch.setattr(symmetric_memory, "Inbox", ThreadInbox)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(ulysses.dist, "barrier", lambda group: group[0].barrier.wait())
    monkeypatch.setattr(ulysses.dist, "get_process_group_ranks", lambda group: list(range(group[0].size)))
    monkeypatch.setattr(ulysses.dist, "get_world_size", lambda group: group[0].size)


def function_of(attend=attend_torch, *, fp8: bool = False) -> AttentionFunction:
    return AttentionFunction("test", attend, fp8=fp8)


def make_heads(rank: ulysses.CopyingUlyssesAttention, states: torch.Tensor, parts: int, dtypes: tuple[torch.dtype, ...]):
    """What a block makes of queries, keys and values, and sends; NaN where a rank's own parts are not to be read."""
    mine = {}
    for place in (VALUE, KEY, QUERY):
        own = rank.own(place, states[place])
        mine[place] = OPS.spread(states[place].to(dtypes[place], copy=True), parts, own)
        mine[place][:, own.parts] = torch.nan
        if place != QUERY:
            rank.send(place, mine[place])
    return [mine[place] for place in (QUERY, KEY, VALUE)]


def attend_on(rank: ulysses.CopyingUlyssesAttention, blocks: torch.Tensor, padding: int) -> torch.Tensor:
    """What a rank makes of each block's queries, keys and values ``[blocks, 3, batch, all tokens, heads, head_dim]``, its own tokens."""
    tokens = blocks.shape[3] // rank.size
    parts = rank.begin(function_of(), batch=blocks.shape[2], padding=padding, kernels=OPS)
    results = []
    for states in blocks[:, :, :, rank.rank * tokens : (rank.rank + 1) * tokens]:
        results.append(OPS.join(rank.attend(*make_heads(rank, states, parts, (states.dtype,) * 3))).reshape(states.shape[1:]))
    return torch.stack(results)


def ranks_of(hub: Hub, heads: int) -> list[ulysses.CopyingUlyssesAttention]:
    return [
        ulysses.CopyingUlyssesAttention((hub, rank), torch.device("cpu"), rank=rank, size=hub.size, heads=heads // hub.size)
        for rank in range(hub.size)
    ]


@pytest.mark.parametrize("size, heads", [(2, 8), (3, 6), (2, 2), (4, 8)])
def test_every_rank_gets_what_attention_to_all_tokens_gives(size, heads, threads_for_ranks):
    hub, generator = Hub(size), torch.Generator().manual_seed(0)
    ranks = ranks_of(hub, heads)
    # Sizes and dtypes change from job to job; blocks come one after the other; more videos than there are flags.
    for batch, tokens, padding, blocks, dtype in (
        (2, 10, 1, 3, torch.float64), (1, 7, 0, 2, torch.float64), (11, 3, 2, 2, torch.float64), (2, 10, 1, 2, torch.float32),
    ):  # fmt: skip
        states = torch.randn(blocks, 3, batch, size * tokens, heads, 4, generator=generator, dtype=dtype)
        valid = size * tokens - padding
        expected = torch.stack([attend_torch(query, key[:, :valid], value[:, :valid]) for query, key, value in states])
        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(partial(attend_on, blocks=states, padding=padding), ranks))
        assert (torch.cat(found, dim=2) - expected).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert all(flag.empty() for flag in hub.flags.values())


def test_values_and_keys_are_sent_once_and_before_attention(threads_for_ranks, monkeypatch):
    hub, copied = Hub(2), {0: [], 1: []}
    copy = ulysses.CopyingUlyssesAttention._copy
    monkeypatch.setattr(
        ulysses.CopyingUlyssesAttention,
        "_copy",
        lambda rank, place, *rest: (copied[rank.rank].append(place), copy(rank, place, *rest)),
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(attend_on, blocks=torch.randn(2, 3, 2, 6, 2, 4), padding=0), ranks_of(hub, 2)))
    assert copied == dict.fromkeys((0, 1), [VALUE, VALUE, KEY, KEY, QUERY, QUERY] * 2)


def test_another_precision_of_queries_and_keys_has_another_layout(threads_for_ranks):
    ranks = ranks_of(Hub(2), 2)

    def values_of(rank: ulysses.CopyingUlyssesAttention, value: torch.Tensor, fp8: bool) -> torch.Tensor:
        function = function_of(lambda query, key, value: value.clone(), fp8=fp8)
        parts, scored = rank.begin(function, batch=2, padding=0, kernels=OPS), block_torch.FP8 if fp8 else value.dtype
        states = value[:, rank.rank * 3 :][:, :3].expand(3, -1, -1, -1, -1)
        return OPS.join(rank.attend(*make_heads(rank, states, parts, (scored, scored, value.dtype)))).reshape(2, 3, 2, 64)

    for fp8 in (False, True, False):  # queries and keys take less room, so values lie elsewhere
        value = torch.randn(2, 6, 2, 64)
        with ThreadPoolExecutor(2) as pool:
            assert torch.equal(torch.cat(list(pool.map(partial(values_of, value=value, fp8=fp8), ranks)), dim=1), value)


def test_a_block_that_fails_before_its_attention_leaves_nothing_for_the_next(threads_for_ranks):
    states = torch.randn(2, 3, 2, 6, 2, 4, dtype=torch.float64)

    def results_of(rank: ulysses.CopyingUlyssesAttention) -> torch.Tensor:
        parts = rank.begin(function_of(), batch=2, padding=0, kernels=OPS)
        make_heads(rank, states[0][:, :, rank.rank * 3 :][:, :, :3], parts, (states.dtype,) * 3)
        return attend_on(rank, states, 0)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(results_of, ranks_of(Hub(2), 2))), dim=2)
    assert (found - torch.stack([attend_torch(*block) for block in states])).abs().max() < 1e-12


def test_a_failure_leaves_no_flag_for_the_next_job(threads_for_ranks):
    (alone,) = ranks_of(Hub(1), 2)
    states = torch.ones(1, 3, 2, 3, 2, 4)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    parts = alone.begin(function_of(fail), batch=2, padding=0, kernels=OPS)
    with pytest.raises(torch.OutOfMemoryError):
        alone.attend(*make_heads(alone, states[0], parts, (states.dtype,) * 3))
    assert alone.inbox is None and alone.layout is None
    assert torch.equal(attend_on(alone, states, 0)[0], states[0][VALUE])


def test_tensors_lie_one_after_the_other_where_copies_are_fast():
    layout = symmetric_memory.BufferLayout((((3, 5), torch.bfloat16), ((2,), torch.float8_e4m3fn), ((300,), torch.float32)))
    room = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(room)
    assert [(view.shape, view.dtype) for view in views] == [(torch.Size(shape), dtype) for shape, dtype in layout.parts]
    starts = [view.data_ptr() - room.data_ptr() for view in views]
    assert (
        starts == [0, symmetric_memory.ALIGNMENT, 2 * symmetric_memory.ALIGNMENT]
        and layout.nbytes == 2 * symmetric_memory.ALIGNMENT + 1280
    )


class Deaf(ThreadInbox):
    """An inbox into which nothing is written, as with a broken link."""

    def __init__(self, group, device, *, nbytes):
        super().__init__(group, device, nbytes=nbytes)
        self._buffers = [room if rank == self.rank else room.clone() for rank, room in enumerate(self._buffers)]


@pytest.mark.parametrize("kind, words", [(ThreadInbox, None), (Deaf, "does not arrive")])
def test_it_is_tried_whether_what_is_written_arrives(kind, words, threads_for_ranks, monkeypatch):
    monkeypatch.setattr(symmetric_memory, "Inbox", kind)
    hub = Hub(3)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: symmetric_memory.trial((hub, rank), torch.device("cpu")), range(3)))
    assert all(reason is None if words is None else words in reason for reason in found)


def test_what_is_in_the_way_of_copies_is_named(monkeypatch):
    def reason(device, places):
        members = range(len(places))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(symmetric_memory.dist, "get_process_group_ranks", lambda group: list(members))
            patch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: abs(one - other) == 1)
            return symmetric_memory.why_not(
                None, device, lambda value: places if isinstance(value, tuple) else [value] * len(places)
            )

    gpu = torch.device("cuda", 0)
    assert "no copy engines" in reason(torch.device("cpu"), [("a", None), ("a", None)])
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert "NCCL_P2P_DISABLE" in reason(gpu, [("a", 0), ("a", 1)])
    monkeypatch.delenv("NCCL_P2P_DISABLE")
    assert "several machines" in reason(gpu, [("a", 0), ("b", 0)])
    assert "peer-to-peer" in reason(gpu, [("a", 0), ("a", 2)])
