"""Linear layers in FP8 and int8 give a video that is near, in every plan, and what cannot be done is said. A GPU's part: test_gpu.py."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from parallel_backend.cli.bench_table import distance
from parallel_backend.cogvideox.attention import timings
from parallel_backend.cogvideox.attention.timings import Timings
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.kernels import int8_product
from parallel_backend.cogvideox.kernels.probe import once
from parallel_backend.cogvideox.transformer import int8_choice, quantized_linear
from parallel_backend.cogvideox.transformer.int8_choice import KITCHEN, TORCH, fastest_of
from parallel_backend.cogvideox.transformer.quantized_linear import KINDS, Int8Linear
from parallel_backend.errors import RequestError
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.model import Model
from parallel_backend.notes import is_warning

from .conftest import REPO
from .support.comfyui_server import find_comfyui, find_python
from .support.ranks import results_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ERRORS = {"fp8": (0.005, 0.06), "int8": (0.002, 0.02)}
"""The least and the largest relative error of a product."""


def with_model(job, **settings):
    """The job with another setting of its model."""
    return replace(job, model=replace(job.model, **settings))


@pytest.fixture
def executor() -> LocalExecutor:
    return LocalExecutor(CPU)


@pytest.mark.parametrize("kind, like", [("fp8", "2b"), ("fp8", "1.5-5b-i2v"), ("int8", "5b")])
def test_a_video_is_near_float32_and_the_layers_take_a_quarter_of_it(kind, like, executor, make_job, checkpoints):
    settings = {"image": torch.randn(1, 16, 1, 6, 6)} if like.endswith("i2v") else {}
    job, held = make_job(like, size=(48, 48, 9), steps=2, scheduler="ddim", **settings), executor.engine.cache.held
    exact = executor.sample(job).tensor
    before = sum(weight.nbytes for weight in held["transformer"][1].parameters())
    result = executor.sample(with_model(job, quantize=kind))
    assert 1e-4 < distance(result.tensor, exact) < 0.1
    after = sum(weight.nbytes for weight in held["transformer"][1].parameters())
    assert before - after == quantized_linear.saved_bytes(Checkpoint.open(checkpoints[like]), torch.float32) > 0.4 * before


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_merged_before_weights_are_rounded(kind, executor, make_job, local):
    settings = {"size": (48, 48, 5), "steps": 2, "scheduler": "ddim"}
    job, plain = make_job("5b", lora=0.8, **settings), with_model(make_job("5b", **settings), quantize=kind)
    exact = local.sample(job).tensor
    before = executor.sample(plain).tensor
    merged = executor.sample(with_model(job, quantize=kind)).tensor
    assert distance(merged, exact) < 0.5 * distance(before, exact)
    assert torch.equal(executor.sample(plain).tensor, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_rounded_numbers(kind):
    linear, states = torch.nn.Linear(64, 32), torch.randn(2, 5, 64)
    layer = KINDS[kind](linear)
    rounded = [rows.float() * scales for rows, scales in map(layer.quantize, (states.flatten(0, 1), linear.weight))]
    expected = (rounded[0] @ rounded[1].T + linear.bias).unflatten(0, (2, 5))
    assert (layer(states) - expected).abs().max() <= 1e-5
    least, most = ERRORS[kind]
    assert least < distance(layer(states), linear(states)) < most
    assert layer.weight.itemsize == 1


def test_int8_uses_the_whole_range_and_rounds_to_the_nearest():
    rows = torch.tensor([[1.27, -0.635, 0.0149, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found, scales = quantized_linear.quantize_rows(rows, torch.int8)
    assert found.tolist() == [[127, -64, 1, 0], [0, 0, 0, 0]] and scales[0].item() == pytest.approx(0.01)


@pytest.mark.slow
def test_every_plan_gives_the_video_of_single_to_the_tolerance_of_rounding(make_job, local, tmp_path):
    plain = make_job("5b", size=(80, 48, 5), steps=1, scheduler="ddim", lora=0.8)
    jobs, exact = [with_model(plain, quantize=kind) for kind in KINDS], local.sample(plain).tensor
    alone = [local.sample(job).tensor for job in jobs]
    for plan, (made, _) in results_of(tmp_path, jobs, ["cfg2", "ulysses2", "cfg2-fsdp2", "tensor2"]).items():
        # In tensor2 a row's scale is that of a rank's columns. Elsewhere all numbers are rounded alike, until a sum in another order
        # makes one fall to the other side.
        share = 1.5 if plan == "tensor2" else 0.5
        for job, found, expected in zip(jobs, made, alone):
            assert distance(found, expected) < share * distance(expected, exact), (plan, job.model.quantize)


def test_a_workflow_saved_with_fp8_means_what_it_did(executor, make_job):
    job = make_job("5b", size=(48, 48, 5), steps=2)
    found = [executor.sample(with_model(job, **words)).tensor for words in ({"fp8": "linears"}, {"quantize": "fp8"})]
    assert torch.equal(*found) and executor.engine.cache.loads == 1
    words = [("off", "off"), ("linears", "off"), ("all", "off"), ("all", "fp8"), ("off", "int8")]
    assert [Model("/a", fp8=fp8, quantize=kind).quantization for fp8, kind in words] == ["off", "fp8", "fp8", "fp8", "int8"]


@pytest.mark.parametrize("fp8", ["linears", "all"])
def test_two_roundings_of_the_same_layers_are_refused(fp8):
    with pytest.raises(RequestError, match=f"fp8 '{fp8}' and quantize 'int8' both round the linear layers; set one of them"):
        Model("/a", fp8=fp8, quantize="int8")


@pytest.fixture
def on_gpu_of(monkeypatch):
    """Makes torch say that its GPU has a compute capability, and everything else work there."""

    def be(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(quantized_linear, "why_no_product", lambda device, kind: None)
        monkeypatch.setattr(quantized_linear, "why_no_kitchen", lambda device: None)

    return be


def test_a_gpu_that_is_too_old_is_refused_and_hears_what_it_can_do(on_gpu_of):
    on_gpu_of("RTX 3090", (8, 6))
    said = quantized_linear.missing("fp8", GPU)
    assert said.startswith("fp8 needs a GPU of compute capability 8.9 or newer; RTX 3090 has 8.6: use quantize int8")
    assert quantized_linear.missing("int8", GPU) is None
    on_gpu_of("Tesla V100", (7, 0))
    assert quantized_linear.missing("int8", GPU).endswith("7.5 or newer; Tesla V100 has 7.0: use quantize off")
    on_gpu_of("RTX 4090", (8, 9))
    assert quantized_linear.missing("fp8", GPU) is quantized_linear.missing("fp8", CPU) is None


def emulated(states: torch.Tensor, weight, scales, bias, dtype: torch.dtype) -> torch.Tensor:
    """comfy-kitchen's product."""
    rows, factors = quantized_linear.quantize_rows(states.flatten(0, 1), torch.int8)
    product = torch.nn.functional.linear(rows.float() * factors, weight.float() * scales, bias.float())
    return product.to(dtype).unflatten(0, states.shape[:2])


