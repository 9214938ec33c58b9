"""The options of ``generate``."""

from argparse import ArgumentParser

from ..model import RIFLEXES, WINDOW_SCHEDULES
from ..validation import TILINGS
from .condition_options import add_condition_options
from .generate import generate
from .options import add_model_options, add_run_options


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``generate``."""
    add_model_options(parser)
    add_run_options(parser)
    parser.add_argument(
        "--timesteps",
        default="",
        metavar="LIST",
        help="noise levels of the steps by hand, such as 999,856,665,399; replaces --steps",
    )
    parser.add_argument("--dynamic-cfg", action="store_true", help="vary the guidance scale along a cosine")
    add_prompt_options(parser)
    add_condition_options(parser)
    add_window_options(parser)
    add_file_options(parser)
    parser.set_defaults(run=generate)


def add_prompt_options(parser: ArgumentParser) -> None:
    """Adds the options for prompts and seeds."""
    group = parser.add_argument_group("prompts and seeds")
    prompts = group.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        help=r"what to show; (words:1.3) sets a weight and (words) means 1.1, as in ComfyUI; write brackets of the text as \( and \) "
        "(required, or --prompts-file)",
    )
    prompts.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt a line, one video each; their numbers are added to OUTPUT; replicasN in the plan makes N at a time",
    )
    group.add_argument("--negative-prompt", default="", help="what not to show; weights work as in --prompt")
    group.add_argument("--seed", type=int, default=0, help="of the first video's noise")
    group.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="N videos of each prompt, with N seeds from --seed on; their numbers are added to OUTPUT",
    )


def add_window_options(parser: ArgumentParser) -> None:
    """Adds the options for long videos."""
    group = parser.add_argument_group("long videos")
    group.add_argument("--window", type=int, help="for a long video: frames in one context window, 4k+1")
    group.add_argument("--overlap", type=int, help="frames by which windows overlap (default: two thirds of a window)")
    group.add_argument(
        "--window-schedule",
        choices=WINDOW_SCHEDULES,
        help="static, or uniform: windows move from step to step (default static)",
    )
    group.add_argument(
        "--no-noise-shuffle",
        action="store_true",
        help="draw new noise for every frame instead of reusing the first window's in a new order",
    )
    group.add_argument(
        "--riflex",
        choices=RIFLEXES,
        default="off",
        help="on: stretch CogVideoX-5b to windows of twice its training length, with --window 97; finetuned: for RIFLEx's own weights",
    )


def add_file_options(parser: ArgumentParser) -> None:
    """Adds the options for what is written."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--tiling", choices=TILINGS, default="auto", help="encode and decode in tiles; auto: if a whole video does not fit"
    )
    group.add_argument(
        "--fps", type=float, help="frames a second of the file (default: those used of --video, else the model's)"
    )
    group.add_argument("--output", required=True, help="an .mp4 file")
    group.add_argument("--save-latents", help="also write the latents to this file, in ComfyUI's format")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
