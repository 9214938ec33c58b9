"""Makes the files beside the shipped workflows: `python workflows/make.py` after a change of one.

- the app versions of some workflows, which open in ComfyUI's App mode,
- the images that some workflows start from, in `workflows/input`,
- a thumbnail for each file, which ComfyUI's template browser shows: NAME.jpg for NAME.json. The demo models make the videos.
"""

import copy
import json
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import imageio.v3 as iio
from PIL import Image, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workflows import headless  # noqa: E402

FOLDER = headless.REPO / "workflows"
INPUT = FOLDER / "input"
APPS = ("t2v", "i2v")
"""The workflows that have an app version. They list what it shows in ``extra.linearData``."""
SIZE = (96, 64)
SQUARE, SIDE, COLOUR, BACKGROUND = (10, 19), 26, (225, 40, 40), (16, 16, 20)
"""Where the square of the start image is, how large, and which colours ``demo-i2v`` knows it in."""
THUMBNAIL = 384
PROMPTS = {
    "lora": ("a purple star grows on a white background", "LoRA"),
    "four-steps": ("a green triangle moves up on a black background", "4 steps"),
    "core-nodes": ("a yellow circle moves left on a grey background", "core nodes"),
}
"""Workflows of text that need other models: what the demo draws for them, and the word on it."""


def app_path(name: str) -> Path:
    """Returns the file of a workflow's app version. ComfyUI knows it by the end of its name."""
    return FOLDER / f"{headless.FILES[name]}.app.json"


def app_of(workflow: dict) -> dict:
    """Returns the app version of a workflow: it differs in its id and in the mode that it opens in."""
    made = copy.deepcopy(workflow)
    made["id"] = str(uuid.uuid5(uuid.UUID(workflow["id"]), "app"))
    made["extra"]["linearMode"] = True
    return made


def write_apps() -> None:
    for name in APPS:
        workflow = json.loads(headless.find(name).read_text(encoding="utf-8"))
        app_path(name).write_text(json.dumps(app_of(workflow), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def square_at(left: int) -> Image.Image:
    """Returns an image of the square."""
    image = Image.new("RGB", SIZE, BACKGROUND)
    top = SQUARE[1]
    ImageDraw.Draw(image).rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=COLOUR)
    return image


def write_images() -> None:
    """Writes a start image, an end image, and a mask: what is transparent is to be replaced."""
    square_at(SQUARE[0]).save(INPUT / "cogvideox-start.png")
    square_at(SIZE[0] - SQUARE[0] - SIDE).save(INPUT / "cogvideox-end.png")
    mask = Image.new("RGBA", SIZE, (128, 128, 128, 255))
    ImageDraw.Draw(mask).rectangle((SIZE[0] // 2, 8, SIZE[0] - 9, SIZE[1] - 9), fill=(128, 128, 128, 0))
    mask.save(INPUT / "cogvideox-mask.png")


def frames_of(path: Path) -> list[Image.Image]:
    """Returns the first, the middle and the last frame of a video."""
    frames = iio.imread(path, plugin="pyav")
    return [Image.fromarray(frames[place]) for place in (0, len(frames) // 2, -1)]


def run(name: str, folder: str, *settings: str) -> list[Image.Image]:
    """Returns frames of the video that a workflow makes."""
    (path,) = headless.run(headless.find(name), f"{folder}/output", input_dir=str(INPUT), settings=settings)
    return frames_of(path)


def thumbnail(*rows: list[Image.Image], caption: str = "") -> Image.Image:
    """Returns a square with rows of images, and a word in its corner."""
    image, gap = Image.new("RGB", (THUMBNAIL, THUMBNAIL), BACKGROUND), 4
    widths = [(THUMBNAIL - gap * (len(row) - 1)) // len(row) for row in rows]
    heights = [width * row[0].height // row[0].width for width, row in zip(widths, rows)]
    top = (THUMBNAIL - sum(heights) - gap * (len(rows) - 1)) // 2
    for row, width, height in zip(rows, widths, heights):
        for place, part in enumerate(row):
            image.paste(part.resize((width, height), Image.Resampling.LANCZOS), (place * (width + gap), top))
        top += height + gap
    return label(image, caption) if caption else image


def label(image: Image.Image, text: str) -> Image.Image:
    """Writes a word into the upper right corner of an image, and returns it. The browser has words of its own in the left one."""
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    width, height = draw.textbbox((0, 0), text, font)[2:]
    left = image.width - width - 16
    draw.rectangle((left - 8, 8, image.width - 8, height + 22), fill="black")
    draw.text((left, 14), text, "white", font)
    return image


def outlines(image: Image.Image) -> Image.Image:
    """Returns the edges of an image, as a control video has them."""
    return image.filter(ImageFilter.FIND_EDGES).convert("L").convert("RGB")


def silhouette(image: Image.Image) -> Image.Image:
    """Returns the red things of an image in white on black, as a mask of them."""
    return image.getchannel("R").point(lambda value: 255 * (value > 127)).convert("RGB")


def coarse(image: Image.Image) -> Image.Image:
    """Returns an image with a quarter of its rows and columns, at the same size."""
    small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns an image with white where a mask is transparent."""
    white = Image.new("RGB", image.size, "white")
    return Image.composite(image, white, mask.getchannel("A").resize(image.size))


def thumbnails(folder: str) -> dict[str, Image.Image]:
    """Returns each workflow's thumbnail. One whose model is not part of the pack shows what goes in, or a video of the demo."""
    start, end, mask = (Image.open(INPUT / f"cogvideox-{part}.png") for part in ("start", "end", "mask"))
    example = frames_of(INPUT / "example.mp4")
    text, moved, changed, long = (run(name, folder) for name in ("t2v", "i2v", "v2v", "long-video"))
    made = {
        "t2v": thumbnail(text[1:2], text),
        "i2v": thumbnail([start], moved),
        "v2v": thumbnail(example[1:2], changed),
        "long-video": thumbnail(long[:1], long[1:]),
        "first-last-frame": thumbnail([start], [end]),
        "inpaint": thumbnail(*([masked(frame, mask)] for frame in example[:2])),
        "control": thumbnail(*([outlines(frame)] for frame in example[:2])),
        "controlnet": thumbnail(*([outlines(frame)] for frame in example[1:]), caption="ControlNet"),
        "remove-object": thumbnail(example[1:2], [silhouette(example[1])]),
        "upscale": thumbnail([coarse(example[1])], example[1:2], caption="x4"),
        "remove-object-twice": thumbnail(example[1:2], [silhouette(example[1])], caption="2 passes"),
    }
    for name, (prompt, caption) in PROMPTS.items():
        frames = run("t2v", folder, f"Prompt.text={prompt}")
        made[name] = thumbnail(frames[1:2], frames, caption=caption)
    return made


def write_thumbnails() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, image in thumbnails(folder).items():
            image.save(headless.find(name).with_suffix(".jpg"), quality=85, optimize=True)
    for name in APPS:
        shutil.copyfile(headless.find(name).with_suffix(".jpg"), app_path(name).with_suffix(".jpg"))


if __name__ == "__main__":
    write_apps()
    write_images()
    write_thumbnails()
