"""Where weights wait is chosen anew for each job, and the same on every rank."""

import json
import os
import subprocess
import sys

from .conftest import REPO

ONE_RANK = """
import json, os, signal, sys
from pathlib import Path
import torch
from parallel_backend.cogvideox import memory
from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.engine import Engine
from parallel_backend.jobs import Model, SampleJob, empty_latent
from parallel_backend.parallel.groups import GroupSplit
from parallel_backend.plans import Plan
signal.alarm(100)
path, folder = sys.argv[1:]
rank, checkpoint = int(os.environ["RANK"]), Checkpoint.open(path)
memory.free_bytes = lambda device: (2**40, 0)[rank]
text = torch.zeros(1, checkpoint.text_tokens, checkpoint.text_features)
job = SampleJob(Model(path), text, empty_latent(width=64, height=48, frames=9), text, steps=1)
engine = Engine(GroupSplit(Plan(ulysses=2), device=torch.device("cpu"), rank=rank, local_rank=rank))
Path(folder, f"rank{rank}.json").write_text(json.dumps(engine.run(job).report.notes))
"""


def test_ranks_with_unequal_memory_choose_the_same_offload(checkpoints, tmp_path):
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, checkpoints["5b"], tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "offload 'sequential'" in first[0] and "0.0 GiB free" in first[0]
