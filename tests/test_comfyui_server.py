"""A ComfyUI that is broken is one failure of one line."""

import sys

import pytest

from .conftest import Broken, made
from .support.comfyui_server import ComfyUIServer


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
