"""The planner predicts by arithmetic: held to operations counted, to what two H100s measured, and to what fits."""

import itertools
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pages import END, mark_of
from benchmarks.plans_table import (
    EIGHT_BITS,
    NEWEST,
    NO_PEER_ACCESS,
    OLDER,
    PAGE,
    PUBLISHED,
    WAITED_FOR_FLAGS,
    as_measured,
    choices,
    measured,
    speedups,
    tables,
)
from parallel_backend.cli.bench_table import operations, text_states
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.offload import transformer_bytes, working_bytes
from parallel_backend.config import Config
from parallel_backend.devices import Devices
from parallel_backend.errors import RequestError
from parallel_backend.executor.continuing import spans_of
from parallel_backend.executor.resolve import machine_of, resolve
from parallel_backend.group.worker import remember
from parallel_backend.jobs import SampleJob, empty_latent
from parallel_backend.model import QUANTIZES, Model, Windows
from parallel_backend.plan import Plan
from parallel_backend.planner import gpu_table, hardware, hardware_cache
from parallel_backend.planner.computation import vae_seconds
from parallel_backend.planner.cost_model import predict, weight_bytes
from parallel_backend.planner.cost_model import working_bytes as planned_bytes
from parallel_backend.planner.machine import CPU, Link
from parallel_backend.planner.planner import approximations, assumed, choose, predictions
from parallel_backend.planner.work import VAE_OPERATIONS
from parallel_backend.workload import Workload, work_of, work_of_job

H100, GIB = gpu_table.KNOWN["H100"], 2**30
PCIE, L40 = replace(H100, link=gpu_table.LINKS["pcie"]), gpu_table.KNOWN["L40"]
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


TILE = replace(assumed(48, False), tokens=226 + 5 * 64 * 64, pixels=33 * 1024 * 1024)
"""Of 1024 x 1024 pixels with 33 frames, by a model of 1.5's shape."""


