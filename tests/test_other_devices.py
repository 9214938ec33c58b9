"""GPUs other than NVIDIA's and AMD's, and Windows, as far as a machine without them can show."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline import scheduler_step, text
from parallel_backend.cogvideox.vae import codec, preview
from parallel_backend.engine.engine import Engine
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import Model
from parallel_backend.parallel.rank import RankContext

CPU, MPS, XPU = torch.device("cpu"), torch.device("mps"), torch.device("xpu", 0)
GIB = 2**30


@pytest.fixture
def gpus(monkeypatch):
    """A Mac's GPU and an Intel one, of which torch says this; what was called is kept."""
    called = []
    for name, value in (("recommended_max_memory", 24), ("driver_allocated_memory", 6), ("current_allocated_memory", 4)):
        monkeypatch.setattr(torch.mps, name, lambda value=value: value * GIB)
    for name, value in (("memory_allocated", 3), ("memory_reserved", 5), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.xpu, name, lambda device, value=value: value * GIB)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (8 * GIB, 16 * GIB))
    for api in (torch.mps, torch.xpu):
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "init"):
            exists = hasattr(api, name)
            monkeypatch.setattr(api, name, lambda *_, what=(api, name): called.append(what), raising=False)
            if not exists:
                monkeypatch.delattr(api, name)
    return called


@pytest.mark.parametrize("available, free", [(100, 18 + 2), (10, 10 + 2), (1, 1 + 2)])
def test_a_mac_s_gpu_has_what_macos_lets_it_have_and_the_machine_has_left(available, free, gpus, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available * GIB))
    assert offload.free_bytes(MPS) == free * GIB
    assert offload.used_bytes(MPS) == 6 * GIB


def test_an_intel_gpu_is_asked_as_nvidia_s_are(gpus):
    assert offload.free_bytes(XPU) == (8 + 5 - 3) * GIB
    assert offload.used_bytes(XPU) == 7 * GIB


@pytest.mark.parametrize("device", [MPS, XPU], ids=str)
def test_every_gpu_is_waited_for_and_gives_back_what_it_holds_unused(device, gpus):
    context, api = RankContext(device), offload.api_of(device)
    context.synchronize()
    offload.release(device)
    offload.reset_peak(device)
    assert {(api, "synchronize"), (api, "empty_cache")} <= set(gpus)
    assert ((api, "reset_peak_memory_stats") in gpus) == (device == XPU)


def test_a_gpu_of_a_kind_that_says_nothing_works_without():
    unknown = torch.device("privateuseone", 0)
    assert offload.free_bytes(unknown) == offload.free_bytes(CPU) == 2**62
    assert offload.used_bytes(unknown) > 0
    for do in (offload.synchronize, offload.release, offload.reset_peak):
        do(unknown)


def test_weights_stay_on_a_mac_s_gpu_which_shares_the_cpu_s_memory(make_job, gpus, monkeypatch):
    monkeypatch.setattr(offload, "free_bytes", lambda device: 0)
    job = make_job("5b")
    checkpoint, engine = Checkpoint.open(job.model.path), Engine(RankContext(MPS))
    assert engine.cache._choose_offload(job, checkpoint, torch.float32) == "none"


