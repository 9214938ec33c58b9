"""What every fast mode does to the video: the same prompts and seeds in each mode, beside lossless, as a table and as stills.

``python -m benchmarks.quality`` measures the demo model, and whether its clips still show what the prompts say.
``python -m benchmarks.quality --model PATH`` measures any text-to-video checkpoint, with prompts of a real model or those of a file.
The table has PSNR and SSIM against lossless, the latter by torchmetrics (``pip install torchmetrics``): no weights are downloaded.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw

from parallel_backend.cli.bench_options import chosen_precisions, in_precision
from parallel_backend.cli.console import Table, quiet_libraries, show
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.devices import Devices
from parallel_backend.errors import RequestError
from parallel_backend.executor.base import Executor
from parallel_backend.executor.factory import open_executor
from parallel_backend.jobs import SampleJob
from parallel_backend.model import Model
from parallel_backend.plan import Plan
from tests.support.measures import judge
from training.scenes import Scene
from training.vae import psnr

from .obedience import cases, generate

LOSSLESS = "lossless"
MODES = "lossless+cache0.1,lossless+cache0.2,lossless+guidance4,fp8,int8,int8+cache0.1"
"""Those that every device can compute. On a Hopper GPU add ``fp8-all``, on two devices the plan ``pipefusion2``."""
PROMPTS = (
    "A golden retriever runs along a beach at sunset, waves behind it, the camera follows from the side.",
    "A woman in a red coat walks through a snowy street at night, shop windows glow, snow falls slowly.",
    "Close-up of coffee poured into a white cup on a wooden table, steam rises in morning light.",
    "A steam train crosses a stone viaduct in a green valley, seen from a drone that flies beside it.",
    "A potter's hands shape a bowl of wet clay on a turning wheel, shallow depth of field.",
    "Time-lapse of clouds over a city skyline from day to night, lights come on in the windows.",
)
"""For a real model: people, animals, liquids, text-like detail, slow and fast motion."""
COUNT = len(PROMPTS)
WIDTH, LABEL, GAP = 192, 18, 4
"""Of a still, of the line above a column, and between stills, in pixels."""


@dataclass(frozen=True)
class Case:
    """A prompt with its seed."""

    prompt: str
    seed: int
    scene: Scene | None = None
    """What the clip should show, if it is one of the demo's."""


@dataclass(frozen=True)
class Row:
    """What a mode did to the clips, in the mean and at worst."""

    mode: str
    plan: str
    psnr: float | None
    """dB between a mode's clip and lossless; None for lossless itself."""
    least_psnr: float | None
    ssim: float | None
    least_ssim: float | None
    right: str | None
    """Properties that are as the prompts say, of all: background, colour, shape and motion of each clip. None for a real model."""
    seconds: float
    """Of a clip, text and decode included."""


def chosen_cases(checkpoint: Checkpoint, prompts: Path | None, count: int) -> list[Case]:
    """Returns the prompts: of a file, of the demo's held-out scenes, or for a real model."""
    if prompts:
        lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
        return [Case(line, seed) for seed, line in enumerate(lines[:count])]
    if checkpoint.path == bundled.find(bundled.DEMO):
        return [Case(prompt, seed, scene) for seed, (scene, prompt) in enumerate(cases(count))]
    return [Case(prompt, seed) for seed, prompt in enumerate(PROMPTS[:count])]


def make(executor: Executor, checkpoint: Checkpoint, encoder: TextEncoder, model: Model, chosen: list[Case], steps: int):
    """Returns the clips ``[frames, height, width, 3]`` of all cases in one mode, and the seconds of one."""
    started = time.perf_counter()
    clips = [
        generate(executor, checkpoint, encoder, case.prompt, model=model, seed=case.seed, steps=steps).float()
        for case in chosen
    ]
    return clips, (time.perf_counter() - started) / len(chosen)


