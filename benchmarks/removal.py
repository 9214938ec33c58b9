"""Object removal beside ComfyUI's own nodes: seconds of a step of VOID by the core on one GPU, and by this pack in each plan.

``python -m benchmarks.removal CHECKPOINT --comfyui FOLDER`` with a checkpoint of ``benchmarks.random_weights --like 1.5-5b-void``. The
core (0.33 or newer) runs in this interpreter, in a process of its own, with the weights, the size and the condition of this pack's jobs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from parallel_backend.cli.console import show
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.factory import open_executor
from parallel_backend.jobs import SampleJob
from parallel_backend.plan import Plan
from tests.support.single_files import save_as

from .group import job_of

BY_THE_CORE = Path(__file__).with_name("removal_by_core.py")


def job_at(checkpoint: Checkpoint, steps: int) -> SampleJob:
    """Returns a job at the checkpoint's own size, without guidance, with a random condition."""
    job = job_of(checkpoint)
    generator = torch.Generator().manual_seed(2)
    mask, video = (torch.randn(job.latent.shape, generator=generator) for _ in range(2))
    return replace(job, negative=None, cfg=1.0, steps=steps, mask=mask, masked_video=video)


def by_the_core(comfyui: Path, weights: Path, job: SampleJob, folder: Path) -> list[float]:
    """Returns the seconds of the core's steps."""
    given = folder / "given.safetensors"
    condition = torch.cat([job.mask, job.masked_video], dim=1)
    save_file({"states": job.positive.contiguous(), "condition": condition.contiguous()}, given)
    asked = [sys.executable, BY_THE_CORE, comfyui, weights, given, str(job.steps)]
    run = subprocess.run(asked, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"the core failed: {run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True, help="a folder of ComfyUI, 0.33 or newer")
    parser.add_argument("--plans", default="single,ulysses2,ring2")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    checkpoint, devices = Checkpoint.open(asked.checkpoint), Devices.parse(asked.devices)
    job = job_at(checkpoint, asked.steps)
    frames, height, width = job.mask.shape[2:]
    show(f"{checkpoint.describe}; latent {frames}x{height}x{width}, {asked.steps} steps, cfg 1")
    show("| by | GPUs | s a step, median | first step |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.checkpoint.parent) as folder:
        weights = save_as(asked.checkpoint, Path(folder) / "void.safetensors", "core")
        seconds = by_the_core(asked.comfyui, weights, job, Path(folder))
        show(f"| ComfyUI's own nodes | 1 | {median(seconds[1:]):.3f} | {seconds[0]:.2f} |")
    for plan in map(Plan.parse, asked.plans.split(",")):
        executor = open_executor(plan, devices.first_of(plan.world_size))
        try:
            executor.sample(replace(job, steps=2))
            seconds = executor.sample(job).report.step_seconds
        finally:
            executor.close()
        show(f"| this pack, `{plan}` | {plan.world_size} | {median(seconds[1:]):.3f} | {seconds[0]:.2f} |")


if __name__ == "__main__":
    main()
