"""The planner predicts by arithmetic: held to operations counted, to what two H100s measured, and to what fits."""

import json
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from parallel_backend import machines
from parallel_backend.backend import machine_of, resolve
from parallel_backend.bench.table import operations, text_states
from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.cogvideox.memory import transformer_bytes, working_bytes
from parallel_backend.cogvideox.work import work_of, work_of_job
from parallel_backend.costs import CPU, predict, weight_bytes
from parallel_backend.costs import working_bytes as planned_bytes
from parallel_backend.devices import Devices
from parallel_backend.jobs import Model, SampleJob, empty_latent
from parallel_backend.planner import assumed, choose, predictions
from parallel_backend.plans import Plan

from .conftest import REPO

H100, GIB = machines.KNOWN["H100"], 2**30
PCIE = replace(H100, link=machines.LINKS["pcie"])
PLANS = [
    "single",
    "cfg2",
    "ulysses2",
    "cfg2-fsdp2",
    "tensor2",
    "cfg2-tensor2-ulysses2-fsdp4",
    "pipefusion2",
    "cfg2-pipefusion3",
]


def test_a_step_of_5b_is_664_tflop():
    work = assumed(48, True)
    assert work.products + work.attention == 664_353_254_670_336


@pytest.fixture
def job(checkpoints) -> SampleJob:
    path = checkpoints["1.5-5b"]
    positive, negative = text_states(Checkpoint.open(path))
    return SampleJob(Model(str(path), fp8="linears"), positive, empty_latent(width=96, height=64, frames=13), negative)


def test_operations_and_bytes_are_those_that_the_benchmark_and_the_engine_count(job):
    checkpoint = Checkpoint.open(job.model.path)
    work, dtype = work_of_job(job, checkpoint, torch.device("cuda")), checkpoint.dtype("auto", torch.device("cuda"))
    # 13 frames are 4 latents, two to a token: no padding, which the benchmark leaves out
    assert work.products + work.attention == operations(checkpoint, job)
    for plan in map(Plan.parse, PLANS):
        assert weight_bytes(plan, work) == pytest.approx(transformer_bytes(checkpoint, plan, dtype, fp8=True), abs=8)
        assert planned_bytes(plan, work) == pytest.approx(working_bytes(job, checkpoint, plan, dtype), rel=0.01)


def measured() -> list[dict]:
    """Our rows of two H100s."""
    rows = json.loads((REPO / "benchmarks/results/h100x2.json").read_text())
    return [row for row in rows if row["name"] == "ours" and row["precision"] in ("lossless", "fp8", "fp8-all")]


def as_measured(row: dict):
    """The work of a row, and an H100 with the rates of that run: attention's follow the products'."""
    rows = json.loads((REPO / "benchmarks/results/h100x2.json").read_text())
    faster = median(each["peak_tflops"] for each in rows) * 1e12 / H100.matrix
    rates = {name: getattr(H100, name) * faster for name in ("matrix", "attention", "attention_fp16")}
    fp8 = {"lossless": "off", "fp8": "linears", "fp8-all": "all"}[row["precision"]]
    work = replace(assumed(48 if row["model"] == "5b" else 30, row["cfg"] > 1), fp8=fp8)
    if fp8 != "off":
        work = replace(work, matrices=work.matrices - 12 * work.layers * work.features**2)
    if row["model"] == "2b" and row["dtype"] == "auto":
        work = replace(work, dtype="fp16")
    return work, replace(H100, **rates)


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['model']}-{row['dtype']}-{row['plan']}-{row['precision']}")
def test_predictions_are_within_15_percent_of_measured_seconds_and_10_of_memory(row):
    found = predict(Plan.parse(row["plan"]), *as_measured(row))
    assert found.seconds == pytest.approx(row["seconds_per_step"], rel=0.15)
    assert found.peak / GIB == pytest.approx(row["peak_gib"], rel=0.10)


