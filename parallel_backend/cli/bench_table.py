"""The table of ``bench``: what is measured, row by row."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..devices import Devices
from ..errors import GroupUnavailable, RequestError
from ..executor.base import Executor
from ..executor.factory import open_executor
from ..executor.local import LocalExecutor
from ..executor.prepare import CheckedJob, PreparedJob, check_job
from ..executor.resolve import SET_BY_USER, machine_of
from ..jobs import DecodeJob, Progress, SampleJob, empty_latent
from ..model import Model
from ..system.files import check_writable, whole_file
from . import bench_pipelines as pipelines
from .bench_options import DIFFUSERS, NONE, chosen, chosen_precisions, in_precision, plans_of
from .console import Table, quiet_libraries, show
from .options import cfg_of, model_of, size_of

COLUMNS = {
    "name": "name",
    "plan": "plan",
    "precision": "precision",
    "seconds_per_step": "s a step",
    "share_of_peak": "of peak",
    "first_step_seconds": "first step",
    "sample_seconds": "sample s",
    "outside_steps_seconds": "beside steps",
    "decode_seconds": "decode s",
    "peak_gib": "peak GiB",
    "weights_gib": "weights GiB",
    "decode_peak_gib": "decode GiB",
    "from_first": "from first",
    "from_float32": "from fp32",
}
"""The table's columns: fields of a row, and their titles."""
PEAK_SIZE = 8192
"""Of the square matrices whose product says what a GPU can do."""


