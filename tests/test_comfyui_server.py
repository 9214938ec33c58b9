"""A ComfyUI that is broken is one failure of one line."""

import os
import subprocess
import sys

import pytest

from .conftest import Broken, made
from .support import comfyui_server
from .support.comfyui_server import MARKER, ComfyUIServer


def test_a_comfyui_that_does_not_start_is_named_in_one_line_with_what_it_said_last(tmp_path, monkeypatch, caplog):
    (tmp_path / "main.py").write_text("import no_such_module")
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(RuntimeError) as error:
        ComfyUIServer(tmp_path / "base", comfyui=tmp_path).__enter__()
    last = "ModuleNotFoundError: No module named 'no_such_module'"
    assert str(error.value) == f"the ComfyUI at {tmp_path} ended with status 1 while starting: {last}"
    assert "Traceback" in caplog.text


def test_what_is_broken_fails_the_first_test_that_needs_it_and_the_others_are_skipped():
    broken = Broken(["it does not start"])
    with pytest.raises(pytest.fail.Exception, match="it does not start"):
        made(broken)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception):
            made(broken)
    assert made("whole") == "whole"


NAMED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"caf\\xc3", 0, 0, 0)  # half a character, as in a long name that the kernel has cut off
print("named", flush=True)
sys.stdin.read()
"""


def test_a_process_whose_name_is_no_text_is_found(tmp_path):
    server = ComfyUIServer(tmp_path, comfyui=tmp_path)
    environment = {**os.environ, MARKER: server.marker}
    command = [sys.executable, "-c", NAMED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        child.stdout.readline()
        assert server.processes() == [child.pid]


def test_a_process_that_ends_before_it_is_killed_is_no_failure(tmp_path, monkeypatch):
    server = ComfyUIServer(tmp_path, comfyui=tmp_path)
    server.log_path.touch()
    server.process = subprocess.Popen(["true"])
    server.process.wait()
    found = iter([[server.process.pid], []])

    def kill(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(server, "wait_for_processes", lambda *_: next(found))
    monkeypatch.setattr(comfyui_server.os, "kill", kill)
    server.stop(check=False)
