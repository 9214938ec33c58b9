"""How models fit into GPUs is predicted as the engine decides, and for models that are not here."""

import json
import re
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from benchmarks.plans_table import RESULTS
from benchmarks.random_weights import transformer_config
from parallel_backend.cli.cards import GIB, by_gpu, by_memory, fitted
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint import published, shards
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.errors import RequestError
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.fit import decode_way, fit
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import Model
from parallel_backend.plan import Plan
from parallel_backend.planner.cost_model import predict
from parallel_backend.planner.gpu_table import known
from parallel_backend.planner.machine import Link
from parallel_backend.planner.planner import assumed
from parallel_backend.workload import work_of_job

CPU = torch.device("cpu")
LIKES = {"2b": "2b", "5b": "5b", "5b-i2v": "5b-i2v", "1.5": "1.5-5b", "1.5-i2v": "1.5-5b-i2v", "fun-5b-control": "5b-control"}


def count(model: torch.nn.Module) -> int:
    """Returns the number of a model's weights; those that two modules share count once."""
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name, like", LIKES.items())
def test_a_published_model_has_the_weights_of_the_benchmark_s_model_of_full_size(name, like):
    skeleton = shards.skeleton(transformer_config(like, full_size=True), torch.bfloat16)
    expected = {name: tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    found = published.find(name)
    assert {name: where.shape for name, where in found.stored.items()} == expected
    assert found.task == {"i2v": "image", "control": "control"}.get(like.rpartition("-")[2], "text")


def test_vae_and_text_encoder_have_as_many_weights_as_their_libraries_make():
    with init_empty_weights():
        vae = AutoencoderKLCogVideoX()
        sizes = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        text = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    assert count(vae) == published.VAE_ELEMENTS
    shared = count(text.shared)
    apart = text.encoder.embed_tokens.weight is not text.shared.weight  # on the meta device they are not tied
    assert count(text) - shared * apart == published.TEXT_ENCODER_ELEMENTS


def test_models_here_are_found_before_published_ones_and_unknown_ones_are_refused(checkpoints):
    assert published.find("demo").name == "demo" and published.find(str(checkpoints["5b"])).path == checkpoints["5b"]
    assert published.find("ZAI-org/cogvideox-5B").name == "zai-org/CogVideoX-5b"
    with pytest.raises(RequestError, match="there is no checkpoint folder"):
        published.find("7b")


def test_offload_is_predicted_as_the_engine_chooses_it(checkpoints, make_job, monkeypatch):
    job, checkpoint = make_job("5b"), Checkpoint.open(checkpoints["5b"])
    work = work_of_job(job, checkpoint, CPU)
    engine, seen = LocalExecutor(CPU).engine, set()
    weights = checkpoint.weight_bytes("transformer", torch.float32)
    for free in (weights * share // 100 for share in range(10, 400, 10)):
        monkeypatch.setattr(offload, "free_bytes", lambda device, free=free: free)
        expected = engine.cache._choose_offload(job, checkpoint, torch.float32)
        found = fit(checkpoint, work, replace(known("RTX 3090"), free=free), 1, size=(64, 48, 9))
        assert found.offload == expected
        assert not (found.offload == "none" and not found.fits)
        seen.add(expected)
    assert seen == {"none", "model", "group", "sequential"}


def test_tiles_are_predicted_as_the_engine_uses_them(checkpoints, monkeypatch):
    size, latent = (64, 64, 5), torch.zeros(1, 16, 2, 8, 8)
    decided = set()
    for free in (2**exponent for exponent in range(22, 36)):
        monkeypatch.setattr(offload, "free_bytes", lambda device, free=free: free)
        result = LocalExecutor(CPU).decode(DecodeJob(Model(str(checkpoints["5b"])), latent))
        tiled = any(note.startswith("VAE in tiles of ") for note in result.report.notes)
        assert decode_way(size, torch.float32, free, 0, 1) == (tiled, False)
        decided.add(tiled)
    assert decided == {True, False}


SMALL = [
    row
    for file in ("h100-small-2026-11-28.json", "h100x2-small-2026-11-27.json")
    for row in json.loads((RESULTS / file).read_text())
]
"""Rows of H100s of which each process was allowed so much memory."""


@pytest.mark.parametrize(
    "row", SMALL, ids=[f"{row['gpus']}-{row['model']}-{row['precision']}-{row['memory_gib']}" for row in SMALL]
)
def test_what_fits_in_little_memory_was_measured_so(row):
    machine = replace(known("H100"), free=int(row["memory_gib"]) * GIB)
    quantize = "int8" if row["precision"] == "int8" else "off"
    found = fitted(published.find(row["model"].removesuffix("-5b")), machine, row["gpus"], quantize=quantize)
    notes = " ".join(row["notes"])
    offload = re.search(r"offload '(\w+)'", notes)
    assert (str(found.plan), found.offload) == (row["plan"], offload[1] if offload else "none")
    assert found.peak / GIB == pytest.approx(row["peak_gib"], rel=0.1)
    assert found.is_tiled == ("VAE in tiles" in notes)


def test_a_strip_on_each_of_two_gpus_is_predicted_as_it_was_measured():
    """``cfg2-fsdp2`` of 5b in 11 GiB a GPU decoded whole, as the transformer made room (benchmarks/results/h100x2-small-2026-11-27.json)."""
    vae, weights = 0.4 * 2**30, 5.2 * 2**30
    size = (720, 480, 49)
    assert decode_way(size, torch.bfloat16, 11 * 2**30 - vae, weights, 2) == (False, True)
    assert decode_way(size, torch.bfloat16, 11 * 2**30 - vae, weights, 1) == (True, False)
    assert decode_way(size, torch.bfloat16, 7 * 2**30 - vae, 0, 2) == (True, False)


def test_the_page_of_cards_has_the_tables_of_the_command():
    page = (published.bundled.SHIPPED.parents[1] / "docs" / "cards.md").read_text()
    for table in (by_memory(), by_gpu()):
        assert "\n".join(table) in page


def test_the_page_of_plans_has_the_bytes_and_seconds_that_are_predicted_on_a_slow_link():
    page = (published.bundled.SHIPPED.parents[1] / "docs" / "plans.md").read_text()
    for plan in ("cfg2", "cfg2-fsdp2", "ring2", "ulysses2", "tensor2"):

        def on(gpu: str, plan=plan) -> list[float]:
            links = (Link(bandwidth, 30e-6) for bandwidth in (7e9, 12e9, 25e9))
            return [predict(Plan.parse(plan), assumed(48, True), replace(known(gpu), link=link)).seconds for link in links]

        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{plan}` |") and " GB |" in line)
        sent, *numbers = map(float, re.findall(r"\d+\.\d+", row))
        expected = predict(Plan.parse(plan), assumed(48, True), known("RTX 3090")).sent / 1e9
        assert sent == pytest.approx(expected, rel=0.02, abs=0.001)
        assert numbers == pytest.approx([*on("RTX 3090"), *on("RTX 4090")], rel=0.005)
