"""Every command of the README is one that exists. ``make readme`` runs all of them in an empty environment."""

import importlib.util
import re
from pathlib import Path

import pytest

from parallel_backend.cli.parser import build_parser
from parallel_backend.cogvideox.checkpoint import bundled
from workflows.headless import find

from .conftest import REPO
from .support import readme
from .support.hub_server import serving

COMMANDS = [command for block in readme.blocks() for command in block] + readme.inline()
QUICK = ("download", "plan", "status", "stop")
"""Commands of the command line that take no time here."""


def ours(words: list[str]) -> list[str] | None:
    """Returns the arguments of a command of the command line; None for another command."""
    return words[3:] if words[:3] == ["python", "-m", "parallel_backend"] else None


def is_understood(words: list[str]) -> bool:
    """Whether a command, its options and the files of the repository that it names exist."""
    arguments = ours(words)
    if arguments is not None:
        build_parser().parse_args(arguments)
        return True
    match words:
        case ["cd", folder]:
            return folder == "ComfyUI/custom_nodes"
        case ["git", "clone", address]:
            return f'Repository = "{address}"' in (REPO / "pyproject.toml").read_text("utf-8")
        case ["pip", "install", "."]:
            return (REPO / "pyproject.toml").is_file()
        case ["pip", "install", "-r", path]:
            return (REPO / path.removeprefix("ComfyUI-CogVideoX-xDiT/")).is_file()
        case ["make", target]:
            return target in re.search(r"^\.PHONY: (.+)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)[1].split()
        case ["python", "-m", module, *rest]:
            return importlib.util.find_spec(module) is not None and all((REPO / word).exists() for word in rest if "/" in word)
        case [".venv/bin/python", "workflows/headless.py", workflow, "--set", _, "--set", _]:
            return find(workflow).is_file()
    return False


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists(command):
    try:
        assert is_understood(readme.words_of(command)), "nobody knows this command"
    except SystemExit as ended:  # of --help, or of an option that does not exist
        assert not ended.code, f"the command line does not understand: {command}"


def test_the_readme_has_the_commands_of_a_user():
    assert len(readme.blocks()) >= 4 and len(COMMANDS) > 15
    kinds = {words[0] for words in map(readme.words_of, COMMANDS)}
    assert {"cd", "git", "pip", "python", "make"} <= kinds
    assert {arguments[0] for words in map(readme.words_of, COMMANDS) if (arguments := ours(words))} >= {"generate", *QUICK[:2]}


def test_quick_commands_of_the_readme_run(run, checkpoints, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundled, "PACK", tmp_path / "ComfyUI" / "custom_nodes" / "pack")
    monkeypatch.setattr(bundled.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Path("ComfyUI/models").mkdir(parents=True)
    with serving(checkpoints["5b"]) as (_, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        for command in COMMANDS:
            arguments = ours(readme.possible_here(command))
            if arguments and arguments[0] in QUICK:
                done = run(*arguments)
                assert done.returncode == 0, f"{command}: {done.stderr}"
    assert bundled.find("5b") == tmp_path / "ComfyUI" / "models" / "CogVideo" / "CogVideoX-5b"
