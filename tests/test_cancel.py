"""A job that is cancelled stops in the middle of whatever it is at, and the next one finds all as it was."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.cogvideox.vae import codec, preview
from parallel_backend.engine.engine import Engine
from parallel_backend.errors import Cancelled
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob, EncodeJob
from parallel_backend.model import Model
from parallel_backend.parallel.group_rank import GroupRankContext
from parallel_backend.parallel.rank import RankContext

CPU = torch.device("cpu")
KINDS = ["decode", "decode in tiles", "encode", "encode in tiles"]


class Stop:
    """A stop signal that is given once it was asked for so many times.

    Args:
        after: times; None never stops.
    """

    def __init__(self, after: int | None = None):
        self.after, self.asked = after, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.after is not None and self.asked >= self.after


def vae_job(kind: str, checkpoints, *, rows: int = 4, columns: int = 10, frames: int = 5) -> DecodeJob | EncodeJob:
    """A job of the VAE, of several batches of frames and, in tiles, of several tiles."""
    model, generator = Model(str(checkpoints["5b"])), torch.Generator().manual_seed(0)
    tiles = ("on", 64, 16) if "tiles" in kind else ("off",)
    if kind.startswith("decode"):
        return DecodeJob(model, torch.randn(1, 16, frames, rows, columns, generator=generator), *tiles)
    return EncodeJob(model, torch.rand(4 * frames - 3, 8 * rows, 8 * columns, 3, generator=generator), *tiles)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vae_stops_at_the_next_part_of_its_work(kind, checkpoints):
    executor, job, whole = LocalExecutor(CPU), vae_job(kind, checkpoints), Stop()
    expected = executor.run(job, should_stop=whole).tensor
    module, batches, tiles = executor.engine.cache.held["vae"][1], 2, 2 if "tiles" in kind else 1
    blocks = set(codec.stops(module)) & set((module.decoder if kind.startswith("decode") else module.encoder).modules())
    assert blocks and whole.asked == batches * tiles * len(blocks)
    for after in (1, whole.asked // 2 + 1):
        stop = Stop(after)
        with pytest.raises(Cancelled, match="while the VAE was at work"):
            executor.run(job, should_stop=stop)
        assert stop.asked == after
    assert torch.equal(executor.run(job).tensor, expected) and executor.engine.cache.loads == 1


def test_on_a_gpu_the_vae_asks_at_each_batch_of_frames_lest_the_gpu_waits():
    coders = SimpleNamespace(device=torch.device("cuda", 0), encoder=object(), decoder=object())
    assert codec.stops(coders) == [coders.encoder, coders.decoder]


def test_weights_that_are_read_for_a_cancelled_job_are_left(make_job, local):
    executor, job = LocalExecutor(CPU), make_job("5b", steps=2)
    for run in (executor.sample, executor.load):
        with pytest.raises(Cancelled, match="while weights were read"):
            run(job, should_stop=Stop(5))
    assert executor.engine.cache.loads == 0 and executor.status()["held"] == []
    assert torch.equal(executor.sample(job).tensor, local.sample(job).tensor)


class SecondRank(RankContext):
    """Rank 1 of two. Rank 0 says what it says of each message to this one, after so many questions.

    Args:
        after: questions; None is never.
    """

    rank = 1

    def __init__(self, after: int | None):
        super().__init__(CPU)
        self.stop = Stop(after)

    def heard(self, go_on):
        return not self.stop()

    def agree(self, *said):
        return (False,) * len(said)


@pytest.mark.parametrize("after", [3, None])
def test_a_rank_that_reads_weights_stops_with_rank_0_even_when_it_was_faster(after, make_job, local):
    engine, job = Engine(SecondRank(after)), make_job("5b", steps=2)
    with pytest.raises(Cancelled, match="while weights were read"):
        engine.run(job)
    assert engine.status()["held"] == []
    engine.context = engine.cache.context = RankContext(CPU)
    assert torch.equal(engine.run(job).tensor, local.sample(job).tensor)


def test_ranks_hear_of_a_cancelled_job_and_of_no_other():
    store = dist.HashStore()

    def rank(number: int) -> GroupRankContext:
        context = GroupRankContext.__new__(GroupRankContext)
        context.rank, context._store, context._messages = number, store, 1
        return context

    first, second = rank(0), rank(1)
    assert first.heard(True) and second.heard(True)
    assert not first.heard(False)
    assert not second.heard(True)
    first._messages = second._messages = 2
    assert first.heard(True) and second.heard(True)


def test_a_picture_that_is_being_made_is_left(make_job, monkeypatch):
    executor, job, shown, begun = LocalExecutor(CPU), make_job("5b", steps=2), [], []
    make = preview.picture
    monkeypatch.setattr(preview, "picture", lambda *inputs: begun.append(True) or make(*inputs))
    with pytest.raises(Cancelled, match="after step 1 of 2"):
        executor.sample(job, on_picture=shown.append, should_stop=lambda: bool(begun))
    assert begun == [True] and not shown


def test_text_stops_being_encoded_at_the_next_block(checkpoints):
    checkpoint = Checkpoint.open(checkpoints["5b"])
    encoder = TextEncoder(checkpoint, device=CPU, dtype=torch.float32)
    ids = [encoder.tokenize("a red circle")]
    expected = encoder.encode(ids)
    for after in (1, 2):
        stop = Stop(after)
        encoder.go_on = lambda: not stop()  # noqa: B023
        with pytest.raises(Cancelled, match="while the text was encoded"):
            encoder.encode(ids)
        assert stop.asked == after
    encoder.go_on = lambda: True
    assert torch.equal(encoder.encode(ids), expected)


def test_the_core_s_nodes_and_text_end_as_comfyui_s_own_interruption_does(nodes):
    shown, _ = nodes("""
_, coder = handles(text_model)
clip = part("nodes.comfy.clip").ClipHandle(coder.checkpoint, "auto")
tokens, video = clip.tokenize("a red circle"), torch.randn(1, 16, 5, 8, 12)
pixels = coder.decode(video)[0]
calls = {"decode": (coder.decode, video), "tiled": (coder.decode_tiled, video), "encode": (coder.encode, pixels),
         "text": (clip.encode_from_tokens, tokens)}
def ends(call, value):
    host.management.interrupt_current_processing()
    try:
        call(value)
    except host.management.InterruptProcessingException:
        return "interrupted" if not host.management.processing_interrupted() else "not noticed"
    finally:
        host.management.interrupt_current_processing(False)
    return "went on"
ended = {name: ends(*call) for name, call in calls.items()}
again = {name: list(getattr(call(value), "shape", ())) for name, (call, value) in calls.items()}
show(ended=ended, again=again)
""")
    assert set(shown["ended"].values()) == {"interrupted"}
    assert shown["again"]["decode"] == [1, 17, 64, 96, 3] and shown["again"]["encode"] == [1, 16, 5, 8, 12]
