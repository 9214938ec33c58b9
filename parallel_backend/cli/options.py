"""Options that several commands share, and what they mean: size, model, LoRAs and windows."""

import os
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from pathlib import Path

from ..cluster.nodes import ADDRESS
from ..cogvideox.checkpoint import bundled
from ..cogvideox.checkpoint.catalogue import MODELS
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..errors import RequestError
from ..jobs import SCHEDULERS, SampleJob
from ..model import ATTENTIONS, COMPILES, DTYPES, FP8S, OFFLOADS, QUANTIZES, SNR_SHIFTS, TASKS, Lora, Model, Windows, two_thirds


def add_run_options(parser: ArgumentParser) -> None:
    """Adds the options for plan and devices."""
    parser.add_argument("--plan", default="auto", help="how to split each step: auto, single, or degrees such as cfg2-ulysses2")
    parser.add_argument(
        "--devices",
        default="auto",
        help="auto, cpu, cpu:2 (two processes), GPU numbers such as 0,1, or ray: the GPUs of a Ray cluster; ray:8 for eight of them",
    )


CLUSTER_SILENT = 3
"""Exit status of a command that has done its part here, while the Ray cluster did not answer."""


def add_ray_option(parser: ArgumentParser, what: str) -> None:
    """Adds the option ``--ray`` to a command that does ``what`` on this machine."""
    parser.add_argument(
        "--ray",
        action="store_true",
        default=bool(os.environ.get(ADDRESS)),
        help=f"{what} on the Ray cluster too; always if {ADDRESS} is set",
    )


class FormerOption(Action):
    """An option that Ray has replaced. Its use is refused."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is gone: several machines are a Ray cluster now; use --devices ray (docs/cluster.md)")


def add_former_options(parser: ArgumentParser, *names: str) -> None:
    """Adds options for several machines that no longer exist."""
    for name in names:
        parser.add_argument(name, action=FormerOption, help=SUPPRESS)


MODEL = (
    f"a checkpoint folder in diffusers layout; a model that was downloaded: {', '.join(MODELS)} or ORG/NAME; or demo, a tiny model for "
    "trying out"
)
"""What ``--model`` takes."""


def add_checkpoint_options(parser: ArgumentParser, what: str = MODEL) -> None:
    """Adds the options for the model: its files, precision, speed and LoRAs. ``what`` says which models there are."""
    parser.add_argument("--model", required=True, help=what)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="to compute in; auto: the checkpoint's own")
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="auto",
        help="keep weights in CPU memory; auto: if they do not fit",
    )
    parser.add_argument(
        "--compile", choices=COMPILES, default="auto", help="compile kernels for this GPU: faster steps; auto: on GPUs"
    )
    add_rounding_options(parser)
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto", help="auto: the fastest exact function on this GPU")
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


def add_model_options(parser: ArgumentParser) -> None:
    """Adds the options for model, size and sampling."""
    add_checkpoint_options(parser)
    parser.add_argument(
        "--step-cache",
        type=float,
        default=0.0,
        metavar="CHANGE",
        help="reuse the last blocks' output while the first block's residual changes by less than this, such as 0.1; 0 disables; "
        "faster, changes the video slightly",
    )
    parser.add_argument(
        "--guidance-cache",
        type=int,
        default=0,
        metavar="N",
        help="run the model on the positive prompt only in up to N steps in a row, after a third of the steps, such as 4; 0 disables; "
        "faster, changes the video slightly",
    )
    add_size_options(parser)
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    add_cfg_option(parser)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="auto", help="auto: the checkpoint's own")
    parser.add_argument(
        "--pipefusion-warmup",
        type=int,
        default=SampleJob.pipefusion_warmup,
        metavar="N",
        help="with pipefusionN in the plan: the first N steps are exact, and as slow as on one GPU",
    )


def add_rounding_options(parser: ArgumentParser) -> None:
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


def add_cfg_option(parser: ArgumentParser) -> None:
    """Adds the option for the guidance scale."""
    parser.add_argument(
        "--cfg", type=float, help="guidance scale; 1 turns guidance off (default: 6, and 1 for an object removal model)"
    )


def cfg_of(args: Namespace, checkpoint: Checkpoint) -> float:
    """Returns the guidance scale; the checkpoint's own if not given."""
    return checkpoint.default_cfg if args.cfg is None else args.cfg


def add_size_options(parser: ArgumentParser) -> None:
    """Adds the options for the video's size."""
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--frames", type=int, help="4k+1, such as 49 (default: the model's own)")


def size_of(args: Namespace, checkpoint: Checkpoint) -> dict[str, int]:
    """Returns width, height and frames; the checkpoint's own if not given."""
    default = dict(zip(("width", "height", "frames"), checkpoint.default_size))
    asked = {name: getattr(args, name) for name in default}
    return {name: value if asked[name] is None else asked[name] for name, value in default.items()}


def model_of(args: Namespace) -> Model:
    """Returns the model that the options describe.

    Raises:
        RequestError: if there is no such checkpoint, or for a value that is not allowed.
    """
    loras = tuple(lora_of(word) for word in args.lora)
    fast = {"compile": args.compile, "fp8": args.fp8, "quantize": args.quantize, "step_cache": args.step_cache}
    fast |= {"attention": args.attention, "guidance_cache": args.guidance_cache}
    taken = {"task": args.task, "snr_shift": args.snr_shift}
    return Model(str(bundled.find(args.model)), dtype=args.dtype, offload=args.offload, **fast, loras=loras, **taken)


def lora_of(word: str) -> Lora:
    """Parses ``FILE`` or ``FILE:STRENGTH``. A file's name may contain colons."""
    file, _, strength = word.rpartition(":")
    if not file or Path(word).expanduser().is_file():
        file, strength = word, "1"
    try:
        number = float(strength)
    except ValueError:
        raise RequestError(f"--lora {word}: '{strength}' is not a number; write FILE:STRENGTH, such as {file}:0.8") from None
    return Lora(str(Path(file).expanduser().absolute()), number)


def denoise_of(args: Namespace) -> float:
    """Returns the share of the steps to run; by default 1, or 0.8 of a video, as in diffusers."""
    if args.video is not None and args.mask is None and args.denoise == 1:
        raise RequestError("denoise 1 keeps nothing of the video; use less, such as 0.8, or leave the video out")
    if args.denoise is None:
        return 1.0 if args.video is None or args.mask is not None else 0.8
    return args.denoise


def windows_of(args: Namespace) -> Windows | None:
    """Returns the context windows, or None."""
    if args.window is None:
        if args.overlap is not None or args.window_schedule or args.no_noise_shuffle or args.riflex != "off":
            raise RequestError(
                "--overlap, --window-schedule, --no-noise-shuffle and --riflex need context windows; give --window too"
            )
        return None
    overlap = two_thirds(args.window) if args.overlap is None else args.overlap
    schedule = args.window_schedule or Windows.schedule
    return Windows(args.window, overlap, schedule, not args.no_noise_shuffle, args.riflex)
