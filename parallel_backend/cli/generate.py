"""The command ``generate``: prompts, images and videos to video files."""

import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..cogvideox.checkpoint import bundled
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline import validation
from ..devices import Devices
from ..errors import GroupUnavailable
from ..executor import batch
from ..executor.factory import open_executor, resolve
from ..jobs import DecodeJob, EncodeJob, Report, Result, SampleJob, empty_latent
from ..media import video
from ..plan import AUTO, Plan
from ..system.files import check_writable
from ..workload import work_of_job
from . import inputs
from .console import quiet_libraries, show, show_json, show_step
from .options import denoise_of, model_of, size_of, windows_of
from .outputs import Video, videos_of
from .prompts import encode_prompts
from .writer import Writer


def generate(args: Namespace) -> int:
    """Prompts, and images or videos where they are given, to a video file each."""
    video.check_video_name(Path(args.output))
    wanted = videos_of(args)
    if args.fps is not None:
        video.checked_fps(args.fps)
    for path in (path for one in wanted for path in one.files):
        check_writable(path)
    checkpoint = Checkpoint.open(bundled.find(args.model))
    checkpoint.check_whole()
    model = model_of(args, checkpoint)
    denoise, size = denoise_of(args), size_of(args, checkpoint)
    given, ready = inputs.read(args, size, checkpoint)
    latent = empty_latent(**size, channels=checkpoint.channels)
    settings = {
        "denoise": denoise,
        "seed": wanted[-1].seed,
        "steps": args.steps,
        "cfg": args.cfg,
        "scheduler": args.scheduler,
        "dynamic_cfg": args.dynamic_cfg,
        "windows": windows_of(args),
        "image_scale": args.image_scale,
        "control_strength": args.control_strength,
        "control_start": args.control_start,
        "control_end": args.control_end,
        "pipefusion_warmup": args.pipefusion_warmup,
        **ready,
    }
    blank = checkpoint.blank_text()
    blanks = {name: torch.ones_like(latent[:, :, :1] if name == "image" else latent) for name in given}
    job = SampleJob(model, blank, negative=blank, **{"latent": latent, **blanks}, **settings)
    validation.check(checkpoint, job)  # before anything is loaded to fill the blanks
    wants = {"heads": checkpoint.heads, "layers": checkpoint.layers, "guided": args.cfg > 1, "offload": args.offload}
    wants["jobs"] = len(wanted)
    if len(wanted) == 1 and batch.has_windows_to_share(job):
        wants |= {"jobs": batch.windows_of(job), "pieces": "windows"}
    plan, devices, reason = resolve(args.plan, args.devices, **wants, work=partial(work_of_job, job, checkpoint))
    validation.check_plan(checkpoint, plan, job)

    quiet_libraries()
    print(f"{checkpoint.describe}\nplan {plan} on {devices}: {reason}", file=sys.stderr)
    started = time.perf_counter()
    try:
        costs = produce(args, wanted, job, given, checkpoint, plan, devices)
    except GroupUnavailable as error:
        if args.plan != AUTO:
            raise
        print(f"no group: {error.summary}; working in this process", file=sys.stderr)
        costs = produce(args, wanted, job, given, checkpoint, Plan(), devices)
    total = time.perf_counter() - started
    made = [{**summarise(*cost), "output": str(one.output), "seed": one.seed} for one, cost in zip(wanted, costs)]
    for note in dict.fromkeys(note for summary in made for note in summary["notes"]):
        print(note, file=sys.stderr)
    if args.json:
        show_json({**made[0], "total_seconds": total} if len(made) == 1 else {"videos": made, "total_seconds": total})
        return 0
    for summary in made:
        show(
            f"{summary['output']}: plan {summary['plan']}, {1 / summary['step_seconds']:.2f} steps/s, "
            f"load {summary['load_seconds']:.1f} s, sample {summary['sample_seconds']:.1f} s, "
            f"decode {summary['decode_seconds']:.1f} s" + (f", total {total:.1f} s" if len(made) == 1 else "")
        )
    if len(made) > 1:
        show(f"{len(made)} videos: total {total:.1f} s")
    return 0


def produce(
    args: Namespace,
    wanted: list[Video],
    job: SampleJob,
    given: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    plan: Plan,
    devices: Devices,
) -> list[tuple[Report, Report]]:
    """Encodes prompts and pictures into the job's blanks, samples, decodes and writes the files. Returns what each video cost.

    A video is decoded once it is sampled, and written while the next is sampled: what is done is there, whatever becomes of the rest.
    """
    source = args.video or args.control_video
    fps = video.checked_fps(args.fps or (inputs.frames_per_second(source) if source else checkpoint.default_fps))
    costs: dict[int, tuple[Report, Report]] = {}

    def decode(place: int, sampled: Result) -> DecodeJob:
        if latents := wanted[place].latents:
            video.save_latent(latents, sampled.tensor)
        return DecodeJob(job.model, sampled.tensor, tiling=args.tiling)

    def finish(place: int, sampled: Result, decoded: Result) -> None:
        one, costs[place] = wanted[place], (sampled.report, decoded.report)
        about = {"fps": fps, "metadata": {"prompt": one.prompt}}
        writer.add(partial(video.save_or_rescue, one.output, decoded.tensor[0], **about))

    executor = open_executor(plan, devices)
    with Writer() as writer:
        try:
            executor.start()  # a group comes up while the text is read
            texts = [*(one.prompt for one in wanted), *([args.negative_prompt] if job.guided else [])]
            states, loaded = encode_prompts(texts, job, checkpoint, executor)
            conditions = {
                name: executor.encode(EncodeJob(job.model, pixels, args.tiling)).tensor for name, pixels in given.items()
            }
            job = replace(job, negative=states[args.negative_prompt] if job.guided else None, **conditions)
            jobs = [replace(job, positive=states[one.prompt], seed=one.seed) for one in wanted]
            executor.make_all(jobs, decode, finish, on_step=show_step)
        finally:
            executor.close()
    sampled, decoded = costs[0]
    costs[0] = replace(sampled, load_seconds=sampled.load_seconds + loaded.load_seconds), decoded
    return [costs[place] for place in range(len(wanted))]


def summarise(sampled: Report, decoded: Report) -> dict:
    """The figures of a sampling and a decoding report, in plain values."""
    return {
        "plan": sampled.plan,
        "world_size": sampled.world_size,
        "load_seconds": sampled.load_seconds + decoded.load_seconds,
        "step_seconds": median(sampled.step_seconds),
        "sample_seconds": sampled.run_seconds,
        "decode_seconds": decoded.run_seconds,
        "peak_memory": list(sampled.peak_memory),
        "decode_peak_memory": list(decoded.peak_memory),
        "notes": [*sampled.notes, *decoded.notes],
    }
