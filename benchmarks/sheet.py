"""The README's moving sheet of what the demo model makes. ``python -m benchmarks.sheet --output docs/demo.webp``"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.executor.local import LocalExecutor

from .obedience import generate

PROMPTS = (
    "a blue ball moves left on a white background",
    "a yellow circle grows on a black background",
    "an orange ball bounces on a white background",
    "a purple triangle shrinks on a grey background",
    "a green square moves down on a pink background",
    "a red star goes right and then stops on white",
)
COLUMNS, SCALE, LABEL, GAP = 3, 3, 22, 6


def sheet(clips: list[torch.Tensor], frame: int) -> Image.Image:
    """One frame of every clip ``[frames, height, width, 3]``, with its prompt below."""
    height, width = clips[0].shape[1] * SCALE, clips[0].shape[2] * SCALE
    rows = -(-len(clips) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + LABEL)), (24, 24, 28))
    pen = ImageDraw.Draw(page)
    for index, clip in enumerate(clips):
        x, y = index % COLUMNS * (width + GAP), index // COLUMNS * (height + LABEL)
        picture = Image.fromarray((clip[frame] * 255).byte().numpy())
        page.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        pen.text((x + 4, y + height + 5), PROMPTS[index], fill=(220, 220, 220))
    return page


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/demo.webp"))
    args = parser.parse_args()
    device = torch.device("cpu")
    checkpoint = Checkpoint.open(bundled.find(bundled.DEMO))
    encoder, executor = TextEncoder(checkpoint, device=device, dtype=torch.float32), LocalExecutor(device)
    clips = [generate(executor, checkpoint, encoder, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    pages = [sheet(clips, frame) for frame in range(len(clips[0]))]
    pages[0].save(args.output, save_all=True, append_images=pages[1:], duration=125, loop=0, quality=80, method=6)


if __name__ == "__main__":
    main()
