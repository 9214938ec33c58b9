"""What each command of the command line does."""

import json
import math
import signal
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
from ..errors import GroupFailure, GroupUnavailable, RequestError
from ..executor import batch
from ..executor.factory import open_executor, resolve, share_of
from ..executor.group import GroupExecutor
from ..group.hosts import Common, Place
from ..group.launcher import Launcher
from ..group.lending import lend
from ..group.muster import Leader, Member
from ..group.preflight import check_possible
from ..group.registry import running
from ..jobs import DecodeJob, EncodeJob, Report, Result, SampleJob, empty_latent
from ..media import video
from ..model import Lora, Model, Windows, two_thirds
from ..plan import AUTO, Plan
from ..planner import hardware
from ..planner.cost_model import Prediction
from ..planner.machine import Machine
from ..planner.planner import approximations, choose, predictions
from ..system.files import check_writable
from ..validation import check_size
from ..workload import work_of, work_of_job
from . import inputs
from .outputs import Video, videos_of
from .prompts import encode_prompts
from .writer import Writer


def show(line: str) -> None:
    """Writes a line of the command's result."""
    print(line, flush=True)


def show_step(step: int, steps: int) -> None:
    """Writes progress to standard error."""
    print(f"step {step}/{steps}", file=sys.stderr, flush=True)


def show_json(value: dict) -> None:
    """Writes one JSON object."""
    show(json.dumps(value))


def quiet_libraries() -> None:
    """Turns the libraries' own progress bars off; ours is the steps."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def size_of(args: Namespace, checkpoint: Checkpoint) -> dict[str, int]:
    """Width, height and frames asked for, or the checkpoint's own."""
    default = dict(zip(("width", "height", "frames"), checkpoint.default_size))
    asked = {name: getattr(args, name) for name in default}
    return {name: value if asked[name] is None else asked[name] for name, value in default.items()}


def model_of(args: Namespace, checkpoint: Checkpoint) -> Model:
    """The model that the options describe."""
    loras = tuple(lora_of(word) for word in args.lora)
    fast = {"compile": args.compile, "fp8": args.fp8, "step_cache": args.step_cache}
    return Model(str(checkpoint.path), dtype=args.dtype, offload=args.offload, **fast, loras=loras)


def lora_of(word: str) -> Lora:
    """A LoRA from ``FILE`` or ``FILE:STRENGTH``; a file's own name may have a colon."""
    file, _, strength = word.rpartition(":")
    if not file or Path(word).expanduser().is_file():
        file, strength = word, "1"
    try:
        number = float(strength)
    except ValueError:
        raise RequestError(f"--lora {word}: '{strength}' is no strength; write FILE:STRENGTH, such as {file}:0.8") from None
    return Lora(str(Path(file).expanduser().absolute()), number)


def denoise_of(args: Namespace) -> float:
    """The denoise asked for; by default everything, or what diffusers leaves of a video."""
    if args.video is not None and args.mask is None and args.denoise == 1:
        raise RequestError("denoise 1 keeps nothing of the video; use less, such as 0.8, or leave the video out")
    if args.denoise is None:
        return 1.0 if args.video is None or args.mask is not None else 0.8
    return args.denoise


def windows_of(args: Namespace) -> Windows | None:
    """The context windows asked for, or None."""
    if args.window is None:
        if args.overlap is not None or args.window_schedule or args.no_noise_shuffle:
            raise RequestError(
                "--overlap, --window-schedule and --no-noise-shuffle are about context windows; give --window too"
            )
        return None
    overlap = two_thirds(args.window) if args.overlap is None else args.overlap
    schedule = args.window_schedule or Windows.schedule
    return Windows(args.window, overlap, schedule, shuffle_noise=not args.no_noise_shuffle)


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


