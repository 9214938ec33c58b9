"""Compiled blocks give the same video, FP8 one that is near, and what cannot be done is said. A GPU's part: test_gpu.py."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel_backend.bench.table import distance
from parallel_backend.cogvideox import attention, blocks, fp8, kernels
from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.cogvideox.rehearsal import Rehearsal
from parallel_backend.engine import Engine
from parallel_backend.errors import Cancelled, RequestError
from parallel_backend.jobs import LoadJob
from parallel_backend.local import LocalExecutor
from parallel_backend.parallel.split import Split
from parallel_backend.parallel.tensor import join_products
from parallel_backend.parallel.transformer import JointSequence

from .conftest import TOLERANCE
from .test_sharding import run_plans


@pytest.fixture(scope="module", autouse=True)
def compiled_here(tmp_path_factory):
    """Kernels go to a folder of their own, in this process and in groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def can_compile(compiled_here):
    if reason := blocks.why_not_compiled(torch.device("cpu")):
        pytest.skip(f"nothing can be compiled here: {reason}")


def with_model(job, **settings):
    """The job with another setting of its model."""
    return replace(job, model=replace(job.model, **settings))


def test_compiled_blocks_give_the_same_latents_at_every_size_without_reading_weights_again(can_compile, make_job):
    executor = LocalExecutor(torch.device("cpu"))
    for like in ("2b", "5b"):
        for size in ((48, 48, 5), (64, 48, 9)):
            job = make_job(like, size=size, steps=3, scheduler="ddim", cfg=6.0)
            expected, loads = executor.sample(job).tensor, executor.engine.loads
            result = executor.sample(with_model(job, compile="on"))
            assert (result.tensor - expected).abs().max() <= TOLERANCE
            assert not result.report.notes and executor.engine.loads == loads
            assert torch.equal(executor.sample(job).tensor, expected)  # and not compiled again


def test_a_size_is_compiled_once_and_for_all(can_compile, make_job):
    executor, compiled = LocalExecutor(torch.device("cpu")), []
    torch._dynamo.reset()
    for size in ((48, 48, 5), (64, 48, 9), (80, 64, 13)):
        executor.sample(with_model(make_job("5b", size=size, steps=1), compile="on"))
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[-1] > 0


def test_compiled_blocks_and_fp8_work_in_a_group(can_compile, make_job, local, start_group):
    group = start_group("ulysses2-fsdp2")  # whose blocks are gathered by hooks around what is compiled
    for like, settings in (("5b", {"compile": "on"}), ("5b", {"fp8": "linears"})):
        job = with_model(make_job(like, size=(80, 48, 5), steps=3, scheduler="ddim"), **settings)
        exact, alone = local.sample(with_model(job, compile="auto", fp8="off")).tensor, local.sample(job).tensor
        together = group.sample(job).tensor
        if job.model.fp8 == "off":
            assert (together - exact).abs().max() <= TOLERANCE
        else:  # a rounding that falls the other way is a step of FP8
            assert distance(together, alone) < 0.5 * distance(alone, exact)


def test_the_sum_over_ranks_is_a_part_of_what_is_compiled(can_compile, make_job, local, tmp_path):
    class OneOfOne(Split):
        def attach(self, transformer, **settings):
            join_products(transformer, dist.group.WORLD)
            super().attach(transformer, **settings)

    job = make_job("5b", size=(48, 48, 5), steps=2)
    expected = local.sample(job).tensor
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        torch._dynamo.reset()
        engine = Engine(OneOfOne(torch.device("cpu")))
        assert torch.allclose(engine.run(with_model(job, compile="on")).tensor, expected, atol=TOLERANCE)
        assert not torch._dynamo.utils.counters["graph_break"]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "like, settings", [("2b", {"cfg": 1.0}), ("5b", {"cfg": 6.0}), ("1.5-5b", {"batch": 2, "fp8": "linears"})]
)
def test_blocks_are_compiled_while_weights_are_read(like, settings, can_compile, make_job, monkeypatch):
    rehearsed, wait = [], Rehearsal.wait
    monkeypatch.setattr(Rehearsal, "wait", lambda rehearsal: rehearsed.append(rehearsal) or wait(rehearsal))
    fp8_of = {"fp8": settings.pop("fp8", "off")}
    job = with_model(make_job(like, size=(80, 48, 9), steps=2, **settings), compile="on", **fp8_of)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine, stats = Engine(Split(torch.device("cpu"))), torch._dynamo.utils.counters["stats"]
    engine.run(LoadJob.of(job))
    compiled = stats["unique_graphs"]
    engine.run(job)
    assert stats["unique_graphs"] == compiled > 0
    assert {weight.is_meta for weight in rehearsed.pop().block.parameters()} == {True}  # no memory of it is left


