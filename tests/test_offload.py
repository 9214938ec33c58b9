"""Where weights wait is chosen anew for each job, and the same on every rank."""

import gc
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import pytest
import torch

from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.vae import tiling
from parallel_backend.config import Config
from parallel_backend.engine.engine import Engine
from parallel_backend.engine.vae_jobs import STRIP_MARGIN
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import Lora, Model
from parallel_backend.parallel.rank import RankContext
from parallel_backend.parallel.vae_rows import Strips
from parallel_backend.plan import Plan
from parallel_backend.planner import hardware

from .conftest import REPO

GIB = 2**30

TWO_RANKS = """
import json, sys
from pathlib import Path
import torch
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.engine.engine import Engine
from parallel_backend.model import Model
from parallel_backend.jobs import SampleJob, empty_latent
from parallel_backend.parallel.group_rank import GroupRankContext
from parallel_backend.plan import Plan
from tests.support.ranks import fork_ranks
path, folder = sys.argv[1:]
def run(rank):
    offload.free_bytes = lambda device: (2**40, 0)[rank]
    checkpoint = Checkpoint.open(path)
    text = torch.zeros(1, checkpoint.text_tokens, checkpoint.text_features)
    job = SampleJob(Model(path), text, empty_latent(width=64, height=48, frames=9), text, steps=1)
    engine = Engine(GroupRankContext(Plan(ulysses=2), device=torch.device("cpu"), rank=rank))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(engine.run(job).report.notes))
fork_ranks(2, run)
"""


@pytest.mark.parametrize("owns_process", [True, False])
def test_the_user_s_limit_holds_in_one_process_too(owns_process, monkeypatch):
    """Of an 80 GiB GPU with 3 GiB of this process's tensors on it."""
    gpu, enforced = torch.device("cuda", 0), []
    memory = {"mem_get_info": (70 * GIB, 80 * GIB), "memory_allocated": 3 * GIB, "memory_reserved": 4 * GIB}
    fake = SimpleNamespace(**{name: lambda device, value=value: value for name, value in memory.items()})
    monkeypatch.setattr(offload, "api_of", lambda device: fake)
    monkeypatch.setattr(offload, "_allowed", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: enforced.append(share))
    LocalExecutor(gpu, owns_process=owns_process)
    assert offload.free_bytes(gpu) == 71 * GIB and not enforced
    monkeypatch.setattr(hardware, "CONFIG", Config(memory_gib=7.0))
    LocalExecutor(gpu, owns_process=owns_process)
    assert offload.free_bytes(gpu) == 4 * GIB and enforced == [7 / 80] * owns_process


def test_what_is_left_of_weights_that_could_not_be_read_is_gone_before_the_next_are_read(checkpoints):
    cache, checkpoint, left = LocalExecutor(torch.device("cpu")).engine.cache, Checkpoint.open(checkpoints["5b"]), []

    def fail() -> torch.nn.Module:
        module = torch.nn.Linear(1, 1)
        module.register_forward_pre_hook(lambda *_: module)  # a cycle, as with the hooks of a transformer
        left.append(ref(module))
        raise torch.OutOfMemoryError("full")

    def read() -> torch.nn.Module:
        left.append(left[0]())
        return torch.nn.Linear(1, 1)

    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError):
            cache._load("transformer", checkpoint, torch.float32, fail)
        cache._load("transformer", checkpoint, torch.float32, read)
    finally:
        gc.enable()
    assert left[1] is None


def test_ranks_with_unequal_memory_choose_the_same_offload(checkpoints, tmp_path):
    command = [sys.executable, "-c", TWO_RANKS, checkpoints["5b"], tmp_path]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "offload 'sequential'" in first[0] and "0.0 GiB free" in first[0]