def test_the_vae_s_operations_are_those_that_are_counted():
    blocks = {"down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4}
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        vae = AutoencoderKLCogVideoX(block_out_channels=[128, 256, 256, 512], latent_channels=16, **blocks)
        vae.encode(torch.empty(1, 3, 33, 256, 256))
        vae.decode(torch.empty(1, 16, 9, 32, 32))
    assert counted.get_total_flops() == pytest.approx(VAE_OPERATIONS * 33 * 256 * 256, rel=0.02)


def test_a_decode_is_predicted_as_two_h100s_took_it():
    share = 18.6e6 / VAE_OPERATIONS
    for plan, took in (("single", 0.766), ("ulysses2", 0.478)):
        found = vae_seconds(Plan.parse(plan), replace(TILE, pixels=int(share * 49 * 480 * 720)), H100)
        assert found == pytest.approx(took, rel=0.03)


@pytest.mark.parametrize("machine", [H100, CPU], ids=["H100", "cpu"])
def test_replicas_share_tiles_where_they_finish_sooner(machine):
    names = [str(choose(TILE, machine, 2, jobs=tiles, unit="tiles")[0]) for tiles in (1, 2, 3, 7)]
    assert names == ["ulysses2", "replicas2", "ulysses2", "replicas2"]
    alone = replace(TILE, pixels=0)  # the model alone is split better than the VAE
    assert str(choose(alone, machine, 2, jobs=7, unit="tiles")[0]) == "ulysses2"


def test_a_tile_takes_one_step_so_the_reason_names_none():
    words = choose(TILE, H100, 2, jobs=2, unit="tiles")[1]
    assert words.startswith("replicas2 is predicted at 3.00 s for all 2 tiles, ulysses2 at 3.62 s")
    assert choose(TILE, H100, 1, jobs=2, unit="tiles")[1].endswith("predicted at 6.00 s for all 2 tiles")
    assert "s a tile, " in choose(TILE, H100, 2, unit="tiles")[1]


def test_a_step_of_5b_is_664_tflop():
    work = assumed(48, True)
    assert work.products + work.attention == 664_353_254_670_336


@pytest.fixture
def job(checkpoints) -> SampleJob:
    path = checkpoints["1.5-5b"]
    positive, negative = text_states(Checkpoint.open(path))
    return SampleJob(Model(str(path), quantize="int8"), positive, empty_latent(width=96, height=64, frames=13), negative)


def test_operations_and_bytes_are_those_that_the_benchmark_and_the_engine_count(job):
    checkpoint = Checkpoint.open(job.model.path)
    work, dtype = work_of_job(job, checkpoint, torch.device("cuda")), checkpoint.dtype("auto", torch.device("cuda"))
    # 13 frames are 4 latents, two to a token: no padding, which the benchmark leaves out
    assert work.products + work.attention == operations(checkpoint, job)
    for plan in map(Plan.parse, PLANS):
        assert weight_bytes(plan, work) == pytest.approx(transformer_bytes(checkpoint, plan, dtype, quantized=True), abs=8)
        assert planned_bytes(plan, work) == pytest.approx(working_bytes(job, checkpoint, plan, dtype), rel=0.01)


ROWS = [(file, row) for file in (*NEWEST, EIGHT_BITS, "h100x2.json", *OLDER) for row in measured(file)]
ROWS = [(file, row) for file, row in ROWS if file not in WAITED_FOR_FLAGS or "ulysses" not in row["plan"]]
NAMES = [
    f"{file}-{row['model']}-{row['dtype']}-{row['plan']}-{row['precision']}-{row.get('attention', 'auto')}-{row['steps']}"
    for file, row in ROWS
]


@pytest.mark.parametrize("file, row", ROWS, ids=NAMES)
def test_predictions_are_within_15_percent_of_measured_seconds_and_10_of_memory(file, row):
    found = predict(Plan.parse(row["plan"]), *as_measured(row, file))
    assert found.seconds == pytest.approx(row["seconds_per_step"], rel=0.15)
    assert found.peak / GIB == pytest.approx(row["peak_gib"], rel=0.10)


def test_without_peer_access_the_order_of_plans_is_the_measured_one_and_the_page_has_its_seconds():
    took = {row["plan"]: row["seconds_per_step"] for row in measured(NO_PEER_ACCESS)}
    machine = replace(H100, link=Link(24.7e9, 30e-6))  # as the group measured it in that run
    predicted = {plan: predict(Plan.parse(plan), assumed(48, True), machine).seconds for plan in took}
    assert len(took) == 7 and sorted(took, key=took.get) == sorted(predicted, key=predicted.get)
    assert predicted == pytest.approx(took, rel=0.15)
    assert str(choose(assumed(48, True), machine, 2)[0]) == min(took, key=took.get)
    row = f"| {' | '.join(f'{took[plan]:.3f}' for plan in sorted(took, key=took.get))} |"
    assert row in (PAGE.parents[1] / "docs" / "plans.md").read_text()


@pytest.mark.parametrize(
    "machine, world, guided, expected",
    [
        (H100, 1, True, "single"), (H100, 2, True, "cfg2"), (H100, 3, True, "ulysses3"), (H100, 4, True, "cfg2-ulysses2"),
        (H100, 8, True, "cfg2-ulysses4"), (H100, 2, False, "ulysses2"), (H100, 3, False, "ulysses3"),
        (H100, 4, False, "ulysses4"), (H100, 8, False, "ulysses8"),
        (PCIE, 1, True, "single"), (PCIE, 2, True, "cfg2"), (PCIE, 8, True, "cfg2-ulysses4"),
        (PCIE, 4, False, "ulysses4"), (PCIE, 8, False, "ulysses8"),
        # two ranks send as much with either, and a ring hides half of it
        (L40, 2, False, "ring2"), (L40, 4, True, "cfg2-ring2"), (L40, 3, True, "ulysses3"),
        (CPU, 2, True, "cfg2"), (CPU, 4, True, "cfg2-ulysses2"), (CPU, 2, False, "ulysses2"), (CPU, 4, False, "ulysses4"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_by_link_and_guidance(machine, world, guided, expected):
    plan, reason = choose(assumed(48, guided), machine, world)
    assert str(plan) == expected
    assert "\n" not in reason and "predicted " in reason


@pytest.mark.parametrize(
    "machine, heads, world, expected, words",
    [
        # what seven ranks can be is one long ring
        (H100, 48, 7, "cfg2-ulysses3", "cfg2-ulysses3 on 6 of 7 devices is predicted at 0.20 s a step, ring7 on all at 0.53 s; more"),
        (PCIE, 48, 3, "cfg2", "cfg2 on 2 of 3 devices is predicted at "),
        # an assumed link may be faster than is assumed, and a group on all devices measures it
        (PCIE, 48, 8, "cfg2-ulysses4", "cfg2-ulysses4 is predicted at "),
        (replace(PCIE, knows_link=True), 48, 8, "cfg2", "cfg2 on 2 of 8 devices is predicted at 0.57 s a step, cfg2-ulysses4 on all"),
        (replace(H100, knows_link=True), 30, 8, "cfg2-ulysses3", "cfg2-ulysses3 on 6 of 8 devices is predicted at "),
        (replace(PCIE, link=replace(PCIE.link, bandwidth=2e8)), 48, 8, "cfg2", "cfg2 on 2 of 8 devices is predicted at "),
        (replace(PCIE, knows_seconds=False), 48, 3, "ulysses3", "ulysses3 is predicted to be the fastest, "),
    ],
)  # fmt: skip
def test_fewer_devices_are_chosen_where_more_would_be_slower_and_the_reason_says_so(machine, heads, world, expected, words):
    plan, reason = choose(assumed(heads, True), machine, world)
    assert (str(plan), reason.startswith(words)) == (expected, True), reason
    assert ("more devices do not make it faster" in reason) == (plan.world_size < world)


@pytest.mark.parametrize(
    "jobs, batch, expected, words",
    [
        (1, 1, "cfg2-ulysses2", " s a step, ulysses4 at "),
        (2, 1, "replicas2-cfg2", " s a step of all 2 videos, cfg2-ulysses2 at "),
        (3, 1, "cfg2-ulysses2", " s a step of all 3 videos, ulysses4 at "),  # a fourth replica would do nothing
        (8, 1, "replicas2-cfg2", " s a step of all 8 videos, "),
        (1, 2, "replicas2-cfg2", " s a step of all 2 videos, cfg2-ulysses2 at "),  # a batch is shared too
    ],
)
def test_videos_are_shared_by_replicas_where_all_are_done_sooner(jobs, batch, expected, words):
    work = assumed(48, True)
    plan, reason = choose(replace(work, prompts=2 * batch), H100, 4, jobs=jobs)
    assert (str(plan), words in reason) == (expected, True), reason
    assert choose(work, H100, 4, jobs=jobs, can_share=False)[0] == Plan(cfg=2, ulysses=2)


def test_what_replicas_share_is_named():
    words = choose(assumed(48, True), H100, 4, jobs=4, unit="windows")[1]
    assert words.startswith("replicas2-cfg2 is predicted at 1.13 s a step of all 4 windows, cfg2-ulysses2 at 1.20 s")


def test_replicas_have_room_for_one_video_each_and_as_many_as_are_busy_to_the_end():
    work = replace(assumed(48, True), prompts=2 * 5)
    found = {str(each.plan): each for each in predictions(work, H100, 4)}
    alone = predict(Plan(), assumed(48, True), H100)
    assert (found["replicas3"].rounds, found["replicas3"].peak) == (2, alone.peak)  # 2 + 2 + 1: a fourth changes nothing
    assert found["replicas3"].total == 2 * alone.seconds and "replicas4" not in found
    small = replace(H100, free=16 * GIB)
    fits = {str(each.plan): each.fits for each in predictions(work, small, 2)}
    assert not fits["cfg2"] and fits["replicas2"]


def test_a_slow_or_full_device_is_left_out_where_it_holds_the_others_up():
    slow = replace(L40, free=40 * GIB, per_machine=2)
    fast = replace(H100, free=70 * GIB, per_machine=1)
    machine = replace(slow, together=(fast, slow), link=H100.link)
    plan, reason = choose(assumed(48, True), machine, 2)
    assert plan == Plan() and reason.startswith("single on 1 of 2 devices is predicted at 1.13 s a step, cfg2 on all at 3.25 s")
    full = replace(H100, free=10 * GIB)
    plan, _ = choose(assumed(48, True), replace(full, together=(H100, full)), 2)
    assert plan == Plan(cfg=2, fsdp=2)  # which fits where a whole model does not, and is faster than the free one alone


@pytest.mark.parametrize("choice", choices(), ids=lambda choice: f"{choice.machine}-{choice.model}")
def test_the_choice_is_within_3_percent_of_the_fastest_plan_that_was_measured(choice):
    assert len(choice.others) >= 2 and choice.over <= 1.03


def test_xdit_s_published_curves_have_the_shape_that_is_predicted():
    curves = [pair for published in PUBLISHED for pair in speedups(*published).values()]
    assert len(curves) == 48
    assert sum(abs(predicted / measured - 1) <= 0.15 for measured, predicted in curves) >= 36


def test_the_reason_says_what_was_predicted():
    plan, reason = choose(assumed(48, True), H100, 2)
    assert reason == "cfg2 is predicted at 0.56 s a step, ulysses2 at 0.60 s; cfg2 sends the least"


def test_where_rates_are_made_up_the_reason_states_no_seconds():
    assert choose(assumed(48, True), CPU, 1)[1] == "one device: nothing to split"
    _, reason = choose(assumed(48, True), CPU, 2)
    assert reason.startswith("cfg2 is predicted to be the fastest, ulysses2 takes ") and reason.endswith(
        "; cfg2 sends the least"
    )


def test_what_does_not_fit_is_not_chosen():
    small = replace(H100, free=10 * GIB)
    found = predictions(assumed(48, True), small, 2)
    assert {str(each.plan) for each in found if not each.fits} >= {"cfg2", "ulysses2", "ring2"}
    plan, reason = choose(assumed(48, True), small, 2)
    assert str(plan) == "cfg2-fsdp2"
    assert reason.endswith("unsplit weights would need 13.3 GiB, 10.0 GiB are free")


def test_int8_is_predicted_to_be_faster_and_smaller_where_there_is_no_fp8():
    work = assumed(48, True)
    rounded = replace(work, quantize="int8", matrices=work.matrices - 12 * work.layers * work.features**2)
    plain, found = (predict(Plan(), each, hardware.KNOWN["A100"]) for each in (work, rounded))
    assert found.seconds < plain.seconds and found.peak < plain.peak
    assert predict(Plan(), replace(work, quantize="fp8"), hardware.KNOWN["A100"]).seconds == plain.seconds


@pytest.mark.parametrize("free", [0.1, 3, 9, 12.5, 14, 20, 80])
def test_a_plan_fits_where_a_device_has_what_is_shown_that_it_needs(free):
    for heads, quantize, prompts in itertools.product((30, 48), QUANTIZES, (1, 2, 4)):
        work = replace(assumed(heads, prompts > 1), quantize=quantize, prompts=prompts)
        for compiles in (True, False):
            machine = replace(H100, free=int(free * GIB), compiles=compiles)
            for each in [*predictions(work, machine, 4), *approximations(work, machine, 4)]:
                assert each.fits == (each.needed <= machine.free) and each.peak < each.needed


@pytest.mark.parametrize("said", ["24 GB", "0", "-1", "nan", "inf"])
def test_a_limit_of_memory_that_makes_no_sense_is_refused(said, monkeypatch):
    monkeypatch.setattr(hardware, "CONFIG", Config.read({"XDIT_MEMORY_GIB": said}))
    with pytest.raises(RequestError, match=f"XDIT_MEMORY_GIB is '{said}'; give GiB of each GPU"):
        hardware.allowed(GIB)


def test_where_nothing_fits_weights_stay_whole_for_offload_to_move():
    plan, reason = choose(assumed(48, True), replace(H100, free=2 * GIB), 2)
    assert str(plan) == "cfg2"
    assert reason.endswith("no plan fits into 2 GiB, so weights are offloaded to the CPU")


def test_no_fsdp_is_chosen_for_weights_that_wait_on_the_cpu():
    plan, _ = choose(assumed(48, True), replace(H100, free=10 * GIB, can_shard=False), 2)
    assert plan.fsdp == 1


def test_only_guidance_has_halves_to_share():
    assert all(each.plan.cfg == 1 for each in predictions(assumed(48, False), H100, 8))


def test_resolve_predicts_for_the_work_it_is_given(checkpoints):
    checkpoint = Checkpoint.open(checkpoints["5b"])
    seen = []

    def work(device):
        seen.append(device.type)
        return work_of(checkpoint, device, guided=False)

    plan, _, reason = resolve("auto", "cpu:2", Workload(checkpoint.heads, guided=False, work=work))
    assert (str(plan), seen) == ("ulysses2", ["cpu"]) and reason.startswith(
        "ulysses2 is predicted to be the fastest, ring2 takes "
    )


@pytest.mark.parametrize("frames, window, overlap", [(21, 9, 4), (41, 17, 8), (49, 17, 12), (9, 9, 0)])
def test_a_step_of_windows_that_continue_an_image_counts_as_many_as_are_sampled(frames, window, overlap, make_job):
    job = make_job("5b-i2v", size=(48, 32, frames), windows=Windows(window, overlap))
    job = replace(job, image=job.latent[:, :, :1])
    workload = Workload.of_job(job, Checkpoint.of(job.model))
    assert (workload.jobs, workload.work(torch.device("cpu")).windows) == (1, len(spans_of(job)))
    assert Workload.of_job(job, Checkpoint.of(job.model), jobs=3).work(torch.device("cpu")).windows == len(spans_of(job))


@pytest.fixture
def measure(tmp_path, monkeypatch) -> list:
    """What is measured, with a file of its own to be kept in."""
    taken = []
    monkeypatch.setattr(hardware_cache, "FILE", tmp_path / "new" / "rates.json")
    monkeypatch.setattr(hardware, "measure", lambda device: taken.append(device) or dict.fromkeys(hardware_cache.RATES, 7e12))
    return taken


def test_rates_are_measured_once_for_a_gpu_and_a_torch_and_read_again(measure):
    for name, torch_version in [("H100", "2.13"), ("H100", "2.13"), ("H100", "2.14"), ("A100", "2.13"), ("H100", "2.13")]:
        rates, when = hardware.calibrated(name, torch_version, "cuda:0")
        assert rates["matrix"] == 7e12 and when == date.today().isoformat()
    assert len(measure) == 3


KEPT = {"version": hardware_cache.VERSION, "rates": {}, "links": {}}
OF_H100 = {"matrix": 1e12, "attention": 1e12, "bandwidth": 1e12, "measured": "2026-01-02"}


@pytest.mark.parametrize(
    "broken, said",
    [
        ("", "cannot be read and are made again"), ("{", "cannot be read"), ("[]", "are from another version"),
        (json.dumps({"H100, torch 2.13": OF_H100}), "are from another version"), (json.dumps(KEPT | {"links": 3}), "are broken"),
        (json.dumps(KEPT | {"links": {"H100": 3}}), "are broken"),
        (json.dumps(KEPT | {"rates": {"H100, torch 2.13": OF_H100 | {"matrix": -1}}}), None),
        (json.dumps(KEPT | {"rates": {"H100, torch 2.13": 3}}), None),
    ],
)  # fmt: skip
def test_what_is_kept_and_broken_or_of_another_version_is_said_in_one_line_and_measured_again(measure, caplog, broken, said):
    hardware_cache.FILE.parent.mkdir()
    hardware_cache.FILE.write_text(broken)
    assert hardware.calibrated("H100", "2.13", "cuda:0")[0]["matrix"] == 7e12
    assert all(said in message and "\n" not in message for message in caplog.messages) if said else not caplog.messages
    caplog.clear()
    assert hardware.calibrated("H100", "2.13", "cuda:0")[0]["matrix"] == 7e12
    assert len(measure) == 1 and not caplog.messages


def test_what_a_group_measured_is_kept_for_its_gpus_and_for_some_of_them(measure):
    hardware_cache.keep_link("H100", ["1", "0", "2", "3"], Link(9e9, 3e-5))
    hardware_cache.keep_link("H100", ["0", "1"], Link(8e9, 2e-5))
    hardware_cache.keep_rates("H100", "2.13", dict.fromkeys(hardware_cache.RATES, 1e12))
    assert hardware_cache.link_of("H100", ["1", "0"])[0] == Link(8e9, 2e-5)
    assert hardware_cache.link_of("H100", ["2", "1"])[0] == Link(9e9, 3e-5)
    assert hardware_cache.link_of("H100", ["4", "1"]) is None and hardware_cache.link_of("A100", ["0", "1"]) is None
    assert hardware_cache.rates_of("H100", "2.13")[0]["matrix"] == 1e12


def test_a_gpu_that_cannot_be_measured_now_is_assumed(measure, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hardware, "measure", full)
    assert hardware.calibrated("H100", "2.13", "cuda:0") == ({}, "not measured here: CUDA out of memory")
    assert not hardware_cache.FILE.exists()


def test_a_gpu_that_computes_something_else_is_not_measured_until_it_is_idle(measure, gpus, monkeypatch):
    """What is measured meanwhile would be kept for good."""
    gpus("NVIDIA H100 PCIe", "NVIDIA H100 PCIe")
    loads = {0: 0.9, 1: 0.6}
    monkeypatch.setattr(hardware, "load_of", lambda device: loads[device.index])
    monkeypatch.setattr(hardware, "MOMENT", 0)
    devices = Devices("cuda", (0, 1))
    found = hardware.here(devices)
    assert found.matrix == gpu_table.named("NVIDIA H100 PCIe").matrix and not measure
    assert found.rates_from.endswith("; not measured here, as the GPU is busy")
    loads[1] = 0.2  # of a desktop
    assert hardware.here(devices).rates_from.startswith("measured here on ") and [device.index for device in measure] == [1]


def test_a_gpu_that_has_just_ended_something_is_measured_a_moment_later(measure, monkeypatch):
    loads = [0.9, 0.1]
    monkeypatch.setattr(hardware, "load_of", lambda device: loads.pop(0))
    monkeypatch.setattr(hardware, "MOMENT", 0)
    assert hardware.calibrated("H100", "2.13", "cuda:0")[0] and len(measure) == 1 and not loads


def test_two_threads_measure_a_gpu_once(measure, monkeypatch):
    at_once = threading.Barrier(2, timeout=60)
    slowly = hardware.measure
    monkeypatch.setattr(hardware, "measure", lambda device: time.sleep(0.2) or slowly(device))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: at_once.wait() >= 0 and hardware.calibrated("H100", "2.13", "cuda:0"), range(2)))
    assert len(measure) == 1 and found[0] == found[1]


def test_the_load_of_a_gpu_is_what_nvml_reports_or_none(monkeypatch):
    class Nvml:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: uuid)
        nvmlDeviceGetUtilizationRates = staticmethod(lambda handle: SimpleNamespace(gpu={"GPU-1": 37}[handle]))

    about = {"cuda:0": SimpleNamespace(uuid="1"), "cuda:1": SimpleNamespace(uuid="2")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    assert [hardware.load_of(device) for device in about] == [0.37, 0.0]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.load_of("cuda:0") == 0.0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"), ("NVIDIA L40", "L40"), ("NVIDIA L40S", "L40S"), ("Tesla V100-SXM2-32GB", "V100"), ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"), ("3090ti", "RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"), ("4070 super", "RTX 4070 SUPER"), ("rtx4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("RTX 3060 12GB", "RTX 3060"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Quadro RTX 6000", None), ("NVIDIA GeForce GTX 1080", None), ("", None),
        ("NVIDIA A1000", None), ("4090x", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_words_of_their_name(name, expected):
    found = gpu_table.known(name)
    assert (found and found.name) == expected
    assert hardware.named(name).name == name
    assert hardware.named(name).matrix == (found or gpu_table.UNKNOWN).matrix


def test_messages_between_machines_go_through_the_network():
    work, slow = assumed(48, True), replace(H100, network=replace(H100.network, bandwidth=1e9))
    inside, across = (predict(Plan.parse(plan), work, slow) for plan in ("cfg2-ulysses8", "cfg2-ulysses16"))
    assert inside.seconds < across.seconds / 5
    unaligned = predict(Plan.parse("cfg2-ulysses6"), work, slow)  # ranks 6 to 11 are on both machines
    assert unaligned.seconds > predict(Plan.parse("cfg2-ulysses6"), work, replace(slow, per_machine=6)).seconds * 5


def test_the_page_has_the_predictions_of_this_code():
    assert f"{mark_of('plans_table')}\n{tables()}\n{END}" in PAGE.read_text()


@pytest.fixture
def gpus(measure, monkeypatch):
    """Makes this machine one with GPUs of a name or of names, whose memory can be reached from each other or not."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(*names: str, reached: bool = True, free: int = 70 * GIB) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: max(len(names), 2))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[getattr(device, "index", device) % len(names)])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(hardware, "free_bytes", lambda device: free)
        properties = SimpleNamespace(total_memory=80 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
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
    found = hardware.here(Devices("cuda", (0, 1)))
    assert (found.name, found.link, found.free, found.per_machine) == (name, gpu_table.LINKS[link], 75 * GIB, 2)
    assert found.matrix == found.attention == found.bandwidth == 7e12 and found.knows_seconds
    assert len(measure) == 1


def test_the_link_that_a_group_measured_is_predicted_with_and_said(gpus, monkeypatch, run):
    name = "NVIDIA H100 80GB HBM3"
    gpus(name, name)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    plan = ("plan", "--model", "demo")
    assert "GPU 1: NVIDIA H100 80GB HBM3, 70.0 of 80.0 GiB free, compute capability 9.0" in run(*plan).stdout
    assert "(measured here on 20" in run(*plan).stdout and "300 GB/s, 20 us (assumed for NVLink)" in run(*plan).stdout
    remember(Link(0.0, 1e-5), torch.device("cpu"))
    assert "(assumed for NVLink)" in run(*plan).stdout
    remember(Link(1.5e9, 4e-5), torch.device("cuda", 0))
    said = run(*plan).stdout
    assert f"link: 1.5 GB/s, 40 us (measured here by a group on {date.today().isoformat()})" in said
    assert "these GPUs exchange only 1.5 GB/s (measured " in said
    found = json.loads(run(*plan, "--json").stdout)
    assert found["link"]["bandwidth"] == 1.5e9 and found["link"]["from"].startswith("measured here by a group on ")
    assert hardware.here(Devices("cuda", (0, 1))).knows_link
    assert json.loads(hardware_cache.FILE.read_text())["links"][name].keys() == {"4,5"}
    asked = run(*plan, "--link", "pcie", "--gpu", "L40", "--gpus", 2).stdout
    assert "(its data sheet)" in asked and "7 GB/s, 30 us (assumed for PCIe, set by the user)" in asked and "GPU 1" not in asked


def test_unequal_gpus_are_planned_for_as_the_slowest_with_the_fast_ones_first_and_a_warning(gpus, monkeypatch):
    gpus("NVIDIA L40", "NVIDIA H100 80GB HBM3")
    rates = {"NVIDIA L40": 1e14, "NVIDIA H100 80GB HBM3": 7e14}
    measured = {name: (dict.fromkeys(hardware_cache.RATES, rate), "2026-01-02") for name, rate in rates.items()}
    monkeypatch.setattr(hardware, "calibrated", lambda name, torch_version, device: measured[name])
    devices = hardware.fastest_first(Devices("cuda", (0, 1)))
    assert devices.indices == (1, 0)
    asked = hardware.asked(None, count=2, link=None, memory_gib=None)
    for found in (hardware.here(devices), asked):  # what plan shows is what auto chooses from
        assert (found.matrix, found.first(1).matrix, found.first(2).matrix) == (1e14, 7e14, 1e14)
    assert (found.name, found.link) == ("NVIDIA H100 80GB HBM3 and NVIDIA L40", gpu_table.LINKS["pcie"])
    plan, used, reason = resolve("auto", "auto", Workload(48))
    assert (plan, used.indices) == (Plan(), (1,)) and "on 1 of 2 devices" in reason
    assert hardware.warnings(Devices("cuda", (0, 1))) == [
        "unequal GPUs (0 is NVIDIA L40, 1 is NVIDIA H100 80GB HBM3): plans that split a step wait for the slowest GPU in every "
        "step; replicasN does not"
    ]
    plan, used, _ = resolve("auto", "auto", Workload(48, jobs=2))
    assert (plan, used.indices) == (Plan(), (1,))  # 2 x 1/7 is less than 1


def test_no_replicas_are_chosen_beside_a_group_that_serve_keeps(gpus, monkeypatch):
    gpus("NVIDIA H100 PCIe")
    hardware_cache.keep_rates("NVIDIA H100 PCIe", torch.__version__, dict.fromkeys(hardware_cache.RATES, 5e14))
    asked = Workload(48, guided=False, jobs=4)
    assert resolve("auto", "auto", asked)[0].replicas == 2
    assert resolve("auto", "auto", replace(asked, can_share=False))[0].replicas == 1
    found = {"a group": {"plan": "cfg2", "devices": "0,1", "shared": True, "nodes": 1}}
    monkeypatch.setattr("parallel_backend.executor.resolve.running", lambda: found)
    assert resolve("auto", "auto", asked)[0].replicas == 1


def test_one_gpu_is_not_measured(gpus, measure):
    gpus("NVIDIA H100 80GB HBM3")
    assert hardware.here(Devices("cuda", (0,))).matrix == H100.matrix
    assert not measure


def test_a_running_group_of_ours_holds_memory_that_a_job_is_to_have(gpus, monkeypatch):
    gpus("NVIDIA H100 80GB HBM3", free=1 * GIB)
    two = Devices("cuda", (0, 1))
    assert machine_of(two).free == 6 * GIB
    monkeypatch.setattr("parallel_backend.executor.resolve.running", lambda: {"a group": {"devices": "0,1"}})
    assert machine_of(two).free == 80 * GIB
