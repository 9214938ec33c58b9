"""The command ``generate``: prompts, images and videos to video files."""

import math
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.description import describe
from ..cogvideox.vae.frames import FramesListener
from ..devices import Devices
from ..errors import GroupFailure
from ..executor.base import Executor
from ..executor.factory import open_executor
from ..executor.feasible import check_feasible
from ..executor.prepare import CheckedJob, check_job, prepare
from ..jobs import DecodeJob, EncodeJob, Report, Result, SampleJob, empty_latent
from ..media import video
from ..media.encoding import Encodings
from ..plan import Plan
from ..system.files import check_writable
from ..validation import timesteps_of
from . import inputs
from .console import Progress, quiet_libraries, show, show_json
from .fallback import in_group_or_here
from .options import cfg_of, denoise_of, model_of, size_of, windows_of
from .outputs import Video, videos_of
from .prompts import encode_prompts
from .writer import Writer


@dataclass(frozen=True)
class VideoRequest:
    """What the user wants, read from options and files."""

    videos: list[Video]
    checked: CheckedJob
    """The job of one video. Its text and images are blank until they are encoded."""
    pixels: dict[str, torch.Tensor]
    """To encode, by field of the job: ``[frames, height, width, 3]`` in 0..1."""
    negative_prompt: str
    tiling: str
    fps: Fraction


@dataclass(frozen=True)
class Made:
    """What making the videos cost."""

    costs: list[tuple[Report, Report]]
    """Each video's sampling and decoding report."""
    start_seconds: float
    """Seconds until the group answered; 0 if there was none to start. Text is encoded at the same time."""


def generate(args: Namespace) -> int:
    """Makes a video file of each prompt, and of images or videos if the options name some."""
    request = read_request(args)
    prepared = prepare(request.checked, args.plan, args.devices, jobs=len(request.videos))
    check_feasible(prepared)
    quiet_libraries()
    lines = [*describe(prepared.checkpoint), f"plan {prepared.plan} on {prepared.devices}: {prepared.reason}"]
    print("\n".join(lines), file=sys.stderr)
    started = time.perf_counter()
    made = in_group_or_here(partial(produce, request), prepared, args.plan)
    show_costs(request.videos, made, time.perf_counter() - started, as_json=args.json)
    return 0


def read_request(args: Namespace) -> VideoRequest:
    """Reads options and files and checks them. Loads no weights.

    Raises:
        RequestError: for the first option or file that does not fit.
    """
    video.check_video_name(Path(args.output))
    videos = videos_of(args)
    if args.fps is not None:
        video.checked_fps(args.fps)
    for path in (path for one in videos for path in one.files):
        check_writable(path)
    model, denoise = model_of(args), denoise_of(args)
    checkpoint = Checkpoint.of(model)
    checkpoint.check_whole()
    size = size_of(args, checkpoint)
    pixels, ready, timesteps = *inputs.read(args, size, checkpoint), timesteps_of(args.timesteps)
    latent, blank = empty_latent(**size, channels=checkpoint.channels), checkpoint.blank_text()
    fields = {name: torch.ones_like(latent[:, :, :1] if name in ("image", "end_image") else latent) for name in pixels}
    job = SampleJob(
        model,
        positive=blank,
        negative=blank,
        denoise=denoise,
        seed=videos[-1].seed,
        steps=len(timesteps) or args.steps,
        timesteps=timesteps,
        cfg=cfg_of(args, checkpoint),
        scheduler=args.scheduler,
        dynamic_cfg=args.dynamic_cfg,
        windows=windows_of(args),
        image_scale=args.image_scale,
        image_strength=args.image_strength,
        image_start=args.image_start,
        image_end=args.image_end,
        control_strength=args.control_strength,
        control_start=args.control_start,
        control_end=args.control_end,
        pipefusion_warmup=args.pipefusion_warmup,
        **{"latent": latent, **fields, **ready},
    )
    source = args.video or args.control_video or args.controlnet_video
    fps = video.checked_fps(args.fps or (inputs.rate_of(source, args, checkpoint).fps if source else checkpoint.default_fps))
    return VideoRequest(videos, check_job(job), pixels, args.negative_prompt, args.tiling, fps)