def test_ranks_compile_their_blocks_while_weights_are_read(can_compile, make_job, local, tmp_path):
    job = make_job("5b", size=(80, 48, 9), steps=2)
    expected = local.sample(job).tensor
    job = with_model(job, compile="on")
    for plan, (made, _, compiled) in run_plans(tmp_path, [LoadJob.of(job), job], 2, ["cfg2", "ulysses2"]).items():
        assert (made[1] - expected).abs().max() <= TOLERANCE, plan
        assert compiled[0] == compiled[1] and min(compiled[0]) > 0, plan


def test_a_rehearsal_that_fails_is_logged_and_the_job_goes_on(can_compile, make_job, monkeypatch, caplog):
    usual = sys.getswitchinterval()

    def refuse(*args):
        raise MemoryError("no room")

    job = make_job("5b", steps=2)
    expected = Engine(Split(torch.device("cpu"))).run(job).tensor
    monkeypatch.setattr(JointSequence, "rehearse", refuse)
    made = Engine(Split(torch.device("cpu"))).run(with_model(job, compile="on")).tensor
    assert (made - expected).abs().max() <= TOLERANCE
    assert "blocks were not compiled beside the reading of weights, so the first step does it: no room" in caplog.text
    assert sys.getswitchinterval() == usual


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(make_job, monkeypatch):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    expected = executor.sample(job).tensor
    monkeypatch.setattr(blocks, "why_not_compiled", lambda device: "there is no C compiler")
    result = executor.sample(with_model(job, compile="on"))
    assert result.report.notes == ("not compiled, so slower: there is no C compiler",)
    assert torch.equal(result.tensor, expected)


def test_fp8_is_near_float32_and_halves_the_layers_it_takes(make_job, checkpoints):
    executor = LocalExecutor(torch.device("cpu"))
    for like in ("2b", "5b", "1.5-5b-i2v"):
        settings = {"image": torch.randn(1, 16, 1, 6, 6)} if like.endswith("i2v") else {}
        job = make_job(like, size=(48, 48, 9), steps=2, scheduler="ddim", **settings)
        exact = executor.sample(job).tensor
        weights = executor.engine._held["transformer"][1]
        before = sum(weight.nbytes for weight in weights.parameters())
        result = executor.sample(with_model(job, fp8="linears"))
        assert 1e-4 < distance(result.tensor, exact) < 0.1
        weights = executor.engine._held["transformer"][1]
        after = sum(weight.nbytes for weight in weights.parameters())
        assert before - after == fp8.saved_bytes(Checkpoint.open(checkpoints[like]), torch.float32) > 0.4 * before


def test_a_lora_is_merged_before_weights_are_rounded_to_fp8(make_job, local):
    job = make_job("5b", size=(48, 48, 5), steps=2, scheduler="ddim", lora=0.8)
    exact = local.sample(job).tensor
    plain = with_model(make_job("5b", size=(48, 48, 5), steps=2, scheduler="ddim"), fp8="linears")
    executor = LocalExecutor(torch.device("cpu"))
    before = executor.sample(plain).tensor
    merged = executor.sample(with_model(job, fp8="linears")).tensor
    assert distance(merged, exact) < 0.5 * distance(before, exact)
    assert torch.equal(executor.sample(plain).tensor, before)