@pytest.fixture
def kitchen(monkeypatch) -> SimpleNamespace:
    """A comfy-kitchen with kernels."""
    backends = {
        name: {"available": True, "capabilities": ["int8_linear"], "unavailable_reason": None} for name in ("cuda", "eager")
    }
    found = SimpleNamespace(int8_linear=emulated, list_backends=lambda: backends, backends=backends)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", found)
    monkeypatch.setattr(quantized_linear, "has_module", lambda name: found is not None)
    return found


def test_what_comfy_kitchen_lacks_is_said_where_torch_has_no_product_either(kitchen, on_gpu_of, monkeypatch):
    why_no_kitchen = quantized_linear.why_no_kitchen.__wrapped__
    assert why_no_kitchen(CPU) is None
    kitchen.backends["cuda"] |= {"available": False, "unavailable_reason": "built for CUDA 13"}
    assert why_no_kitchen(CPU) == "comfy-kitchen has no kernels here (cuda: built for CUDA 13)"
    del kitchen.int8_linear
    assert "too old" in why_no_kitchen(CPU)
    monkeypatch.setattr(quantized_linear, "has_module", lambda name: False)
    on_gpu_of("RTX 3090", (8, 6))
    monkeypatch.setattr(quantized_linear, "why_no_kitchen", why_no_kitchen)
    assert quantized_linear.missing("int8", GPU) is None
    monkeypatch.setattr(quantized_linear, "why_no_product", lambda device, kind: "not implemented")
    said = quantized_linear.missing("int8", GPU)
    assert said.endswith(
        "RTX 3090: not implemented, and the package comfy-kitchen is missing (pip install comfy-kitchen); use quantize off"
    )


