"""Turns parsed options into size, model, LoRAs and windows."""

from argparse import Namespace
from pathlib import Path

from ..cogvideox.checkpoint import bundled
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..errors import RequestError
from ..model import Lora, Model, Windows, two_thirds


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
    fast["attention"] = args.attention
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
        if args.overlap is not None or args.window_schedule or args.no_noise_shuffle:
            raise RequestError("--overlap, --window-schedule and --no-noise-shuffle need context windows; give --window too")
        return None
    overlap = two_thirds(args.window) if args.overlap is None else args.overlap
    schedule = args.window_schedule or Windows.schedule
    return Windows(args.window, overlap, schedule, shuffle_noise=not args.no_noise_shuffle)