def test_a_product_in_fp8_is_that_of_the_rounded_numbers():
    linear = torch.nn.Linear(64, 32)
    layer, states = fp8.Fp8Linear(linear), torch.randn(2, 5, 64)
    rounded = [
        part.float() * scales
        for part, scales in (kernels.quantize_rows(states.flatten(0, 1)), kernels.quantize_rows(linear.weight))
    ]
    expected = (rounded[0] @ rounded[1].T + linear.bias).unflatten(0, (2, 5))
    assert (layer(states) - expected).abs().max() <= 1e-5
    assert 0.005 < distance(layer(states), linear(states)) < 0.06


def test_fp8_attention_says_where_it_is_not_to_be_had(make_job):
    executor = LocalExecutor(torch.device("cpu"))
    result = executor.sample(with_model(make_job("5b", steps=2), fp8="all"))
    assert any("attention is not in FP8: that needs a Hopper GPU" in note for note in result.report.notes)


def test_a_gpu_without_fp8_is_refused_in_one_line_and_the_next_job_works(make_job, monkeypatch):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    expected = executor.sample(job).tensor
    monkeypatch.setattr(fp8, "missing", lambda device: "fp8 needs a GPU of compute capability 8.9 or newer")
    with pytest.raises(RequestError, match="fp8 needs a GPU"):
        executor.sample(with_model(job, fp8="linears"))
    assert torch.equal(executor.sample(job).tensor, expected)


def test_attention_is_torch_s_own_where_there_is_no_other():
    states = [torch.randn(2, 9, 3, 16) for _ in range(3)]
    function = attention.attention_of(torch.device("cpu"), torch.bfloat16)
    weights = torch.einsum("bqhd,bkhd->bhqk", states[0], states[1]).div(4).softmax(-1)
    assert (function(*states) - torch.einsum("bhqk,bkhd->bqhd", weights, states[2])).abs().max() <= 1e-5


def test_a_pipeline_compiles_its_patches_once_and_for_all(can_compile, make_job):
    from .test_pipefusion import Patched

    engine, compiled = Engine(Patched(2)), []
    torch._dynamo.reset()
    for size in ((48, 48, 5), (80, 64, 13)):
        job = make_job("5b", size=size, steps=3, scheduler="ddim", pipefusion_warmup=1)
        expected = Engine(Patched(2)).run(job).tensor
        assert (engine.run(with_model(job, compile="on")).tensor - expected).abs().max() <= TOLERANCE
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[-1] > 0


def test_a_step_may_begin_before_the_one_before_it_is_told_and_the_video_is_the_same(make_job, local, monkeypatch):
    job = make_job("5b", size=(48, 48, 5), steps=4, scheduler="dpm")
    expected, told, begun = local.sample(job).tensor, [], []

    def begins(module, args, kwargs):
        begun.append(len(told))

    class Ahead(Split):
        def agree(self, *said: bool) -> tuple[bool, ...]:
            """As where steps are short and a GPU computes them."""
            return (said[0], True) if len(said) == 2 else said

        def attach(self, transformer, **kind):
            transformer.register_forward_pre_hook(begins, with_kwargs=True)
            return super().attach(transformer, **kind)

    engine = Engine(Ahead(torch.device("cpu")))
    result = engine.run(job, lambda progress, total: told.append(progress.step) or True)
    assert torch.equal(result.tensor, expected)
    assert told == [1, 2, 3, 4] and begun == [0, 1, 1, 2]  # the third while the second is not told yet
    assert len(result.report.step_seconds) == 4
    kept = []
    with pytest.raises(Cancelled, match="stopped after step 2 of 4"):
        engine.run(job, lambda progress, total: kept.append(progress) or progress.step < 2)
    assert torch.equal(engine.run(replace(job, progress=kept[-1])).tensor, expected)