def test_auto_is_chosen_for_each_job_through_the_same_weights(make_job, checkpoints, local, monkeypatch):
    small, large = make_job("5b", steps=2), make_job("5b", size=(240, 160, 17), steps=2)
    checkpoint, dtype = Checkpoint.open(checkpoints["5b"]), torch.float32
    room = {part: checkpoint.weight_bytes(part, dtype) for part in ("transformer", "vae")}
    room["work"] = offload.working_bytes(small, checkpoint, Plan(), dtype)
    executor = LocalExecutor(torch.device("cpu"))
    engine = executor.engine
    size = 0

    def free_bytes(device) -> int:
        """What is free on a GPU of ``size`` bytes."""
        return size - sum(offload.bytes_on(device, module) for _, module in engine.cache.held.values())

    monkeypatch.setattr(offload, "free_bytes", free_bytes)
    expected = {id(job): local.sample(job).tensor for job in (small, large)}
    whole, beside_no_vae = sum(room.values()), room["transformer"] + room["work"]
    cases = [  # job, room for it, mode, loads, words of the notes
        (small, whole, "none", 1, []),
        (small, whole, "none", 1, []),
        (large, whole, "sequential", 2, ["offload 'sequential'", "was 'none'"]),
        (large, whole, "sequential", 2, ["offload 'sequential'"]),
        (small, whole, "none", 3, ["was 'sequential'.* is 'none'"]),
        (small, beside_no_vae, "model", 3, ["offload 'model'", "was 'none'"]),
        (small, whole, "none", 3, ["was 'model'"]),
    ]
    for job, allowed, mode, loads, words in cases:
        size = int(allowed / offload.HEADROOM) + 1000
        result = executor.sample(job)
        assert torch.equal(result.tensor, expected[id(job)])
        assert (engine.cache.offload, engine.cache.loads) == (mode, loads)
        assert len(result.report.notes) == len(words), result.report.notes
        assert all(re.search(word, note) for word, note in zip(words, result.report.notes))


class TwoRanks(RankContext):
    """The first of two ranks, as far as it decides; the other agrees or not."""

    other_agrees = True

    def strips(self, rows):
        return Strips(0, 2, rows)

    def collect(self, value):
        return [value, value and self.other_agrees]


def test_a_picture_is_shared_only_where_every_rank_has_room_for_its_strip(make_job, checkpoints, monkeypatch):
    checkpoint, context = Checkpoint.open(checkpoints["5b"]), TwoRanks(torch.device("cpu"))
    engine, latent = Engine(context), torch.zeros(1, 16, 5, 30, 40)
    job = DecodeJob(Model(str(checkpoint.path)), latent)
    need = offload.HEADROOM**-1 * STRIP_MARGIN * (tiling.working_bytes(job, torch.float32) / 2)
    weights = offload.HEADROOM**-1 * STRIP_MARGIN * checkpoint.weight_bytes("vae", torch.float32)
    decide = lambda job: engine.vae_jobs.rows_shared(job, checkpoint, torch.float32)  # noqa: E731
    monkeypatch.setattr(offload, "free_bytes", lambda device: int(1.001 * (need + weights)))
    assert decide(job).counts == [15, 15] and not engine._notes
    assert decide(replace(job, tiling="on")) is None and not engine._notes
    monkeypatch.setattr(offload, "free_bytes", lambda device: int(0.999 * (need + weights)))
    assert decide(job) is None
    assert engine._notes == ["rank 0 runs the VAE alone: a strip on each rank does not fit into memory"]
    monkeypatch.setattr(offload, "free_bytes", lambda device: 2**50)
    context.other_agrees = False
    assert decide(job) is None


def test_weights_are_read_once_whatever_else_of_the_model_changes(make_job, loras):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=1)
    changes = ({}, {"dtype": "fp32"}, {"compile": "off"}, {"step_cache": 0.1}, {"loras": (Lora(loras["5b"]),)})
    for change in (*changes, {"offload": "model"}, {"offload": "none"}):
        executor.sample(replace(job, model=replace(job.model, **change)))
    assert executor.engine.cache.loads == 1
    latent = torch.zeros(1, 16, 1, 4, 4)
    for change in (*changes, {"offload": "group"}, {"offload": "sequential"}, {"fp8": "linears"}, {"fp8": "all"}):
        executor.decode(DecodeJob(replace(job.model, **change), latent))
    assert executor.engine.cache.loads == 2
