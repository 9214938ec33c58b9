"""The pipelines that the table compares with: diffusers' on one device, and xDiT's own on several."""

import gc
import json
import re
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.offload import release, reset_peak, used_bytes
from ..cogvideox.transformer import lora
from ..group.job_fields import join_fields, split_fields
from ..group.preflight import PACK, group_python, without_other_launchers
from ..jobs import SampleJob
from ..plan import Plan

XDIT = ("cfg2", "ulysses2", "ring2", "cfg2-ulysses2", "ulysses4", "cfg2-ulysses4", "ulysses8")
"""Plans that xDiT's own CogVideoX pipeline knows, for up to eight devices."""
XDIT_SECONDS = 600.0
"""It may take this long, loading included."""


def pipeline_of(checkpoint: Checkpoint, job: SampleJob, device: torch.device, *, compiled: bool = False):
    """diffusers' pipeline, text encoder aside; ``compiled`` block by block, as its docs advise."""
    from diffusers import CogVideoXPipeline

    dtype = checkpoint.dtype(job.model.dtype, device)
    transformer = checkpoint.load_transformer(dtype, device)
    lora.merge(transformer, checkpoint, lora.open_all(job.model.loras, checkpoint), device=device)
    if compiled:
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True)
    pipeline = CogVideoXPipeline(
        tokenizer=checkpoint.load_tokenizer(),
        text_encoder=None,
        vae=checkpoint.load_vae(dtype, device),
        transformer=transformer,
        scheduler=checkpoint.make_scheduler(job.scheduler),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timed(call: Callable[..., Any], job: SampleJob, checkpoint: Checkpoint, device: torch.device, repeat: int):
    """Jobs in a row through a pipeline of diffusers' kind.

    Args:
        call: the pipeline.
        job: given as text states, size and seed.
        checkpoint, device: of the pipeline.
        repeat: jobs; the last one is stated.
    Returns:
        The row's figures, and the latents as the pipeline gives them.
    """
    marks = []

    def mark(pipeline, index, timestep, kwargs):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        return kwargs

    dtype = checkpoint.dtype(job.model.dtype, device)
    _, _, frames, height, width = job.latent.shape
    reset_peak(device)
    first = None
    for _ in range(repeat):
        marks.clear()
        started = time.perf_counter()
        latents = call(
            prompt_embeds=job.positive.to(device, dtype),
            negative_prompt_embeds=job.negative.to(device, dtype) if job.guided else None,
            height=height * 8,
            width=width * 8,
            num_frames=frames * 4 - 3,
            num_inference_steps=job.steps,
            guidance_scale=job.cfg,
            generator=torch.Generator().manual_seed(job.seed),
            output_type="latent",
            callback_on_step_end=mark,
        ).frames
        seconds = time.perf_counter() - started
        first = first or marks[0] - started
    steps = [after - before for before, after in zip([started, *marks], marks)]
    row = {
        "seconds_per_step": median(steps),
        "first_step_seconds": first,
        "sample_seconds": seconds,
        "outside_steps_seconds": seconds - sum(steps),
        "peak_gib": used_bytes(device) / 2**30,
        "notes": [],
    }
    return row, latents


def diffusers(
    args: Namespace, job: SampleJob, checkpoint: Checkpoint, device: torch.device, *, compiled: bool
) -> tuple[dict, torch.Tensor]:
    """A row of diffusers' pipeline, given the same text states and seed, and its latent."""
    pipeline = pipeline_of(checkpoint, job, device, compiled=compiled)
    row, latents = timed(pipeline, job, checkpoint, device, args.repeat)
    row["name"] = "diffusers"
    if args.decode:
        reset_peak(device)
        for _ in range(args.repeat):
            row["decode_seconds"] = decode(pipeline, latents)
        row["decode_peak_gib"] = used_bytes(device) / 2**30
    latents = latents[:, checkpoint.padding_frames(job.latent.shape[2]) :].permute(0, 2, 1, 3, 4)
    result = latents.float().cpu() / checkpoint.scaling_factor
    del pipeline
    gc.collect()
    release(device)
    return row, result


@torch.inference_mode()
def decode(pipeline, latents: torch.Tensor) -> float:
    """Seconds of diffusers' own whole decode."""
    started = time.perf_counter()
    pipeline.decode_latents(latents).cpu()
    return time.perf_counter() - started


def xdit(args: Namespace, job: SampleJob, checkpoint: Checkpoint, plan_text: str, device: torch.device) -> dict:
    """A row of xDiT's own pipeline: what it measured in processes of its own, or the line that it ended with."""
    plan = Plan.parse(plan_text)
    row = {"name": "xdit", "plan": plan_text, "precision": "eager", "gpus": plan.world_size if device.type == "cuda" else 0}
    plain, tensors = split_fields(replace(job, latent=job.latent[:1]))
    with tempfile.TemporaryDirectory() as folder:
        torch.save((plain, tensors), Path(folder) / "job.pt")
        command = [
            group_python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.world_size}",
            "-m", "parallel_backend.cli.bench_xdit", folder, plan_text, device.type, str(args.repeat),
        ]  # fmt: skip
        try:
            variables = without_other_launchers()
            done = subprocess.run(command, cwd=PACK, env=variables, capture_output=True, text=True, timeout=XDIT_SECONDS)
            said = done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            said = [f"it had not ended after {XDIT_SECONDS:.0f} s"]
        found = Path(folder) / "row.json"
        if found.exists():
            return row | json.loads(found.read_text())
    errors = [words for words in said if re.search(r"\w(Error|Exception): ", words)] or said or ["it said nothing"]
    return row | {"seconds_per_step": None, "notes": [f"xDiT's pipeline does not run: {errors[0].strip()}"]}


def load_job(folder: Path) -> SampleJob:
    """The job that :func:`xdit` left for its processes."""
    return join_fields(SampleJob.kind, *torch.load(folder / "job.pt", weights_only=True))
