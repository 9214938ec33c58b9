"""Do the demo models do what they are told? ``python -m benchmarks.obedience`` prints the table; with ``--model demo-i2v`` for
start images: how well the first frame keeps the image, and whether things move as they are told to from there.

Captions that training never saw, seeds and settings fixed in advance, judged by the measurements of tests/support/measures.py.
"""

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch

from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.executor.base import Executor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob, empty_latent
from parallel_backend.model import Model
from tests.support.measures import Verdict, judge
from training.drawing import draw
from training.scenes import Scene, caption, held_out_scenes
from training.vae import psnr

CAPTIONS, PAIRS = 60, 16
IMAGES, IMAGE_PAIRS = 40, 10


def cases(count: int = CAPTIONS) -> list[tuple[Scene, str]]:
    """The first ``count`` held-out scenes with their captions, in any of the wordings."""
    rng = random.Random(2027)
    return [(scene, caption(scene, rng)) for scene in held_out_scenes(CAPTIONS, pairs=PAIRS)][:count]


def image_cases(count: int = IMAGES) -> list[tuple[Scene, str]]:
    """The same for image to video: other scenes, whose first frame is the start image."""
    rng = random.Random(2028)
    scenes = held_out_scenes(IMAGES, pairs=IMAGE_PAIRS, seed=2029)
    return [(scene, caption(scene, rng)) for scene in scenes][:count]


def generate(
    executor: Executor,
    checkpoint: Checkpoint,
    encoder: TextEncoder,
    prompt: str,
    *,
    image: torch.Tensor | None = None,
    model: Model | None = None,
    **settings,
) -> torch.Tensor:
    """One clip ``[frames, height, width, 3]`` for a prompt, everything else as the sampler node has it.

    Args:
        image: the start image ``[1, height, width, 3]`` in 0..1, for a model that takes one.
        model: the checkpoint with options; None for none.
    """
    width, height, frames = checkpoint.default_size
    frames = settings.pop("frames", frames)
    model = model or Model(str(checkpoint.path))
    positive, negative = (encoder.encode([encoder.tokenize(text)]) for text in (prompt, settings.pop("negative_prompt", "")))
    if image is not None:
        settings["image"] = executor.encode(EncodeJob(model, image)).tensor
    job = SampleJob(model, positive, empty_latent(width=width, height=height, frames=frames), negative, **settings)
    return executor.decode(DecodeJob(model, executor.sample(job).tensor)).tensor[0]


def first_frame(scene: Scene) -> torch.Tensor:
    """The start image of a scene, ``[1, height, width, 3]`` in 0..1."""
    return draw([scene])[0, :1]


def round_trip(executor: Executor, checkpoint: Checkpoint, pixels: torch.Tensor) -> torch.Tensor:
    """A video ``[frames, height, width, 3]`` as the VAE gives it back."""
    model = Model(str(checkpoint.path))
    return executor.decode(DecodeJob(model, executor.encode(EncodeJob(model, pixels)).tensor)).tensor[0]


def kept(executor: Executor, checkpoint: Checkpoint, image: torch.Tensor, clip: torch.Tensor) -> float:
    """PSNR in dB of a clip's first frame against the VAE's own round trip of the start image."""
    return psnr(round_trip(executor, checkpoint, image), clip[:1]).item()


def show_round_trips(executor: Executor, checkpoint: Checkpoint, scenes: list[Scene]) -> None:
    """Prints what the VAE alone leaves of the scenes as drawn: the most that any transformer could do with it."""
    drawn = list(draw(scenes))
    again = [round_trip(executor, checkpoint, clip) for clip in drawn]
    decibels = psnr(torch.stack(drawn), torch.stack(again))
    print(f"the VAE's round trip of the same scenes, drawn: {decibels.mean():.1f} dB in the mean, least {decibels.min():.1f}")
    print(table([judge(clip, scene) for clip, scene in zip(again, scenes)]))


def table(verdicts: list[Verdict]) -> str:
    """Shares of right answers, a line each."""
    lines = []
    for name in ("colour", "shape", "motion", "background"):
        right = sum(getattr(verdict, name) for verdict in verdicts)
        lines.append(f"{name:<12}{right:>4} of {len(verdicts)}  {100 * right / len(verdicts):5.1f} %")
    return "\n".join(lines)


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled.DEMO)
    parser.add_argument("--count", type=int, default=CAPTIONS, help="of cases, from the first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=SampleJob.steps)
    parser.add_argument("--cfg", type=float, default=SampleJob.cfg)
    parser.add_argument("--scheduler", default=SampleJob.scheduler)
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; each next has the next")
    parser.add_argument("--output", type=Path, help="a JSON file for every verdict")
    args = parser.parse_args()
    device = torch.device(args.device)
    checkpoint = Checkpoint.open(bundled.find(args.model))
    encoder = TextEncoder(checkpoint, device=device, dtype=torch.float32)
    executor = LocalExecutor(device)
    settings = {"steps": args.steps, "cfg": args.cfg, "scheduler": args.scheduler}
    verdicts, records, decibels, started = [], [], [], time.perf_counter()
    chosen = (image_cases if checkpoint.takes_image else cases)(args.count)
    for index, (scene, prompt) in enumerate(chosen):
        image = first_frame(scene) if checkpoint.takes_image else None
        clip = generate(executor, checkpoint, encoder, prompt, image=image, seed=args.seed + index, **settings)
        verdicts.append(judge(clip, scene))
        wrong = [name for name, right in asdict(verdicts[-1]).items() if not right]
        records.append({"prompt": prompt, "scene": scene.name, "wrong": wrong})
        if checkpoint.takes_image:
            decibels.append(kept(executor, checkpoint, image, clip))
            records[-1]["first frame dB"] = round(decibels[-1], 1)
        if wrong:
            print(f"{prompt}: {', '.join(wrong)} wrong", flush=True)
    print(table(verdicts))
    if decibels:
        low = sum(value < 24 for value in decibels)
        print(f"first frame {sum(decibels) / len(decibels):.1f} dB in the mean, least {min(decibels):.1f}; {low} below 24")
    print(f"{len(verdicts)} clips, {json.dumps(settings)}, {(time.perf_counter() - started) / len(verdicts):.1f} s each")
    show_round_trips(executor, checkpoint, [scene for scene, _ in chosen])
    if args.output:
        args.output.write_text(json.dumps({"settings": settings, "cases": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