@pytest.mark.parametrize(
    "machine, world, guided, expected",
    [
        (H100, 1, True, "single"), (H100, 2, True, "cfg2"), (H100, 3, True, "ulysses3"), (H100, 4, True, "cfg2-ulysses2"),
        (H100, 8, True, "cfg2-ulysses4"), (H100, 2, False, "ulysses2"), (H100, 3, False, "ulysses3"),
        (H100, 4, False, "ulysses4"), (H100, 8, False, "ulysses8"),
        (PCIE, 1, True, "single"), (PCIE, 2, True, "cfg2"), (PCIE, 3, True, "ulysses3"), (PCIE, 8, True, "cfg2-ulysses4"),
        (PCIE, 4, False, "ulysses4"), (PCIE, 8, False, "ulysses8"),
        # two ranks send as much with either, and a ring hides half of it
        (PCIE, 2, False, "ring2"), (PCIE, 4, True, "cfg2-ring2"),
        (CPU, 2, True, "cfg2"), (CPU, 4, True, "cfg2-ulysses2"), (CPU, 2, False, "ulysses2"), (CPU, 4, False, "ulysses4"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_by_link_and_guidance(machine, world, guided, expected):
    plan, reason = choose(heads=48, world_size=world, guided=guided, machine=machine)
    assert str(plan) == expected
    assert "\n" not in reason and "predicted " in reason


def test_the_reason_says_what_was_predicted():
    plan, reason = choose(heads=48, world_size=2, machine=H100)
    assert reason == "cfg2 is predicted at 0.61 s a step, ulysses2 at 0.71 s; it exchanges least"


def test_where_rates_are_made_up_the_reason_states_no_seconds():
    assert choose(heads=48, world_size=1)[1] == "one device: nothing to split"
    _, reason = choose(heads=48, world_size=2)
    assert reason.startswith("cfg2 is predicted to take least, ulysses2 ") and reason.endswith("; it exchanges least")


def test_what_does_not_fit_is_not_chosen():
    small = replace(H100, free=10 * GIB)
    found = predictions(assumed(48, True), small, 2)
    assert {str(each.plan) for each in found if not each.fits} >= {"cfg2", "ulysses2", "ring2"}
    plan, reason = choose(heads=48, world_size=2, machine=small)
    assert str(plan) == "cfg2-fsdp2"
    assert reason.endswith("whole, the model would need 12.0 GiB and 9.0 can be counted on")


def test_where_nothing_fits_weights_stay_whole_for_offload_to_move():
    plan, reason = choose(heads=48, world_size=2, machine=replace(H100, free=2 * GIB))
    assert str(plan) == "cfg2"
    assert reason.endswith("no plan fits into 2 GiB, so offload lets weights wait on the CPU")


def test_no_fsdp_is_chosen_for_weights_that_wait_on_the_cpu():
    plan, _ = choose(heads=48, world_size=2, machine=replace(H100, free=10 * GIB, can_shard=False))
    assert plan.fsdp == 1


def test_only_guidance_has_halves_to_share():
    assert all(each.plan.cfg == 1 for each in predictions(assumed(48, False), H100, 8))


def test_resolve_predicts_for_the_work_it_is_given(checkpoints):
    checkpoint = Checkpoint.open(checkpoints["5b"])
    seen = []

    def work(device):
        seen.append(device.type)
        return work_of(checkpoint, device, guided=False)

    plan, _, reason = resolve("auto", "cpu:2", heads=checkpoint.heads, guided=False, work=work)
    assert (str(plan), seen) == ("ulysses2", ["cpu"]) and reason.startswith("ulysses2 is predicted to take least, ring2 ")


@pytest.fixture
def measure(tmp_path, monkeypatch) -> list:
    """What is measured, with a file of its own to be kept in."""
    taken = []
    monkeypatch.setattr(machines, "CALIBRATION", tmp_path / "new" / "rates.json")
    monkeypatch.setattr(machines, "measure", lambda device: taken.append(device) or dict.fromkeys(machines.MEASURED, 7e12))
    return taken


def test_rates_are_measured_once_for_a_gpu_and_a_torch_and_read_again(measure):
    for name, torch_version in [("H100", "2.13"), ("H100", "2.13"), ("H100", "2.14"), ("A100", "2.13"), ("H100", "2.13")]:
        assert machines.calibrated(name, torch_version, "cuda:0")["matrix"] == 7e12
    assert len(measure) == 3


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"H100, torch 2.13": {"matrix": -1}}', '{"H100, torch 2.13": 3}'])
def test_broken_rates_are_measured_anew(measure, broken):
    machines.CALIBRATION.parent.mkdir()
    machines.CALIBRATION.write_text(broken)
    for _ in range(2):
        assert machines.calibrated("H100", "2.13", "cuda:0")["matrix"] == 7e12
    assert len(measure) == 1


def test_a_gpu_that_cannot_be_measured_now_is_assumed(measure, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(machines, "measure", full)
    assert machines.calibrated("H100", "2.13", "cuda:0") is None
    assert not machines.CALIBRATION.exists()


def test_gpus_are_known_by_a_part_of_their_name():
    assert machines.known("NVIDIA H100 80GB HBM3").name == "H100"
    assert machines.known("NVIDIA L40S").name == "L40S"
    assert machines.known("NVIDIA GeForce RTX 4090").name == "4090"
    assert machines.known("NVIDIA T4").matrix == machines.UNKNOWN.matrix


def test_messages_between_machines_go_through_the_network():
    work, slow = assumed(48, True), replace(H100, network=replace(H100.network, bandwidth=1e9))
    inside, across = (predict(Plan.parse(plan), work, slow) for plan in ("cfg2-ulysses8", "cfg2-ulysses16"))
    assert inside.seconds < across.seconds / 5
    unaligned = predict(Plan.parse("cfg2-ulysses6"), work, slow)  # ranks 6 to 11 are on both machines
    assert unaligned.seconds > predict(Plan.parse("cfg2-ulysses6"), work, replace(slow, per_machine=6)).seconds * 5


def test_the_page_has_the_predictions_of_this_code():
    from benchmarks.plans_table import MARKS, PAGE, tables

    assert f"{MARKS[0]}\n{tables()}\n{MARKS[1]}" in PAGE.read_text()


@pytest.fixture
def gpus(measure, monkeypatch):
    """Makes this machine one with GPUs of a name, whose memory can be reached from each other or not."""

    def make(name: str, *, reached: bool = True, free: int = 70 * GIB) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda first, other: reached)

    return make


@pytest.mark.parametrize(
    "name, reached, link",
    [
        ("NVIDIA H100 80GB HBM3", True, "nvlink"), ("NVIDIA H100 80GB HBM3", False, "pcie"),
        ("NVIDIA H100 PCIe", True, "pcie"), ("NVIDIA GeForce RTX 4090", True, "pcie"), ("NVIDIA T4", True, "pcie"),
    ],
)  # fmt: skip
def test_gpus_that_are_here_are_measured_and_their_link_is_known_by_name_and_reach(gpus, measure, name, reached, link):
    gpus(name, reached=reached)
    found = machines.here(Devices("cuda", (0, 1)))
    assert (found.name, found.link, found.free, found.per_machine) == (name, machines.LINKS[link], 75 * GIB, 2)
    assert found.matrix == found.attention == found.bandwidth == 7e12 and found.knows_seconds
    assert len(measure) == 1


def test_one_gpu_is_not_measured(gpus, measure):
    gpus("NVIDIA H100 80GB HBM3")
    assert machines.here(Devices("cuda", (0,))).matrix == H100.matrix
    assert not measure


def test_a_running_group_of_ours_holds_memory_that_a_job_is_to_have(gpus, monkeypatch):
    gpus("NVIDIA H100 80GB HBM3", free=1 * GIB)
    two = Devices("cuda", (0, 1))
    assert machine_of(two).free == 6 * GIB
    group = SimpleNamespace(describe=lambda: {"devices": "0,1"})
    monkeypatch.setattr("parallel_backend.group.address.running", lambda: [group])
    assert machine_of(two).free == 80 * GIB
