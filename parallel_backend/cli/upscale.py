"""The command ``upscale``: a video to a larger one."""

import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..cogvideox.checkpoint import empty_prompt
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.text import TextEncoder, find_place
from ..cogvideox.pipeline.upscaling import counted, describe, taken_for
from ..devices import Devices
from ..executor.base import Executor
from ..executor.factory import open_executor
from ..executor.feasible import check_feasible
from ..executor.prepare import check_job, prepare
from ..jobs import Report, Result, UpscaleJob
from ..media import reading, video
from ..plan import Plan
from ..system.files import check_writable
from ..validation import TILINGS
from .console import Progress, quiet_libraries, show, show_json
from .fallback import in_group_or_here
from .options import add_checkpoint_options, add_run_options, model_of


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``upscale``."""
    add_checkpoint_options(
        parser, "a super-resolution model: the folder of DOVE's or SparkVSR's checkpoint; or sparkvsr, if downloaded"
    )
    add_run_options(parser)
    parser.add_argument("--video", required=True, help="the video to enlarge")
    parser.add_argument(
        "--scale", type=int, default=UpscaleJob.scale, help="how many times as wide and high; 1 restores details only"
    )
    parser.add_argument(
        "--tile-size", type=int, default=UpscaleJob.tile, help="most rows and columns of a tile in the enlarged video"
    )
    parser.add_argument(
        "--overlap", type=int, default=UpscaleJob.overlap, help="pixels that neighbouring tiles share, at least"
    )
    parser.add_argument("--tile-frames", type=int, default=UpscaleJob.frames, help="most frames of a tile, 8k+1")
    parser.add_argument(
        "--overlap-frames", type=int, default=UpscaleJob.frame_overlap, help="frames that successive tiles share, at least"
    )
    parser.add_argument(
        "--tiling", choices=TILINGS, default="auto", help="encode and decode a tile in parts; auto: if it does not fit whole"
    )
    parser.add_argument("--fps", type=float, help="frames a second of the file (default: those of --video)")
    parser.add_argument("--output", required=True, help="an .mp4 file")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=upscale, step_cache=0.0, guidance_cache=0)


def upscale(args: Namespace) -> int:
    """Makes a larger video."""
    output, job = Path(args.output), read_job(args)
    fps = video.checked_fps(reading.frames_per_second(args.video) if args.fps is None else args.fps)
    prepared = prepare(check_job(job), args.plan, args.devices)
    check_feasible(prepared)
    quiet_libraries()
    lines = [describe(job), taken_for(prepared.checkpoint), f"plan {prepared.plan} on {prepared.devices}: {prepared.reason}"]
    print("\n".join(lines), file=sys.stderr)
    started = time.perf_counter()
    made = in_group_or_here(partial(produce, job, prepared.checkpoint), prepared, args.plan)
    video.save_or_rescue(output, made.tensor, fps=fps)
    show_cost(output, made.report, time.perf_counter() - started, as_json=args.json)
    return 0


def read_job(args: Namespace) -> UpscaleJob:
    """Reads options and the video and checks them. The job's text is blank, and no weights are loaded.

    Raises:
        RequestError: for the first option or file that does not fit.
    """
    video.check_video_name(Path(args.output))
    check_writable(Path(args.output))
    model = model_of(args)
    checkpoint = Checkpoint.of(model)
    if empty_prompt.find(checkpoint) is None:
        checkpoint.check_whole()
    return UpscaleJob(
        model,
        torch.cat(list(reading.pictures(args.video, "video"))),
        checkpoint.blank_text(),
        scale=args.scale,
        tile=args.tile_size,
        overlap=args.overlap,
        frames=args.tile_frames,
        frame_overlap=args.overlap_frames,
        tiling=args.tiling,
    )


def produce(job: UpscaleJob, checkpoint: Checkpoint, plan: Plan, devices: Devices) -> Result:
    """Encodes the empty prompt, while a group starts, and enlarges the video."""
    executor = open_executor(plan, devices)
    with Progress() as on_step:
        try:
            executor.start(checkpoint)
            job = replace(job, positive=states_of_nothing(job, checkpoint, executor))
            return executor.run(job, on_step)
        finally:
            executor.close()


def states_of_nothing(job: UpscaleJob, checkpoint: Checkpoint, executor: Executor) -> torch.Tensor:
    """Returns the text states of the empty prompt, from the model's file if it has one."""
    states = empty_prompt.read(checkpoint)
    if states is not None:
        return states
    place = find_place(checkpoint, executor.torch_devices, job.model.dtype)
    if place.note:
        print(place.note, file=sys.stderr)
    encoder = TextEncoder(checkpoint, device=place.device, dtype=place.dtype)
    states = encoder.encode_prompt("")
    encoder.unload()
    return states


def show_cost(output: Path, report: Report, seconds: float, *, as_json: bool) -> None:
    """Prints what the video cost, and the notes.

    Args:
        output: the file.
        report: of the job.
        seconds: from start to end.
        as_json: prints one JSON object.
    """
    for note in report.notes:
        print(note, file=sys.stderr)
    found = {
        "output": str(output),
        "plan": report.plan,
        "world_size": report.world_size,
        "tiles": len(report.step_seconds),
        "tile_seconds": median(report.step_seconds),
        "load_seconds": report.load_seconds,
        "run_seconds": report.run_seconds,
        "total_seconds": seconds,
        "peak_memory": list(report.peak_memory),
        "notes": list(report.notes),
    }
    if as_json:
        show_json(found)
        return
    show(
        f"{output}: plan {report.plan}, {counted(found['tiles'])}, {found['tile_seconds']:.2f} s a tile, "
        f"load {report.load_seconds:.1f} s, run {report.run_seconds:.1f} s, total {seconds:.1f} s"
    )
