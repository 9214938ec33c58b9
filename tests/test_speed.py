"""Kernels give the same video, and what cannot be done is said. A GPU's part: test_gpu.py."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from benchmarks.random_weights import build
from parallel_backend.cogvideox.attention import choice
from parallel_backend.cogvideox.attention.function import Kind
from parallel_backend.cogvideox.transformer import block
from parallel_backend.engine.engine import Engine
from parallel_backend.errors import Cancelled
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.parallel.rank import RankContext

from .conftest import REPO


def with_model(job, **settings):
    """The job with another setting of its model."""
    return replace(job, model=replace(job.model, **settings))


KERNELS = """
import torch
from parallel_backend.cogvideox.kernels import block_torch, int8_product
from parallel_backend.cogvideox.transformer import block
from parallel_backend.cogvideox.transformer.quantized_linear import Int8Linear

torch.manual_seed(0)
ours, plain = block.triton_kernels(), block_torch.TorchBlockOps()

def check(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (found - expected).abs().max()

for features, text, affine in ((96, 2, True), (64, 0, False), (200, 5, True)):
    norm = torch.nn.LayerNorm(features, elementwise_affine=affine)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    states, update, layer = torch.randn(2, 5, features) * 3 + 1, torch.randn(2, 5, features), torch.nn.Linear(features, 72)
    first, second = torch.randn(2, 6 * features), torch.randn(2, 6 * features)
    with torch.inference_mode():
        for kind in (ours, plain):
            total, seen = kind.add_and_modulate(states, update, first, norm, second, text, rounded=None)
            made = [total, *seen, *kind.modulate(states, norm, first, text, rounded=None), kind.add(states, update, first, text)]
            made += [*kind.gelu(layer, (states,), "tanh", rounded=None), *kind.gelu(layer, (states,), "none", rounded=None), *kind.inputs(states, rounded=None)]
            if kind is ours:
                found = made
        for one, other in zip(found, made, strict=True):
            check(one, other)
        expected = plain.add_and_modulate(states, update, first, norm, second, text, rounded=None)[1][0]
        for to in (block_torch.FP8, block_torch.INT8):
            seen = ours.add_and_modulate(states, update, first, norm, second, text, rounded=to)[1]
            for (rows, scales), exact in (
                (seen, expected), (ours.inputs(states, rounded=to), states), (ours.gelu(layer, (states,), "tanh", rounded=to), made[4])
            ):
                assert rows.shape == exact.shape and rows.dtype == to
                levels, right = block_torch.quantize_rows(exact.flatten(0, 1), to)
                assert (scales - right).abs().max() <= 1e-4 * right.max()
                if to is block_torch.INT8:  # values that differ in the last digit may lie between two levels
                    far = rows.flatten(0, 1).int() - levels.int()
                    assert far.abs().max() <= 1 and far.count_nonzero() <= 0.01 * far.numel()
                else:  # the interpreter cuts digits off where a GPU rounds to the nearest
                    assert (rows.flatten(0, 1).float() * scales - exact.flatten(0, 1)).abs().max() <= 0.15 * exact.abs().max()

ties = torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 127)]) * torch.arange(0, 99, 3)[:, None]
rows, scales = ours.inputs(ties[None], rounded=block_torch.INT8)
levels, right = block_torch.quantize_rows(ties, block_torch.INT8)
assert torch.equal(rows[0], levels) and torch.equal(scales, right) and levels[1:, 1:].remainder(2).count_nonzero() == 0

int8_product.AT_ONCE = 256 * 136  # two parts, of which the second has fewer rows than a product on a GPU
for bias in (True, False):
    linear = torch.nn.Linear(24, 136, bias=bias)
    layer, states = Int8Linear(linear), torch.randn(2, 137, 24)
    with torch.inference_mode():
        inputs = ours.inputs(states, rounded=block_torch.INT8)
        levels, right = layer.quantize(states.flatten(0, 1))
        assert torch.equal(inputs[0].flatten(0, 1), levels) and torch.equal(inputs[1], right)
        check(layer(*inputs), layer(states))
        check(layer.product(states.flatten(0, 1)), layer(states).flatten(0, 1))
        for bad in (torch.nan, torch.inf):  # what has failed must not become numbers
            broken = states.index_fill(2, torch.tensor(5), bad)
            broken[:, 1:] = states[:, 1:]
            made = layer(*ours.inputs(broken, rounded=block_torch.INT8))
            assert not made[:, 0].isfinite().any() and made[:, 1:].isfinite().all()
        rows, scales = ours.gelu(layer, inputs, "tanh", rounded=block_torch.INT8)
        levels, right = block_torch.quantize_rows(plain.gelu(layer, (states,), "tanh", rounded=None)[0].flatten(0, 1), block_torch.INT8)
        assert (scales - right).abs().max() <= 1e-5 * right.max()
        far = rows.flatten(0, 1).int() - levels.int()
        assert rows.shape == (2, 137, 136) and far.abs().max() <= 1 and far.count_nonzero() <= 0.01 * far.numel()

