"""Plans and precisions side by side with diffusers' own pipeline, in one run, from one checkpoint."""

import gc
import json
import time
from argparse import Namespace
from dataclasses import replace
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
from .errors import RequestError
from .executor import Executor
from .jobs import DecodeJob, Progress, SampleJob, empty_latent
from .local import LocalExecutor

COLUMNS = (
    "name",
    "plan",
    "precision",
    "seconds_per_step",
    "first_step_seconds",
    "sample_seconds",
    "outside_steps_seconds",
    "decode_seconds",
    "peak_gib",
    "max_difference",
    "from_float32",
)
PRECISIONS = {"lossless": {}, "eager": {"compile": "off"}, "fp8": {"fp8": "linears"}, "fp8-all": {"fp8": "all"}}
"""What differs in the model from what the options say."""
DIFFUSERS = ("eager", "compiled")


def text_states(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Two prompts' worth of made-up text states: what they say costs nothing to leave out."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, checkpoint.text_tokens, checkpoint.text_features)
    return [torch.randn(shape, generator=generator) * 0.2 for _ in range(2)]


def chosen(option: str, words: str, allowed) -> list[str]:
    """The words of a comma-separated option.

    Raises:
        RequestError: for one that is not allowed.
    """
    found = words.split(",")
    if unknown := set(found) - set(allowed):
        raise RequestError(f"{option}: '{unknown.pop()}' is not understood; use some of {', '.join(allowed)}")
    return found


def run(args: Namespace) -> int:
    """Prints a table, and writes its rows as JSON where asked to."""
    quiet_libraries()
    precisions = chosen("--precisions", args.precisions, PRECISIONS)
    rivals = [] if args.diffusers == "none" else chosen("--diffusers", args.diffusers, DIFFUSERS)
    checkpoint = Checkpoint.open(models.find(args.model))
    if args.decode or rivals:
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
    rows, reference, exact = [], None, None
    if args.float32:
        executor = LocalExecutor(Devices.parse(args.devices).first)
        exact = two_steps(executor, replace(job, model=replace(job.model, dtype="fp32", compile="off")), checkpoint)
        executor.close()
    for plan_text in args.plans.split(","):
        plan, devices, _ = resolve(plan_text, args.devices, heads=checkpoint.heads, offload=args.offload)
        if plan.world_size == 1:
            devices = Devices(devices.kind, devices.indices[:1])
        executor = open_executor(plan, devices)
        try:
            for precision in precisions:
                asked = replace(job, model=replace(job.model, **PRECISIONS[precision]))
                row, latent = measure(executor, args, asked)
                row |= {"plan": str(plan), "precision": precision, "gpus": plan.world_size if devices.kind == "cuda" else 0}
                reference = latent if reference is None else reference
                row["max_difference"] = (latent - reference).abs().max().item()
                row["from_float32"] = None if exact is None else distance(two_steps(executor, asked, checkpoint), exact)
                rows.append(row)
                show(line(row))
        finally:
            executor.close()
    for precision in rivals:
        row, latent = measure_diffusers(args, job, checkpoint, compiled=precision == "compiled")
        row |= {"precision": precision, "max_difference": (latent - reference).abs().max().item(), "from_float32": None}
        rows.append(row)
        show(line(row))
    if args.output:
        common = {"model": checkpoint.path.name, "dtype": args.dtype, "steps": args.steps, "cfg": args.cfg, **size}
        Path(args.output).write_text(json.dumps([{**common, **row} for row in rows], indent=1))
    return 0


def distance(latent: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative difference of two latents, as the norm has it."""
    return ((latent - exact).norm() / exact.norm()).item()


def two_steps(executor: Executor, job: SampleJob, checkpoint: Checkpoint) -> torch.Tensor:
    """The latent after two DDIM steps from noise that is the same in every dtype."""
    batch, channels, frames, height, width = job.latent.shape
    frames += checkpoint.padding_frames(frames)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((batch, frames, channels, height, width), generator=generator).bfloat16().float()
    progress = Progress(0, noise, generator.get_state())
    return executor.sample(replace(job, steps=2, scheduler="ddim", progress=progress)).tensor


def line(row: dict) -> str:
    """One row of the table."""
    shown = {name: f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in COLUMNS}
    return "  ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def measure(executor: Executor, args: Namespace, job: SampleJob) -> tuple[dict, torch.Tensor]:
    """One plan in one precision: jobs in a row through one executor, the last one stated."""
    first = None
    for _ in range(args.repeat):
        started = time.perf_counter()
        result = executor.sample(job)
        seconds = time.perf_counter() - started
        first = first or result.report.step_seconds[0]
    report = result.report
    decode = executor.decode(DecodeJob(job.model, result.tensor)).report if args.decode else None
    row = {
        "name": "ours",
        "seconds_per_step": median(report.step_seconds),
        "first_step_seconds": first,
        "sample_seconds": seconds,
        "outside_steps_seconds": seconds - sum(report.step_seconds),
        "load_seconds": report.load_seconds,
        "decode_seconds": decode.run_seconds if decode else None,
        "peak_gib": max(report.peak_memory) / 2**30,
        "notes": list(report.notes),
    }
    return row, result.tensor


def measure_diffusers(args: Namespace, job: SampleJob, checkpoint: Checkpoint, *, compiled: bool) -> tuple[dict, torch.Tensor]:
    """diffusers' pipeline on one device, given the same text states and seed; ``compiled`` block by block, as its docs advise."""
    from diffusers import CogVideoXPipeline

    device = Devices.parse(args.devices).first
    dtype = checkpoint.dtype(args.dtype, device)
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
    first = None
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
        first = first or marks[0] - started
    steps = [after - before for before, after in zip([started, *marks], marks)]
    row = {
        "name": "diffusers",
        "plan": "single",
        "gpus": int(device.type == "cuda"),
        "seconds_per_step": median(steps),
        "first_step_seconds": first,
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