class Offloaded(torch.nn.Module):
    """A transformer of 2 GiB, on the CPU, that records how it is offloaded."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2**30, dtype=torch.bfloat16), requires_grad=False)
        self.asked = {}

    def enable_group_offload(self, **settings):
        self.asked = settings


@pytest.mark.parametrize("device, streams", [(MPS, False), (XPU, True), (torch.device("cuda", 0), True)], ids=str)
def test_weights_come_block_by_block_in_a_stream_where_diffusers_has_one(device, streams):
    module = Offloaded()
    offload.place(module, "group", device)
    assert module.asked["use_stream"] is streams and module.asked["onload_device"] == device


@pytest.mark.parametrize("gib, ranks, pinned", [(5, 1, True), (4, 1, False), (9, 2, True), (5, 2, False)])
def test_weights_stay_pinned_where_host_memory_is_large_enough_and_else_a_note_says_so(gib, ranks, pinned, monkeypatch):
    monkeypatch.setattr(offload, "usable_memory", lambda: gib * GIB)
    module = Offloaded()
    note = offload.place(module, "group", torch.device("cuda", 0), ranks=ranks)
    assert module.asked["low_cpu_mem_usage"] is not pinned
    assert note is None if pinned else f"takes {4 * ranks} GiB of host memory, {gib} are free" in note


def test_pinned_weights_leave_the_host_s_memory_with_those_on_the_gpu(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: emptied.append("host"), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("gpu"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    offload.release(torch.device("cuda", 0))
    assert emptied == ["gpu", "host"]
    offload.release(CPU)
    assert len(emptied) == 2


@pytest.mark.parametrize("device", [MPS, XPU], ids=str)
def test_text_is_encoded_on_any_gpu_that_has_room(device, checkpoints, gpus, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    assert text.find_place(Checkpoint.open(checkpoints["5b"]), [device], "auto").device == device


@pytest.mark.parametrize("newer, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_mac_computes_in_bf16_where_its_macos_can(newer, dtype, checkpoints, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: newer and version == (14, 0))
    monkeypatch.setattr(Checkpoint, "native_dtype", "bf16")
    assert Checkpoint.open(checkpoints["5b"]).dtype("auto", MPS) == dtype


class Sent(torch.Tensor):
    """Noise that notes how it is sent to a device."""

    ways: list[bool] = []

    def to(self, *target, non_blocking=False):
        Sent.ways.append(non_blocking)
        return super().to(*target).as_subclass(torch.Tensor)


def test_noise_that_is_not_pinned_is_waited_for_on_its_way(make_job, local, monkeypatch):
    """ComfyUI refuses the other way to a Mac's GPU: it may read before the noise is there."""
    draw, job = scheduler_step.Noise.draw, make_job("5b", steps=3, scheduler="dpm")
    expected = local.sample(job).tensor
    monkeypatch.setattr(scheduler_step.Noise, "draw", lambda *inputs: draw(*inputs).as_subclass(Sent))
    assert torch.equal(local.sample(job).tensor, expected)
    assert Sent.ways and not any(Sent.ways)


def test_a_picture_of_a_gpu_that_is_not_cuda_s_is_shown_from_the_cpu(monkeypatch):
    shown, made = [], SimpleNamespace(is_cuda=False, cpu=lambda: "on the CPU")
    monkeypatch.setattr(preview, "picture", lambda *_: made)
    monkeypatch.setattr(preview, "stops", lambda vae: [])
    pictures = preview.Previews(None, scaling=1.0, skipped=0, show=shown.append, go_on=lambda: True)
    pictures.look(torch.zeros(1, 1, 16, 2, 2))
    assert shown == ["on the CPU"] and pictures.note is None


@pytest.mark.parametrize(
    "words",
    [
        "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1 GB, max allowed: 18.1 GB).",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    ],
)
def test_memory_that_runs_out_elsewhere_has_the_vae_go_on_in_tiles_too(words, checkpoints, monkeypatch):
    decode, tried = codec.decode, []

    def small(module, *inputs, **listener):
        tried.append(module.use_tiling)
        if not module.use_tiling:
            raise RuntimeError(words)
        return decode(module, *inputs, **listener)

    monkeypatch.setattr(codec, "decode", small)
    latent = torch.zeros(1, 16, 1, 2, 2)
    result = LocalExecutor(CPU).decode(DecodeJob(Model(str(checkpoints["5b"])), latent))
    assert tried == [False, True] and "ran out of memory" in result.report.notes[0]


def test_frames_begin_again_where_memory_runs_out_between_them(checkpoints):
    executor, latent = LocalExecutor(CPU), torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    job = DecodeJob(Model(str(checkpoints["5b"])), latent)
    expected = executor.decode(replace(job, tiling="on")).tensor
    module, calls, starts = executor.engine.cache.held["vae"][1], [], []

    def full(*_) -> None:
        calls.append(module.use_tiling)
        if calls == [False, False]:
            raise torch.OutOfMemoryError("full")

    hook = module.decoder.register_forward_pre_hook(full)
    result = executor.decode(job, on_frames=lambda video, start, frames: starts.append(start))
    hook.remove()
    assert starts == [0, 0] and torch.equal(result.tensor, expected)


def test_an_error_that_is_not_of_memory_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), offload.one_kind_of_error():
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("command", ["status", "stop"])
def test_on_windows_no_group_is_running(command, run, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "getuid")
    done = run(command)
    assert (done.returncode, done.stdout) == (0, "no group is running\n")
