"""What is installed by pip, what the registry gets, and the address that is written in both."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPO

ADDRESS = re.compile(r"github(?:usercontent)?\.com/([\w.-]+)/ComfyUI-CogVideoX-xDiT")
DEVELOPERS = ("tests", "benchmarks", "training", ".ci", ".github", "Makefile")


def tracked(*more: str) -> list[str]:
    """Files that git knows, or those of them that ``more`` selects."""
    if not (REPO / ".git").exists():
        pytest.skip("this is not a git clone")
    return subprocess.run(["git", "ls-files", *more], cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The files that ``comfy node pack`` takes: those of git, without those of .comfyignore."""
    folder = tmp_path_factory.mktemp("archive")
    for name in set(tracked()) - set(tracked("--cached", "--ignored", "--exclude-from=.comfyignore")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, folder / name)
    return folder


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(arguments, cwd="/", env={**kept, **environment}, capture_output=True, text=True, timeout=600)


def test_the_owner_stands_in_pyproject_and_both_readmes_alone_and_is_the_same():
    owners = {}
    for name in tracked():
        if (REPO / name).suffix in (".md", ".toml", ".py", ".yml", ".json"):
            found = ADDRESS.findall((REPO / name).read_text(encoding="utf-8"))
            owners |= {name: set(found)} if found else {}
    assert set(owners) == {"pyproject.toml", "README.md", "README.zh-CN.md"}
    assert len(set.union(*owners.values())) == 1, owners


def test_the_archive_has_what_users_need_and_nothing_of_developers(archive):
    found = {path.name for path in archive.iterdir()}
    assert {"__init__.py", "nodes", "parallel_backend", "web", "workflows", "locales", "pyproject.toml", "README.md"} <= found
    assert not found & set(DEVELOPERS)
    assert not [path for path in archive.rglob("*") if path.suffix == ".webp"]


def test_the_archive_is_enough_for_every_command(archive):
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); "
        "import parallel_backend.cli.bench_table, parallel_backend.cli.bench_xdit, parallel_backend.cli.parser as parser; "
        "assert parser.__file__.startswith(sys.path[0]); parser.main(['plan', '--model', 'demo', '--gpus', '2'])"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0 and "2 GPUs" in done.stdout, done.stderr


def test_pip_installs_the_command_line_and_no_other_top_level_module(archive, tmp_path):
    pytest.importorskip("setuptools")
    pip = [sys.executable, "-m", "pip"]
    if run([*pip, "--version"]).returncode:
        pytest.skip("there is no pip here")
    site = tmp_path / "site"
    done = run([*pip, "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(archive)])
    assert done.returncode == 0, done.stderr
    kinds = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert kinds == {"parallel_backend", "bin"}
    assert (site / "parallel_backend" / "checkpoints" / "demo" / "transformer" / "config.json").is_file()
    script = site / "bin" / "cogvideox-xdit"
    shown = run([sys.executable, str(script), "plan", "--model", "demo", "--gpus", "2"], PYTHONPATH=str(site))
    assert shown.returncode == 0 and shown.stdout.startswith("demo: CogVideoX 1.0"), shown.stderr
    wrong = run([sys.executable, str(script), "generate", "--modle", "5b"], PYTHONPATH=str(site))
    assert wrong.stderr.startswith("cogvideox-xdit generate: there is no option --modle")