for head_dim in (32, 40, 48, 64):  # 48 is the demo's, 64 that of every published model
    norm, tables = torch.nn.LayerNorm(head_dim), (torch.randn(5, head_dim), torch.randn(5, head_dim))
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    states = torch.randn(2, 5, 12, head_dim) * 3 + 1
    for parts, chosen in ((1, tables), (2, None), (4, tables)):
        with torch.inference_mode():
            found, expected = (kind.normal_heads(states, norm, chosen, 0.7, fp8=False, parts=parts) for kind in (ours, plain))
            check(found, expected)
            assert torch.equal(ours.spread(states, parts), plain.spread(states, parts))
            assert torch.equal(ours.join(found), plain.join(found)) and torch.equal(ours.join(ours.spread(states, parts)), states.flatten(2))
    for first, count in ((0, 1), (2, 2), (3, 1)):  # of 4 parts: what this rank attends to itself lies elsewhere, each part for itself
        room = torch.zeros(2, count, 3, 5, 3, head_dim)
        own = block_torch.Own(room[:, :, 1], first)
        others = [part for part in range(4) if part not in range(4)[own.parts]]
        for make in (lambda kind, **where: kind.spread(states, 4, **where), lambda kind, **where: kind.normal_heads(states, norm, tables, 0.7, fp8=False, parts=4, **where)):
            with torch.inference_mode():
                found, expected = make(ours, own=own), make(plain)
            check(own.memory, expected[:, own.parts])
            check(found[:, others], expected[:, others])
            assert not room[:, :, ::2].any()
    pitched = torch.zeros(5, 2, 12, head_dim)
    ours.put(states[1], pitched[:, 1])
    assert torch.equal(pitched[:, 1], states[1]) and not pitched[:, 0].any()
"""

VIDEOS = """
import sys
from dataclasses import replace
import torch
from parallel_backend.cli.bench_table import distance, text_states
from parallel_backend.cogvideox.transformer import block
from parallel_backend.cogvideox.attention import choice
from parallel_backend.cogvideox.attention.function import Kind
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.engine.engine import Engine
from parallel_backend.model import Model
from parallel_backend.jobs import SampleJob, empty_latent
from parallel_backend.parallel.rank import RankContext

block.why_not_compiled = lambda *about: None
torch.manual_seed(0)
for path, (width, height, frames), cfg in zip(sys.argv[1:], ((48, 48, 5), (64, 48, 5), (32, 48, 5)), (6.0, 1.0, 6.0)):
    checkpoint = Checkpoint.open(path)
    positive, negative = text_states(checkpoint)
    latent = empty_latent(width=width, height=height, frames=frames, channels=checkpoint.channels)
    job = SampleJob(Model(path), positive, latent, negative if cfg > 1 else None, steps=1, cfg=cfg, scheduler="ddim")
    expected = Engine(RankContext(torch.device("cpu"))).run(job)
    result = Engine(RankContext(torch.device("cpu"))).run(replace(job, model=replace(job.model, compile="on")))
    assert not result.report.notes and 0 < (result.tensor - expected.tensor).abs().max() <= 1e-4
for kind, most in (("fp8", 0.15), ("int8", 0.05)):  # the interpreter cuts digits of FP8 off where a GPU rounds to the nearest
    in_8_bits = replace(job, model=replace(job.model, compile="on", quantize=kind))
    engine = Engine(RankContext(torch.device("cpu")))
    found = engine.run(in_8_bits).tensor
    assert 1e-3 < distance(found, expected.tensor) < most
    assert engine.cache.held["transformer"][1].transformer_blocks[0].ff.net[0].proj.takes.itemsize == 1
plain = replace(in_8_bits, model=replace(in_8_bits.model, compile="off"))
assert distance(found, Engine(RankContext(torch.device("cpu"))).run(plain).tensor) < 0.5 * distance(found, expected.tensor)  # in int8
"""


@pytest.fixture
def in_triton():
    """Runs a program of its own, in which Triton interprets: it decides that when it is imported."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")

    def run(program: str, *words: str) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=REPO, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.mark.slow
def test_kernels_compute_what_torch_does(in_triton):
    in_triton(KERNELS)


@pytest.mark.slow
def test_blocks_with_kernels_give_the_same_latents(in_triton, tmp_path):
    """Of two blocks: the interpreter takes a second for each, and what a third passes on the second has passed on."""
    in_triton(VIDEOS, *(str(build(tmp_path / like, like=like, layers=2)) for like in ("2b", "5b", "1.5-5b")))


def test_a_cpu_has_no_use_for_kernels_and_says_so(make_job):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    expected = executor.sample(job)
    result = executor.sample(with_model(job, compile="on"))
    assert not expected.report.notes
    assert result.report.notes == ("not compiled, so slower: its kernels are for GPUs",)
    assert torch.equal(result.tensor, expected.tensor) and executor.engine.cache.loads == 1


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(make_job, monkeypatch):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    expected = executor.sample(job).tensor
    monkeypatch.setattr(block, "why_not_compiled", lambda *about: "there is no C compiler")
    result = executor.sample(with_model(job, compile="on"))
    assert result.report.notes == ("not compiled, so slower: there is no C compiler",)
    assert torch.equal(result.tensor, expected)


def test_fp8_attention_says_where_it_is_not_to_be_had(make_job):
    executor = LocalExecutor(torch.device("cpu"))
    result = executor.sample(with_model(make_job("5b", steps=2), fp8="all"))
    assert result.report.notes == ("attention is not in FP8: it needs a Hopper GPU, such as an H100",)


def test_attention_is_torch_s_own_where_there_is_no_other():
    states = [torch.randn(2, 9, 3, 16) for _ in range(3)]
    function = choice.fastest_alone(Kind(torch.device("cpu"), torch.bfloat16, 16), 9)
    weights = torch.einsum("bqhd,bkhd->bhqk", states[0], states[1]).div(4).softmax(-1)
    assert function.name == "torch"
    assert (function.attend(*states) - torch.einsum("bhqk,bkhd->bqhd", weights, states[2])).abs().max() <= 1e-5


def test_a_step_may_begin_before_the_one_before_it_is_told_and_the_video_is_the_same(make_job, local, monkeypatch):
    job = make_job("5b", size=(48, 48, 5), steps=4, scheduler="dpm")
    expected, told, begun = local.sample(job).tensor, [], []

    def begins(module, args, kwargs):
        begun.append(len(told))

    class Ahead(RankContext):
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
