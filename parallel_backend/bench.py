"""Plans side by side with diffusers' own pipeline, in one run, from one checkpoint."""

import gc
import json
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch

from . import models
from .backend import open_executor, resolve
from .cogvideox import checks, lora
from .cogvideox.checkpoint import Checkpoint
from .cogvideox.memory import release, reset_peak, used_bytes
from .commands import model_of, quiet_libraries, show, size_of
from .devices import Devices
from .jobs import DecodeJob, SampleJob, empty_latent

COLUMNS = (
    "name",
    "plan",
    "seconds_per_step",
    "sample_seconds",
    "outside_steps_seconds",
    "decode_seconds",
    "peak_gib",
    "max_difference",
)


def text_states(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Two prompts' worth of made-up text states: what they say costs nothing to leave out."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, checkpoint.text_tokens, checkpoint.text_features)
    return [torch.randn(shape, generator=generator) * 0.2 for _ in range(2)]


def run(args: Namespace) -> int:
    """Prints a table, and writes its rows as JSON where asked to."""
    quiet_libraries()
    checkpoint = Checkpoint.open(models.find(args.model))
    if args.decode or not args.no_diffusers:
        checkpoint.check_whole()
    size = size_of(args, checkpoint)
    positive, negative = text_states(checkpoint)
    job = SampleJob(
        model_of(args, checkpoint),
        positive,
        empty_latent(**size, channels=checkpoint.channels),
        negative if args.cfg > 1 else None,
        seed=0,
        steps=args.steps,
        cfg=args.cfg,
        scheduler=args.scheduler,
    )
    checks.check(checkpoint, job)
    show(f"{checkpoint.describe}; {size['width']}x{size['height']}x{size['frames']}, {args.steps} steps, cfg {args.cfg}")
    rows, reference = [], None
    for plan in args.plans.split(","):
        row, latent = measure(plan, args, job, checkpoint)
        reference = latent if reference is None else reference
        row["max_difference"] = (latent - reference).abs().max().item()
        rows.append(row)
        show(line(row))
    if not args.no_diffusers:
        row, latent = measure_diffusers(args, job, checkpoint)
        row["max_difference"] = (latent - reference).abs().max().item()
        rows.append(row)
        show(line(row))
    if args.output:
        common = {"model": checkpoint.path.name, "dtype": args.dtype, "steps": args.steps, "cfg": args.cfg, **size}
        Path(args.output).write_text(json.dumps([{**common, **row} for row in rows], indent=1))
    return 0


def line(row: dict) -> str:
    """One row of the table."""
    shown = {name: f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in COLUMNS}
    return "  ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def measure(plan_text: str, args: Namespace, job: SampleJob, checkpoint: Checkpoint) -> tuple[dict, torch.Tensor]:
    """One plan: jobs in a row through one executor, the last one stated."""
    plan, devices, _ = resolve(plan_text, args.devices, heads=checkpoint.heads)
    if plan.world_size == 1:
        devices = Devices(devices.kind, devices.indices[:1])
    executor = open_executor(plan, devices)
    try:
        for _ in range(args.repeat):
            started = time.perf_counter()
            result = executor.sample(job)
            seconds = time.perf_counter() - started
        report = result.report
        decode = executor.decode(DecodeJob(job.model, result.tensor)).report if args.decode else None
    finally:
        executor.close()
    row = {
        "name": "ours",
        "plan": str(plan),
        "gpus": plan.world_size if devices.kind == "cuda" else 0,
        "seconds_per_step": median(report.step_seconds),
        "sample_seconds": seconds,
        "outside_steps_seconds": seconds - sum(report.step_seconds),
        "load_seconds": report.load_seconds,
        "decode_seconds": decode.run_seconds if decode else None,
        "peak_gib": max(report.peak_memory) / 2**30,
        "notes": list(report.notes),
    }
    return row, result.tensor


def measure_diffusers(args: Namespace, job: SampleJob, checkpoint: Checkpoint) -> tuple[dict, torch.Tensor]:
    """diffusers' pipeline, eager, on one device, given the same text states and seed."""
    from diffusers import CogVideoXPipeline

    device = Devices.parse(args.devices).first
    dtype = checkpoint.dtype(args.dtype, device)
    transformer = checkpoint.load_transformer(dtype, device)
    lora.merge(transformer, checkpoint, lora.open_all(job.model.loras, checkpoint), device=device)
    pipeline = CogVideoXPipeline(
        tokenizer=checkpoint.load_tokenizer(),
        text_encoder=None,
        vae=checkpoint.load_vae(dtype, device),
        transformer=transformer,
        scheduler=checkpoint.make_scheduler(args.scheduler),
    )
    pipeline.set_progress_bar_config(disable=True)
    marks = []

    def mark(pipeline, index, timestep, kwargs):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        return kwargs

    _, _, frames, height, width = job.latent.shape
    reset_peak(device)
    for _ in range(args.repeat):
        marks.clear()
        started = time.perf_counter()
        latents = pipeline(
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
    steps = [after - before for before, after in zip([started, *marks], marks)]
    row = {
        "name": "diffusers",
        "plan": "single",
        "gpus": int(device.type == "cuda"),
        "seconds_per_step": median(steps),
        "sample_seconds": seconds,
        "outside_steps_seconds": seconds - sum(steps),
        "load_seconds": None,
        "decode_seconds": decode_diffusers(pipeline, latents, device) if args.decode else None,
        "peak_gib": used_bytes(device) / 2**30,
        "notes": [],
    }
    latents = latents[:, checkpoint.padding_frames(frames) :].permute(0, 2, 1, 3, 4)
    result = latents.float().cpu() / checkpoint.scaling_factor
    del pipeline
    gc.collect()
    release(device)
    return row, result


@torch.inference_mode()
def decode_diffusers(pipeline, latents: torch.Tensor, device: torch.device) -> float:
    """Seconds of diffusers' own whole decode."""
    started = time.perf_counter()
    pipeline.decode_latents(latents).cpu()
    return time.perf_counter() - started