def plan(args: Namespace) -> int:
    """What every plan is predicted to cost, which one ``auto`` would choose, and why."""
    checkpoint = Checkpoint.open(bundled.find(args.model))
    if args.gpus is not None and args.gpus < 1:
        raise RequestError(f"gpus is {args.gpus}; use 1 or more")
    if args.memory_gib is not None and not 0 < args.memory_gib < math.inf:
        raise RequestError(f"memory-gib is {args.memory_gib:g}; give what one GPU has, such as 24")
    if args.count < 1:
        raise RequestError(f"count is {args.count}; use 1 or more")
    size = size_of(args, checkpoint)
    check_size(**size, batch=1)
    if args.nnodes < 1:
        raise RequestError(f"nnodes is {args.nnodes}; use 1 or more")
    present = Devices.parse("auto")
    each = args.gpus or present.count
    count = each * args.nnodes
    machine = hardware.asked(args.gpu, count=each, link=args.link, memory_gib=args.memory_gib)
    work = work_of(checkpoint, torch.device("cuda"), size=tuple(size.values()), guided=args.cfg > 1, fp8=args.fp8)
    found = predictions(work, machine, count, jobs=args.count)
    found += [replace(each, rounds=args.count) for each in approximations(work, machine, count)]
    found.sort(key=lambda each: each.total)
    chosen, reason = choose(heads=checkpoint.heads, world_size=count, work=work, machine=machine, jobs=args.count)
    if args.json:
        show_json({**figures(found, machine), "model": checkpoint.name, "gpus": count, "plan": str(chosen), "reason": reason})
        return 0
    show(checkpoint.describe)
    if args.gpu is None:
        for line in [*hardware.survey(present), *hardware.warnings(present)]:
            show(line)
    show(
        f"{'':2} {'plan':24} {'s a step':>9} {'peak GiB':>9} {'needs GiB':>9}  fits"
        + (f"  s a step of all {args.count}" if args.count > 1 else "")
    )
    for each in found:
        mark, last = "->" if each.plan == chosen else "", f"  {each.total:9.3g}" if args.count > 1 else ""
        fits = "yes" if each.fits else "no"
        exact = "" if each.plan.is_exact else "  not exact: auto leaves it to you"
        show(
            f"{mark:2} {str(each.plan):24} {each.seconds:9.3g} {each.peak / 2**30:9.3g} {each.needed / 2**30:9.3g}  {fits:4}{last}{exact}".rstrip()
        )
    show(machine.describe)
    hosts = f" on {args.nnodes} hosts" if args.nnodes > 1 else ""
    show(f"{count} GPU{'s' * (count > 1)}{hosts} ({machine.name}): {reason}")
    return 0


def figures(found: list[Prediction], machine: Machine) -> dict:
    """What was predicted, and from what, in plain values."""
    plans = [
        {
            "plan": str(each.plan),
            "devices": each.plan.world_size,
            "step_seconds": each.seconds,
            "total_step_seconds": each.total,
            "peak_memory": each.peak,
            "needed_memory": each.needed,
            "fits": each.fits,
            "exact": each.plan.is_exact,
        }
        for each in found
    ]
    rates = {
        "matrix": machine.matrix,
        "attention": machine.attention,
        "bandwidth": machine.bandwidth,
        "from": machine.rates_from,
    }
    link = {"bandwidth": machine.link.bandwidth, "latency": machine.link.latency, "from": machine.link_from}
    return {"gpu": machine.name, "free_memory": machine.free, "rates": rates, "link": link, "plans": plans}


def serve(args: Namespace) -> int:
    """Keeps a group until it is stopped; alone, as node 0 of several hosts, or as another that lends it devices."""
    place = Place.asked(args.nnodes, args.node_rank, args.rendezvous, args.wait)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if place and place.node:
        return lend_devices(args, place)
    checkpoint = Checkpoint.open(bundled.find(args.model))
    work = partial(work_of, checkpoint)
    nodes = place.nodes if place else 1
    about = {"heads": checkpoint.heads, "layers": checkpoint.layers, "work": work}
    chosen, devices, reason = resolve(args.plan, args.devices, **about, nodes=nodes)
    muster = None
    if place:
        common = Common.here(nodes=nodes, plan=str(chosen), kind=devices.kind, processes=devices.count)
        muster = Leader(place, common, str(devices))
    executor = GroupExecutor(chosen, devices, muster)
    try:
        executor.share()
        come_up(executor)
        where = " and ".join(map(str, muster.meeting.hosts)) if muster else str(devices)
        show(f"serving plan {chosen} on {where} ({reason}) at {executor.address.folder}; end it with stop or Ctrl-C")
        while executor.wait() != 0:
            come_up(executor)
            show(f"the group was lost; serving again at {executor.address.folder}")
    except KeyboardInterrupt:
        show("ending")
    finally:
        executor.close()
    return 0