def produce(request: VideoRequest, plan: Plan, devices: Devices) -> Made:
    """Encodes text and images, samples, decodes and writes the files.

    Each video is decoded once it is sampled, encoded meanwhile, and written while the next one is sampled, so a failure costs only
    later videos.
    """
    costs: dict[int, tuple[Report, Report]] = {}
    encodings: dict[int, Encodings] = {}
    videos, job = request.videos, request.checked.job

    def decode(place: int, sampled: Result) -> DecodeJob:
        if latents := videos[place].latents:
            video.save_latent(latents, sampled.tensor)
        return DecodeJob(job.model, sampled.tensor, tiling=request.tiling)

    def frames_of(place: int) -> FramesListener:
        encodings[place] = Encodings(request.fps)
        return encodings[place].on_frames

    def finish(place: int, sampled: Result, decoded: Result) -> None:
        one, costs[place] = videos[place], (sampled.report, decoded.report)
        early = encodings.pop(place).videos.get(0) if place in encodings else None
        settings = {"fps": request.fps, "metadata": {"prompt": one.prompt}, "early": early}
        writer.add(partial(video.save_or_rescue, one.output, decoded.tensor[0], **settings))

    executor, began = open_executor(plan, devices), time.time()
    with Progress() as on_step, Writer() as writer:
        try:
            executor.start(request.checked.checkpoint)  # a group starts while the text is encoded
            texts = [*(one.prompt for one in videos), *([request.negative_prompt] if job.guided else [])]
            states, loaded = encode_prompts(texts, job, request.checked.checkpoint, executor)
            conditions = {
                name: executor.encode(EncodeJob(job.model, pixels, request.tiling)).tensor
                for name, pixels in request.pixels.items()
            }
            job = replace(job, negative=states[request.negative_prompt] if job.guided else None, **conditions)
            jobs = [replace(job, positive=states[one.prompt], seed=one.seed) for one in videos]
            executor.make_all(jobs, decode, finish, on_step=on_step, frames_of=frames_of)
            start_seconds = seconds_to_start(executor, began)
        finally:
            executor.close()
    sampled, decoded = costs[0]
    costs[0] = replace(sampled, load_seconds=sampled.load_seconds + loaded.load_seconds), decoded
    return Made([costs[place] for place in range(len(videos))], start_seconds)


def seconds_to_start(executor: Executor, began: float) -> float:
    """Returns how long an executor's group took to start; 0 if it has none, or one that ran before.

    Args:
        executor: after its jobs.
        began: when it was told to start, in seconds since the epoch.
    """
    try:
        known = executor.status()
    except GroupFailure:  # it has ended since
        return 0.0
    uptime = min(one.get("uptime", math.inf) for one in known.get("replicas", [known]))
    return max(0.0, time.time() - uptime - began)


def show_costs(videos: list[Video], made: Made, seconds: float, *, as_json: bool) -> None:
    """Prints what each video cost and the notes of all.

    Args:
        videos: what was made.
        made: what it cost.
        seconds: from start to end.
        as_json: prints one JSON object.
    """
    found = [{**summarise(*cost), "output": str(one.output), "seed": one.seed} for one, cost in zip(videos, made.costs)]
    common = {"start_seconds": made.start_seconds, "total_seconds": seconds}
    for note in dict.fromkeys(note for summary in found for note in summary["notes"]):
        print(note, file=sys.stderr)
    if as_json:
        show_json({**found[0], **common} if len(found) == 1 else {"videos": found, **common})
        return
    whole = f"total {seconds:.1f} s" + (f" with {made.start_seconds:.1f} s to start the group" if made.start_seconds else "")
    for summary in found:
        show(
            f"{summary['output']}: plan {summary['plan']}, {summary['step_seconds']:.2f} s a step, "
            f"load {summary['load_seconds']:.1f} s, sample {summary['sample_seconds']:.1f} s, "
            f"decode {summary['decode_seconds']:.1f} s" + (f", {whole}" if len(found) == 1 else "")
        )
    if len(found) > 1:
        show(f"{len(found)} videos: {whole}")


def summarise(sampled: Report, decoded: Report) -> dict:
    """Returns the figures of a sampling and a decoding report, in plain values."""
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