def ssim(clip: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity of two clips ``[frames, height, width, 3]`` in 0..1, in the mean over frames: 1 if they are equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    frames, others = (each.movedim(-1, 1) for each in (clip, other))
    return structural_similarity_index_measure(frames, others, data_range=1.0).item()


def row_of(
    mode: str, plan: str, clips: list[torch.Tensor], lossless: list[torch.Tensor], chosen: list[Case], seconds: float
) -> Row:
    """Measures the clips of a mode."""
    decibels = likeness = None
    if clips is not lossless:
        decibels = [psnr(clip[None], exact[None]).item() for clip, exact in zip(clips, lossless)]
        likeness = [ssim(clip, exact) for clip, exact in zip(clips, lossless)]
    verdicts = [asdict(judge(clip, case.scene)).values() for clip, case in zip(clips, chosen) if case.scene]
    right = f"{sum(map(sum, verdicts))} of {sum(map(len, verdicts))}" if verdicts else None
    worst = (decibels and mean(decibels), decibels and min(decibels), likeness and mean(likeness), likeness and min(likeness))
    return Row(mode, plan, *worst, right, seconds)


def stills(columns: dict[str, Sequence[torch.Tensor]]) -> Image.Image:
    """Draws the middle frame of every clip: a column for each mode, a row for each prompt."""
    clips = next(iter(columns.values()))
    height = WIDTH * clips[0].shape[1] // clips[0].shape[2]
    page = Image.new("RGB", (len(columns) * (WIDTH + GAP) - GAP, LABEL + len(clips) * (height + GAP) - GAP), (24, 24, 28))
    pen = ImageDraw.Draw(page)
    for column, (title, made) in enumerate(columns.items()):
        x = column * (WIDTH + GAP)
        pen.text((x + 4, 3), title, fill=(220, 220, 220))
        for place, clip in enumerate(made):
            picture = Image.fromarray((clip[len(clip) // 2] * 255).round().byte().numpy())
            page.paste(picture.resize((WIDTH, height), Image.Resampling.BICUBIC), (x, LABEL + place * (height + GAP)))
    return page


def measure(args: argparse.Namespace) -> tuple[list[Row], Image.Image]:
    """Makes all clips. Prints a row as soon as it is there, and what a mode that cannot run here says."""
    checkpoint = Checkpoint.open(bundled.find(args.model))
    devices = Devices.parse(args.devices)
    encoder = TextEncoder(checkpoint, device=devices.first, dtype=checkpoint.dtype("auto", devices.first))
    chosen, model = chosen_cases(checkpoint, args.prompts, args.count), Model(str(checkpoint.path))
    steps = args.steps or SampleJob.steps
    show(f"{checkpoint.describe}; {len(chosen)} prompts, {steps} steps")
    words = [LOSSLESS, *(word for word in chosen_precisions(args.modes) if word != LOSSLESS)]
    table = Table(
        {"mode": max(map(len, words)), "plan": 11, "dB": 5, "least": 5, "SSIM": 6, "least ": 6, "as asked": 8, "s": 6}
    )
    table.show_titles()
    rows, columns, lossless = [], {}, None
    for plan in map(Plan.parse, args.plans.split(",")):
        executor = open_executor(plan, devices.first_of(plan.world_size))
        try:
            for word in words:
                try:
                    clips, seconds = make(executor, checkpoint, encoder, in_precision(model, word), chosen, steps)
                except RequestError as error:
                    show(f"{word}, {plan}: {error}")
                    continue
                lossless = lossless or clips
                rows.append(row_of(word, str(plan), clips, lossless, chosen, seconds))
                table.show(asdict(rows[-1]).values())
                columns[word if plan == Plan() else f"{word} {plan}"] = clips
        finally:
            executor.close()
    return rows, stills(columns)


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled.DEMO, help="a name or path, as for generate (default: the demo)")
    parser.add_argument("--modes", default=MODES, help=f"as bench's --precisions, beside lossless (default: {MODES})")
    parser.add_argument("--plans", default="single", help="the first makes the clips that all others are compared with")
    parser.add_argument("--devices", default="auto", help="as for generate")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt a line")
    parser.add_argument("--count", type=int, default=COUNT, help=f"prompts, from the first (default: {COUNT})")
    parser.add_argument("--steps", type=int, help=f"(default: {SampleJob.steps})")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--sheet", type=Path, help="a picture file for the stills, such as quality.webp")
    args = parser.parse_args()
    if importlib.util.find_spec("torchmetrics") is None:
        parser.error("SSIM needs torchmetrics: pip install torchmetrics")
    quiet_libraries()
    rows, sheet = measure(args)
    if args.output:
        args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.sheet:
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