def test_a_comfy_kitchen_whose_product_fails_or_is_wrong_is_not_used(kitchen):
    def fail(*arguments):
        raise RuntimeError("no kernel image is available")

    for product, reason in (
        (fail, "no kernel image is available"),
        (lambda *arguments: -emulated(*arguments), "its results are wrong"),
    ):
        kitchen.int8_linear = product
        assert once(quantized_linear.why_no_kitchen.__wrapped__)(CPU) == reason


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 300])
def test_torch_alone_multiplies_in_int8_a_few_rows_at_a_time(rows, bias, monkeypatch):
    layer, states = Int8Linear(torch.nn.Linear(64, 32, bias=bias)), torch.randn(1, rows, 64)
    monkeypatch.setattr(int8_product, "AT_ONCE", 64 * 128)
    given, multiply = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *those: given.append(len(those[0])) or multiply(*those))
    assert (layer.product(states[0]) - layer(states)[0]).abs().max() <= 1e-5
    assert given == ([128, 128, 44] if rows == 300 else [32])


@pytest.mark.parametrize(
    "offers, chosen, note",
    [
        ([Timings({TORCH: 2.0, KITCHEN: 3.0})], TORCH, "int8 products: torch, the faster of 2 here"),
        ([Timings({TORCH: 2.0, KITCHEN: 3.0}), Timings({TORCH: 9.0, KITCHEN: 8.0})], KITCHEN, "int8 products: comfy-kitchen, the faster of 2 here"),
        ([Timings({TORCH: 2.0, KITCHEN: 3.0}), Timings({KITCHEN: 0.0}, {TORCH: "wrong"})], KITCHEN, "int8 products: comfy-kitchen; without torch: wrong"),
        ([Timings({TORCH: 0.0})], TORCH, None),
        ([Timings({}, {TORCH: "wrong", KITCHEN: "missing"})], None, "int8 products: not fused, so slower; without torch: wrong; without comfy-kitchen: missing"),
    ],
)  # fmt: skip
def test_ranks_multiply_in_the_way_that_is_fastest_for_the_slowest(offers, chosen, note):
    assert fastest_of(offers) == (chosen, note)
    found = fastest_of(offers)[1]
    assert found is None or is_warning(found) == ("without" in found)


