"""The command line: ``python -m parallel_backend generate | plan | cards | serve | status | stop | bench``."""

import argparse
import logging
import os
import sys

import torch

from ..cogvideox.checkpoint.published import MODELS
from ..config import CONFIG
from ..errors import Cancelled, Failure, RequestError
from ..jobs import SCHEDULERS, TILINGS, SampleJob
from ..model import ATTENTIONS, COMPILES, DTYPES, FP8S, OFFLOADS, QUANTIZES, SNR_SHIFTS, TASKS, WINDOW_SCHEDULES
from ..planner.gpu_table import KNOWN, LINKS
from ..system.limits import usable_cores
from .bench import add_bench_options
from .cards import cards as run_cards
from .condition_options import add_condition_options
from .console import Parser
from .generate import generate as run_generate
from .plan import plan as run_plan
from .serve import serve as run_serve
from .serve import status as run_status
from .serve import stop as run_stop


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for plan and devices."""
    parser.add_argument(
        "--plan", default="auto", help="how to split each step: auto, single, or degrees such as cfg2-ulysses2 (default auto)"
    )
    parser.add_argument(
        "--devices", default="auto", help="auto, cpu, cpu:2 (two processes), or GPU numbers such as 0,1 (default auto)"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for model, size and sampling."""
    parser.add_argument(
        "--model",
        required=True,
        help="a checkpoint folder in diffusers layout, ORG/NAME in the Hugging Face cache, or demo, a tiny model for trying out",
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="to compute in; auto: the checkpoint's own")
    parser.add_argument(
        "--offload", choices=OFFLOADS, default="auto", help="keep weights in CPU memory; auto: if they do not fit"
    )
    parser.add_argument(
        "--compile", choices=COMPILES, default="auto", help="compile kernels for this GPU: faster steps; auto: on GPUs"
    )
    add_rounding_options(parser)
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto", help="auto: the fastest exact function on this GPU")
    parser.add_argument(
        "--step-cache",
        type=float,
        default=0.0,
        metavar="CHANGE",
        help="reuse the last blocks' output while the first block's residual changes by less than this, such as 0.1; 0 disables; "
        "faster, changes the video slightly",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA as a .safetensors file; repeat the option for several",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="auto",
        help="what the model makes a video from; auto: concluded from its configuration",
    )
    parser.add_argument(
        "--snr-shift",
        choices=SNR_SHIFTS,
        default="auto",
        help="shift the noise schedule as the model's configuration says; auto: as the model was trained",
    )
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--frames", type=int, help="4k+1, such as 49 (default: the model's own)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default %(default)s)")
    parser.add_argument("--cfg", type=float, default=6.0, help="guidance scale; 1 turns guidance off (default %(default)s)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="auto", help="auto: the checkpoint's own")
    parser.add_argument(
        "--pipefusion-warmup",
        type=int,
        default=SampleJob.pipefusion_warmup,
        metavar="N",
        help="with pipefusionN in the plan: the first N steps are exact, and as slow as on one GPU (default %(default)s)",
    )


def add_rounding_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that round linear layers and attention."""
    parser.add_argument(
        "--quantize",
        choices=QUANTIZES,
        default="off",
        help="compute linear layers in FP8 (Ada and newer) or int8 (Turing and newer): faster, less memory, changes the video slightly",
    )
    parser.add_argument(
        "--fp8",
        choices=FP8S,
        default="off",
        help="linears: an older form of --quantize fp8; all: attention in FP8 too (Hopper)",
    )


def build_parser() -> Parser:
    """Returns the parser of the whole command line."""
    parser = Parser(prog="parallel_backend", description="CogVideoX on every GPU you have.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_generate_options(commands.add_parser("generate", help="make video files from prompts, images or videos"))
    add_plan_options(commands.add_parser("plan", help="show what auto would choose, and why"))
    commands.add_parser("cards", help="show which GPU can run which published model, and how").set_defaults(run=run_cards)
    add_serve_options(commands.add_parser("serve", help="keep a group running for other processes, on one or several machines"))
    add_status_options(commands.add_parser("status", help="list the groups that are running"))
    add_stop_options(commands.add_parser("stop", help="end the group that serve keeps"))
    bench = commands.add_parser("bench", help="time plans, next to diffusers' and xDiT's own pipelines")
    add_model_options(bench)
    add_bench_options(bench)
    return parser


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``generate``."""
    add_model_options(parser)
    add_run_options(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        help=r"what to show; (words:1.3) sets a weight and (words) means 1.1, as in ComfyUI; write brackets of the text as \( and \)",
    )
    prompts.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt a line, one video each; their numbers are added to OUTPUT; replicasN in the plan makes N at a time",
    )
    parser.add_argument("--negative-prompt", default="", help="what not to show; weights work as in --prompt")
    add_condition_options(parser)
    parser.add_argument(
        "--timesteps",
        default="",
        metavar="LIST",
        help="noise levels of the steps by hand, such as 999,856,665,399; replaces --steps",
    )
    parser.add_argument("--dynamic-cfg", action="store_true", help="vary the guidance scale along a cosine")
    parser.add_argument("--window", type=int, help="for a long video: frames in one context window, 4k+1")
    parser.add_argument("--overlap", type=int, help="frames by which windows overlap (default: two thirds of a window)")
    parser.add_argument(
        "--window-schedule",
        choices=WINDOW_SCHEDULES,
        help="static, or uniform: windows move from step to step (default static)",
    )
    parser.add_argument(
        "--no-noise-shuffle",
        action="store_true",
        help="draw new noise for every frame instead of reusing the first window's in a new order",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="N videos of each prompt, with N seeds from --seed on; their numbers are added to OUTPUT",
    )
    parser.add_argument(
        "--tiling", choices=TILINGS, default="auto", help="encode and decode in tiles; auto: if a whole video does not fit"
    )
    parser.add_argument(
        "--fps", type=float, help="frames a second of the file (default: those used of --video, else the model's)"
    )
    parser.add_argument("--output", required=True, help="an .mp4 file")
    parser.add_argument("--save-latents", help="also write the latents to this file, in ComfyUI's format")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run_generate)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``plan``."""
    parser.add_argument("--model", required=True, help=f"as in generate; or {', '.join(MODELS)}, which need not be downloaded")
    parser.add_argument("--gpus", type=int, help="GPUs of each host (default: those of this machine)")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts that form one group (default %(default)s)")
    parser.add_argument(
        "--memory-gib", type=float, help="memory of one GPU; if the model does not fit, plans that shard its weights are listed"
    )
    parser.add_argument("--memory-gb", type=float, dest="memory_gib", help=argparse.SUPPRESS)  # the option's name before
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"such as 3090; known are {', '.join(KNOWN)} (default: those of this machine)"
    )
    parser.add_argument("--link", choices=tuple(LINKS), help="link between the GPUs (default: the GPU's own)")
    parser.add_argument("--cfg", type=float, default=6.0, help="guidance scale; 1 turns guidance off (default %(default)s)")
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--frames", type=int, help="4k+1, such as 49 (default: the model's own)")
    add_rounding_options(parser)
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="videos to make; replicas may share them (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_plan)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``serve``."""
    add_run_options(parser)
    parser.add_argument("--model", default="demo", help="the model that plan auto is chosen for (default %(default)s)")
    parser.add_argument(
        "--nnodes",
        type=int,
        default=1,
        metavar="N",
        help="hosts that form one group, each with these devices (default %(default)s)",
    )
    parser.add_argument(
        "--node-rank",
        type=int,
        default=0,
        metavar="NUMBER",
        help="number of this host: 0 on the host where jobs are sent, 1, 2, … on the others; node 0 chooses the plan for auto",
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="address of node 0 on a private network, where the hosts meet"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=CONFIG.wait_seconds,
        metavar="SECONDS",
        help="timeout for the hosts to meet (default %(default)s)",
    )
    parser.set_defaults(run=run_serve)


def add_status_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``status``."""
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run_status)


def add_stop_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``stop``."""
    parser.add_argument("--all", action="store_true", help="end groups that other programs own too")
    parser.set_defaults(run=run_stop)


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for a failure, 2 for a wrong request."""
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