def text_states(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Two prompts' worth of made-up text states: what they say costs nothing to leave out."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, checkpoint.text_tokens, checkpoint.text_features)
    return [torch.randn(shape, generator=generator) * 0.2 for _ in range(2)]


def job_of(args: Namespace, model: Model, checkpoint: Checkpoint) -> SampleJob:
    """Returns the job that is timed."""
    cfg, (positive, negative) = cfg_of(args, checkpoint), text_states(checkpoint)
    return SampleJob(
        model,
        positive,
        empty_latent(**size_of(args, checkpoint), channels=checkpoint.channels),
        negative if cfg > 1 else None,
        seed=0,
        steps=args.steps,
        cfg=cfg,
        scheduler=args.scheduler,
        pipefusion_warmup=args.pipefusion_warmup,
    )


def run(args: Namespace) -> int:
    """Prints a table, and writes its rows as JSON where asked to."""
    quiet_libraries()
    model = model_of(args)
    checkpoint = Checkpoint.of(model)
    wanted = (
        chosen_precisions(args.precisions),
        *(
            [] if words == NONE else chosen(option, words, allowed)
            for option, words, allowed in (("--diffusers", args.diffusers, DIFFUSERS), ("--xdit", args.xdit, pipelines.XDIT))
        ),
    )
    if args.decode or args.diffusers != NONE:
        checkpoint.check_whole()
    checked = check_job(job_of(args, model, checkpoint))
    plans = plans_of(args, checked)
    devices = Devices.parse(args.devices)
    if devices.on_ray and (wanted[1] or wanted[2] or args.float32):
        raise RequestError(
            f"--diffusers, --xdit and --float32 run in this process, not on '{devices}': use --diffusers {NONE}, and neither of the others"
        )
    peak = None if devices.on_ray else measured_peak(devices.first)  # this process may have no such GPU
    work = operations(checkpoint, checked.job)
    size, cfg = size_of(args, checkpoint), checked.job.cfg
    about = f"{checkpoint.describe}; {size['width']}x{size['height']}x{size['frames']}, {args.steps} steps, cfg {cfg}"
    show(f"{about}; {work / 1e12:.3g} TFLOP a step" + (f", {peak / 1e12:.0f} TFLOP/s at most a GPU" if peak else ""))
    for each in plans:
        if each.reason != SET_BY_USER:
            show(f"auto: {each.reason}")
    fields, table = table_of(args, plans, wanted, has_peak=peak is not None)
    table.show_titles()
    rows, reference, kept, output = [], None, args.reference and Path(args.reference), args.output and Path(args.output)
    for path in (output, None if kept and kept.exists() else kept):
        if path:
            check_writable(path)
    if kept and kept.exists():
        reference = load_file(kept)["latent"]
    common = {"model": checkpoint.path.name, "device": device_name(devices), "cfg": cfg, **size}
    common |= {name: getattr(args, name) for name in ("dtype", "offload", "tiling", "attention")}
    for row, latent in measured(args, checked, plans, devices.first, *wanted):
        if reference is None and latent is not None:
            reference = latent
            if kept:
                with whole_file(kept) as written:
                    save_file({"latent": reference}, written)
        row["from_first"] = None if latent is None else distance(latent, reference)
        row["tflop_per_step"], row["peak_tflops"] = work / 1e12, peak and peak / 1e12
        if peak and row["gpus"] and row["seconds_per_step"]:
            row["share_of_peak"] = work / row["seconds_per_step"] / peak / row["gpus"]
        rows.append({**common, "steps": args.steps, **row})
        show_row(row, fields, table)
        if output:  # after every row: a run that is cut off has what it has
            with whole_file(output) as written:
                written.write_text(json.dumps(rows, indent=1))
    return 0


def measured(
    args: Namespace,
    checked: CheckedJob,
    plans: list[PreparedJob],
    device: torch.device,
    precisions: list[str],
    diffusers: list[str],
    xdit: list[str],
) -> Iterator[tuple[dict, torch.Tensor | None]]:
    """The rows, and the latent of each where it is known. ``device`` is the one of this process, for all but this pack's plans."""
    exact, job, checkpoint = None, checked.job, checked.checkpoint
    if args.float32:
        executor = LocalExecutor(device)
        exact = two_steps(executor, replace(job, model=replace(job.model, dtype="fp32", compile="off")), checkpoint)
        executor.close()
    for prepared in plans:
        try:
            yield from measured_plan(args, prepared, precisions, exact)
        except GroupUnavailable as error:
            if prepared.reason == SET_BY_USER:
                raise
            print(f"no group: {error.summary}; plan {prepared.plan} is not timed", file=sys.stderr)
    for precision in diffusers:
        row, latent = pipelines.diffusers(args, job, checkpoint, device, compiled=precision == "compiled")
        yield {**row, "plan": "single", "precision": precision, "gpus": int(device.type == "cuda")}, latent
    for plan_text in xdit:
        yield pipelines.xdit(args, job, checkpoint, plan_text, device), None


def measured_plan(
    args: Namespace, prepared: PreparedJob, precisions: list[str], exact: torch.Tensor | None
) -> Iterator[tuple[dict, torch.Tensor]]:
    """The rows of one plan, and their latents.

    Args:
        args: of the command.
        prepared: the job, with plan and devices.
        precisions: a row each.
        exact: the latent after two steps in float32; None if rows are not compared with it.
    """
    plan, devices, job = prepared.plan, prepared.devices, prepared.job
    executor = open_executor(plan, devices.first_of(plan.world_size))
    try:
        for precision in precisions:
            asked = replace(job, model=in_precision(job.model, precision))
            row, latent = measure(executor, args, asked)
            row |= {"plan": str(plan), "precision": precision, "gpus": plan.world_size if devices.kind == "cuda" else 0}
            row["from_float32"] = None if exact is None else distance(two_steps(executor, asked, prepared.checkpoint), exact)
            yield row, latent
    finally:
        executor.close()


def device_name(devices: Devices) -> str:
    """Returns the name of the first device; of a Ray cluster those of its kinds."""
    if devices.on_ray:
        return machine_of(devices).name
    return torch.cuda.get_device_name(devices.first) if devices.kind == "cuda" else "cpu"


def measured_peak(device: torch.device) -> float | None:
    """Operations a second of a large bf16 matrix product on a GPU: the median of ten, of random numbers."""
    if device.type != "cuda":
        return None
    first, second = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        first @ second
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * PEAK_SIZE**3 / median(seconds[2:])


def operations(checkpoint: Checkpoint, job: SampleJob) -> float:
    """Floating-point operations of the blocks in one step, over all prompts: matrix products and attention."""
    batch, _, frames, height, width = job.latent.shape
    tokens, features = checkpoint.tokens(frames, height, width) + checkpoint.text_tokens, checkpoint.heads * checkpoint.head_dim
    block = 24 * tokens * features**2 + 4 * tokens**2 * features
    return block * checkpoint.layers * batch * (2 if job.guided else 1)


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


def table_of(
    args: Namespace, plans: list[PreparedJob], wanted: tuple[list[str], ...], *, has_peak: bool
) -> tuple[list[str], Table]:
    """Returns the fields that the options ask for, and the empty table of them.

    Args:
        args: of the command.
        plans: the job with each plan.
        wanted: the precisions, and the pipelines to compare with.
        has_peak: whether the GPU's most operations a second are known.
    """
    left_out = {"share_of_peak": not has_peak, "from_float32": not args.float32}
    left_out |= dict.fromkeys(("decode_seconds", "decode_peak_gib"), not args.decode)
    fields = [field for field in COLUMNS if not left_out.get(field)]
    words = {
        "name": ["diffusers"],
        "plan": ["single", *(str(each.plan) for each in plans), *wanted[2]],
        "precision": [*wanted[0], *wanted[1]],
    }
    return fields, Table({COLUMNS[field]: max(map(len, words.get(field, ["0.00000"]))) for field in fields})


def show_row(row: dict, fields: list[str], table: Table) -> None:
    """Writes one row of the table, and its notes below."""
    table.show(row.get(field) for field in fields)
    for note in row["notes"]:
        show(f"    {note}")


def measure(executor: Executor, args: Namespace, job: SampleJob) -> tuple[dict, torch.Tensor]:
    """One plan in one precision: jobs in a row through one executor, the last one stated."""
    first = loading = None
    warmup = replace(job, steps=args.warmup_steps or job.steps)
    for asked in (*[warmup] * (args.repeat - 1), job):
        started = time.perf_counter()
        result = executor.sample(asked)
        seconds = time.perf_counter() - started
        if first is None:
            first, loading = result.report.step_seconds[0], result.report.load_seconds
    report, weights = result.report, executor.status().get("weights")  # replicas have each its own
    decode, whole = None, None
    for _ in range(args.repeat if args.decode else 0):
        started = time.perf_counter()
        decode = executor.decode(DecodeJob(job.model, result.tensor, tiling=args.tiling)).report
        whole = time.perf_counter() - started
    row = {
        "name": "ours",
        "seconds_per_step": median(report.step_seconds),
        "first_step_seconds": first,
        "sample_seconds": seconds,
        "outside_steps_seconds": seconds - sum(report.step_seconds),
        "first_load_seconds": loading,
        "weights_gib": weights and weights["transformer"] / 2**30,
        "decode_seconds": decode.run_seconds if decode else None,
        "decode_whole_seconds": whole,
        "peak_gib": max(report.peak_memory) / 2**30,
        "decode_peak_gib": max(decode.peak_memory) / 2**30 if decode else None,
        "notes": [*report.notes, *(decode.notes if decode else ())],
    }
    return row, result.tensor