@pytest.fixture
def on_two_ways(monkeypatch, tmp_path) -> list:
    """A GPU on which both ways of a product work, torch's in two thirds of the time. Gives a list of what was called."""
    called = []
    monkeypatch.setattr(timings, "FILE", tmp_path / "attention.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    monkeypatch.setattr(int8_choice, "current", lambda device: nullcontext())
    monkeypatch.setattr(int8_choice, "why_not_rounded", lambda *about: None)
    monkeypatch.setattr(int8_choice, "why_no_kitchen", lambda device: None)
    monkeypatch.setattr(int8_choice, "Sample", lambda *about: about)
    monkeypatch.setattr(
        int8_choice, "seconds_of", lambda sample, name: called.append(name) or {TORCH: 2e-3, KITCHEN: 3e-3}[name]
    )
    return called


def test_both_ways_are_timed_once_and_again_with_another_comfy_kitchen(on_two_ways, monkeypatch):
    measured = int8_choice.measured.__wrapped__
    about = GPU, torch.float16, 3072
    assert measured(*about) == measured(*about) == Timings({TORCH: 2.0, KITCHEN: 3.0})
    assert on_two_ways.count(TORCH) == on_two_ways.count(KITCHEN) == 1 + int8_choice.ROUNDS
    monkeypatch.setattr(int8_choice, "version_of", lambda package: "9")
    measured(*about)
    assert on_two_ways.count(TORCH) == 2 * (1 + int8_choice.ROUNDS)
    monkeypatch.setattr(int8_choice, "why_no_kitchen", lambda device: "missing")
    assert measured(*about) == Timings({TORCH: 0.0})
    monkeypatch.setattr(int8_choice, "why_not_rounded", lambda *about: "wrong")
    assert measured(*about) == Timings({}, {TORCH: "wrong", KITCHEN: "missing"})


def test_a_way_that_fails_while_it_is_timed_is_left_out(on_two_ways, monkeypatch):
    def seconds_of(sample, name: str) -> float:
        if name == KITCHEN:
            raise RuntimeError("no kernel image")
        return 2e-3

    def no_memory(*about):
        raise torch.OutOfMemoryError("no memory")

    about = GPU, torch.float16, 3072
    monkeypatch.setattr(int8_choice, "seconds_of", seconds_of)
    assert int8_choice.measured.__wrapped__(*about) == Timings({TORCH: 2.0}, {KITCHEN: "no kernel image"})
    monkeypatch.setattr(int8_choice, "Sample", no_memory)
    assert int8_choice.measured.__wrapped__(*about) == Timings({}, {TORCH: "no memory", KITCHEN: "no memory"})
    assert not timings.FILE.exists()


def test_without_fused_kernels_comfy_kitchen_rounds_or_a_note_says_that_it_is_missing(
    on_two_ways, monkeypatch, executor, make_job
):
    executor.sample(with_model(make_job("5b", size=(48, 48, 5), steps=1), quantize="int8"))
    transformer = executor.engine.cache.held["transformer"][1]
    layers = [layer for layer in transformer.modules() if isinstance(layer, Int8Linear)]

    def use(*, compiled: bool) -> tuple[str | None, set]:
        note = int8_choice.use(transformer, GPU, torch.float16, lambda value: [value], compiled=compiled)
        return note, {layer.takes for layer in layers}

    assert use(compiled=False) == (None, {None})
    monkeypatch.setattr(int8_choice, "measured", int8_choice.measured.__wrapped__)
    assert use(compiled=True) == ("int8 products: torch, the faster of 2 here", {torch.int8})
    monkeypatch.setattr(int8_choice, "why_no_kitchen", lambda device: "comfy-kitchen is missing")
    assert use(compiled=False) == ("int8 products: torch; without comfy-kitchen: comfy-kitchen is missing, so slower", {None})
    assert use(compiled=True) == (None, {torch.int8})


def test_elsewhere_than_on_a_cpu_comfy_kitchen_multiplies_if_it_is_there(kitchen, monkeypatch):
    given = []
    monkeypatch.setattr(quantized_linear, "why_no_kitchen", lambda device: None)
    kitchen.int8_linear = lambda *arguments: given.append(arguments) or torch.empty(2, 5, 32, device="meta")
    layer = Int8Linear(torch.nn.Linear(64, 32, device="meta", dtype=torch.bfloat16))
    states = torch.empty(2, 5, 64, device="meta", dtype=torch.bfloat16)
    assert layer(states).shape == (2, 5, 32)
    assert [each is other for each, other in zip(given[0], (states, layer.weight, layer.scales, layer.bias))] == [True] * 4
    assert given[0][4] == torch.bfloat16 and layer.weight.dtype == torch.int8 and layer.scales.shape == (32, 1)


COMPARISON = """
import comfy_kitchen
import torch
from parallel_backend.cogvideox.transformer.quantized_linear import Int8Linear

torch.manual_seed(0)
for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
    layer, states = Int8Linear(torch.nn.Linear(256, 64, dtype=dtype)), torch.randn(2, 9, 256, dtype=dtype)
    with torch.inference_mode():
        ours, theirs = layer(states), comfy_kitchen.int8_linear(states, layer.weight, layer.scales, layer.bias, layer.dtype)
    assert theirs.dtype == ours.dtype and (ours - theirs).float().norm() <= near * ours.float().norm(), (ours - theirs).abs().max()
"""


@pytest.mark.skipif(find_comfyui() is None, reason="there is no ComfyUI")
def test_a_cpu_computes_what_comfyui_s_comfy_kitchen_does():
    done = subprocess.run(
        [find_python(find_comfyui()), "-c", COMPARISON], cwd=REPO, capture_output=True, text=True, timeout=600
    )
    if "No module named 'comfy_kitchen'" in done.stderr:
        pytest.skip("ComfyUI is older than comfy-kitchen")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_gpu_that_cannot_is_refused_in_one_line_and_the_next_job_works(executor, make_job, monkeypatch):
    job = make_job("5b", steps=2)
    expected = executor.sample(job).tensor
    monkeypatch.setattr(quantized_linear, "missing", lambda kind, device: f"{kind} needs another GPU")
    with pytest.raises(RequestError, match="int8 needs another GPU"):
        executor.sample(with_model(job, quantize="int8"))
    assert torch.equal(executor.sample(job).tensor, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trial_of_a_product_passes_where_it_is_right(kind, monkeypatch):
    trial = quantized_linear.why_no_product.__wrapped__
    assert trial(CPU, kind) is None
    monkeypatch.setattr(KINDS[kind], "forward", lambda self, states: torch.full((1, 128, 128), torch.nan))
    assert trial(CPU, kind) == "its results are wrong"
