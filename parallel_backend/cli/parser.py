"""The command line: ``python -m parallel_backend generate | plan | serve | status | stop | bench``."""

import argparse
import logging
import os
import sys

import torch

from ..errors import Cancelled, Failure, RequestError
from ..jobs import IMAGE_SCALES, SCHEDULERS, TILINGS, SampleJob
from ..model import COMPILES, DTYPES, FP8S, OFFLOADS, WINDOW_SCHEDULES
from ..planner.hardware import KNOWN, LINKS
from ..system.limits import usable_cores
from .bench import bench as run_bench
from .generate import generate as run_generate
from .plan import plan as run_plan
from .serve import serve as run_serve
from .serve import status as run_status
from .serve import stop as run_stop


class Parser(argparse.ArgumentParser):
    """Ends with one line and status 2 for a request that makes no sense, as the rest of the pack does."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where and how to run."""
    parser.add_argument("--plan", default="auto", help="auto, single, or degrees such as cfg2-ulysses2")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu:2 (two processes), or GPU numbers such as 0,1")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what to compute."""
    parser.add_argument(
        "--model", required=True, help="a checkpoint folder in diffusers layout, ORG/NAME in the Hugging Face cache, or demo"
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--offload", choices=OFFLOADS, default="auto", help="where weights wait between uses")
    parser.add_argument("--compile", choices=COMPILES, default="auto", help="kernels for this GPU: faster steps")
    parser.add_argument("--fp8", choices=FP8S, default="off", help="what is rounded to FP8: faster and smaller, another video")
    parser.add_argument(
        "--step-cache",
        type=float,
        default=0.0,
        metavar="CHANGE",
        help="use blocks of an earlier step again while the first one changes less, such as 0.1: faster, another video",
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="a .safetensors file; may be given several times"
    )
    parser.add_argument("--width", type=int, help="default: what the model was trained for")
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int, help="4k+1")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=6.0, help="1 turns guidance off")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="auto")
    parser.add_argument(
        "--pipefusion-warmup",
        type=int,
        default=SampleJob.pipefusion_warmup,
        metavar="N",
        help="with pipefusionN in the plan: steps that are exact first, as slow as on one GPU (default %(default)s)",
    )


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="parallel_backend", description="CogVideoX on every GPU you have.")
    commands_of = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    generate = commands_of.add_parser("generate", help="a prompt, an image or a video to a video file")
    add_model_options(generate)
    add_run_options(generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", help=r"as in ComfyUI: (words:1.3) weighs words, (words) by 1.1; \( and \) are brackets of the text"
    )
    prompts.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="many prompts, one a line: a video each, OUTPUT with its number before .mp4; replicasN in the plan makes N at a time",
    )
    generate.add_argument("--negative-prompt", default="", help="what not to show; weighs words likewise")
    generate.add_argument(
        "--image", help="a file to start from, for an image-to-video or inpaint model; resized to cover, cropped at the centre"
    )
    generate.add_argument("--end-image", help="a file to end with, for an inpaint model")
    generate.add_argument(
        "--image-scale", choices=IMAGE_SCALES, default="auto", help="what an image-to-video model's image is multiplied by"
    )
    generate.add_argument("--control-video", help="a file of poses, edges or depth, for a control model")
    generate.add_argument("--control-strength", type=float, default=1.0)
    generate.add_argument("--control-start", type=float, default=0.0, help="share of the steps without control at first")
    generate.add_argument("--control-end", type=float, default=1.0, help="share of the steps after which there is none")
    generate.add_argument("--video", help="a file to make another video of; resized and cropped likewise")
    generate.add_argument("--mask", help="an image or video, white where --video is replaced; for an inpaint model")
    generate.add_argument("--denoise", type=float, help="with a video: how much of it is replaced; default 0.8, with a mask 1")
    generate.add_argument("--dynamic-cfg", action="store_true", help="let the guidance scale follow a cosine")
    generate.add_argument("--window", type=int, help="for a long video: frames that the model sees at once, 4k+1")
    generate.add_argument("--overlap", type=int, help="frames by which windows overlap; default: two thirds of one")
    generate.add_argument("--window-schedule", choices=WINDOW_SCHEDULES, help="static, or shifted from step to step")
    generate.add_argument("--no-noise-shuffle", action="store_true", help="new noise for every window")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="N videos of each prompt, of as many seeds from --seed; numbered likewise",
    )
    generate.add_argument("--tiling", choices=TILINGS, default="auto", help="encode and decode in tiles")
    generate.add_argument("--fps", type=float, help="default: the video's own where one is given, else the model's")
    generate.add_argument("--output", required=True, help="an .mp4 file")
    generate.add_argument("--save-latents", help="also write the latents, as ComfyUI does")
    generate.add_argument("--json", action="store_true", help="print one JSON object last")
    generate.set_defaults(run=run_generate)

    plan = commands_of.add_parser("plan", help="what auto would choose, and why")
    plan.add_argument("--model", required=True)
    plan.add_argument("--gpus", type=int, help="of each host; default: those of this machine")
    plan.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts that work together")
    plan.add_argument(
        "--memory-gib", type=float, help="of one GPU; where the model does not fit, plans that split it are listed"
    )
    plan.add_argument("--memory-gb", type=float, dest="memory_gib", help=argparse.SUPPRESS)  # the option's name before
    plan.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(KNOWN)}; default: those of this machine")
    plan.add_argument("--link", choices=tuple(LINKS), help="between the GPUs; default: what such a GPU has")
    plan.add_argument("--cfg", type=float, default=6.0, help="1 turns guidance off")
    plan.add_argument("--width", type=int, help="default: what the model was trained for")
    plan.add_argument("--height", type=int)
    plan.add_argument("--frames", type=int, help="4k+1")
    plan.add_argument("--fp8", choices=FP8S, default="off")
    plan.add_argument("--count", type=int, default=1, metavar="N", help="videos one after the other: replicas may share them")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=run_plan)

    serve = commands_of.add_parser("serve", help="keep a group for the user's other processes, over several machines too")
    add_run_options(serve)
    serve.add_argument("--model", default="demo", help="for plan auto: the model to plan for")
    serve.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts that work together, each with these devices")
    serve.add_argument(
        "--node-rank",
        type=int,
        default=0,
        metavar="NUMBER",
        help="of this host: 0 where people use the group, 1, 2, … on hosts that lend it their devices; plan auto there is node 0's",
    )
    serve.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="where the hosts meet: an address of node 0 on a private network"
    )
    serve.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="how long hosts wait for each other")
    serve.set_defaults(run=run_serve)

    status = commands_of.add_parser("status", help="the groups that are running")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=run_status)

    stop = commands_of.add_parser("stop", help="end the group that serve keeps")
    stop.add_argument("--all", action="store_true", help="also those that other programs keep")
    stop.set_defaults(run=run_stop)

    bench = commands_of.add_parser("bench", help="side by side with diffusers' and xDiT's own pipelines")
    add_model_options(bench)
    bench.add_argument("--plans", default="single", help="comma-separated; none leaves ours out")
    bench.add_argument(
        "--precisions",
        default="lossless",
        help="comma-separated: lossless, eager, fp8, fp8-all; each may have a step cache: fp8-all+cache0.1",
    )
    bench.add_argument("--float32", action="store_true", help="also state each row's distance from float32 after two steps")
    bench.add_argument("--devices", default="auto")
    bench.add_argument("--repeat", type=int, default=2, help="jobs a plan; the last one is stated")
    bench.add_argument("--warmup-steps", type=int, help="of the jobs before the last; default: as many as the last one's")
    bench.add_argument("--reference", metavar="FILE", help="latent that rows are compared with; written here where it is not")
    bench.add_argument("--diffusers", default="eager", help="comma-separated: eager, compiled; none leaves it out")
    bench.add_argument("--xdit", default="none", help="comma-separated plans of xDiT's own pipeline, such as cfg2,ulysses2")
    bench.add_argument("--decode", action="store_true", help="also time a decode")
    bench.add_argument("--tiling", choices=TILINGS, default="auto", help="decode in tiles")
    bench.add_argument("--output", help="write the rows as JSON here")
    bench.set_defaults(run=run_bench)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for a failure, 2 for a request that makes no sense."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__.removesuffix(".cli")).setLevel(logging.INFO)
    if "OMP_NUM_THREADS" not in os.environ:  # torch does not see a container's quota
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    try:
        return args.run(args)
    except RequestError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    except (Cancelled, KeyboardInterrupt):
        print(f"{args.command}: stopped", file=sys.stderr)
        return 1