def come_up(executor: GroupExecutor) -> None:
    """Starts a group and waits until it answers. One that is lost meanwhile is started once more, or whenever a host went.

    Raises:
        GroupFailure: when it does not come up.
    """
    tried = 0
    while True:
        executor.start()
        if executor.status()["state"] != "absent":
            return
        cause, tried = executor.lost, tried + 1
        if tried > 1 and not cause.gone:
            raise GroupUnavailable(
                f"the group did not start: {cause.cause}; twice, so it is not tried again", details=cause.details
            )
        show(f"the group was lost while it started: {cause.cause}")


def lend_devices(args: Namespace, place: Place) -> int:
    """What ``serve`` does on a host that is not node 0."""
    chosen = None if args.plan == AUTO else Plan.parse(args.plan)
    devices = Devices.parse(args.devices)
    if chosen and args.devices == AUTO:
        devices = share_of(chosen, devices, place.nodes)
    check_possible(chosen, devices, place.nodes)
    common = Common.here(nodes=place.nodes, plan=str(chosen or AUTO), kind=devices.kind, processes=devices.count)
    muster = Member(place, common, str(devices))
    try:
        lend(Launcher(chosen, devices, muster), muster, show)
    except KeyboardInterrupt:
        show("ending")
    return 0


def status(args: Namespace) -> int:
    """The groups that are running."""
    groups = []
    for address, description in running().items():
        try:
            said = GroupExecutor.attach(address).status()
        except GroupFailure as error:
            said = {"state": f"does not answer ({error.summary})"}
        groups.append({"folder": str(address.folder), **description, **said})
    if args.json:
        show_json({"groups": groups})
        return 0
    for group in groups:
        if "uptime" not in group:
            kept = f"kept by process {group['owner']}, logs {group['folder']}/logs"
            show(f"{group['plan']} on {group['devices']}: {group['state']}, {kept}")
            show_hosts(group)
            continue
        memory = "/".join(f"{size / 2**30:.1f}" for size in group["memory"]) or "-"
        show(
            f"{group['plan']} on {group['devices']}: {group['state']}, up {group['uptime']:.0f} s, jobs {group['jobs']}, "
            f"queue {group['queue']}, model {group['model']}, memory {memory} GiB, "
            f"link {group['link'] / 1e9:.2g} GB/s and {group['latency'] * 1e6:.0f} us, kept by process {group['owner']}, "
            f"logs {group['folder']}/logs, last error {group['last_error']}"
        )
        show_hosts(group)
    if not groups:
        show("no group is running")
    return 0


def show_hosts(group: dict) -> None:
    """A line for each host of a group that has several, with its memory where that is known."""
    for host in group.get("hosts") or ():
        memory = group.get("memory", [])[host["first_rank"] : host["first_rank"] + host["processes"]]
        held = f", memory {'/'.join(f'{size / 2**30:.1f}' for size in memory)} GiB" if memory else ""
        show(f"  host {host['name']} ({host['address']}, node {host['node']}): {host['ranks']} on {host['devices']}{held}")


def stop(args: Namespace) -> int:
    """Ends the group that ``serve`` keeps."""
    groups = running()
    for address, description in groups.items():
        if description["node"]:
            show(
                f"{address.folder} is a part of a group whose node 0 is elsewhere: stop it there, or end serve here with Ctrl-C"
            )
        elif args.all or description["shared"]:
            try:
                GroupExecutor.attach(address).stop()
                show(f"ended {address.folder}")
            except GroupFailure as error:
                show(f"{address.folder}: {error.summary}")
    if not groups:
        show("no group is running")
    return 0


def bench(args: Namespace) -> int:
    """Side by side with diffusers and xDiT's own pipeline."""
    from benchmarks.table import run

    return run(args)
