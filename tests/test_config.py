"""Environment variables: a value that makes no sense is named and costs nothing else."""

import os
import subprocess
import sys

import pytest

from parallel_backend.config import Config
from parallel_backend.system import folders

from .conftest import REPO


@pytest.mark.parametrize("text, expected", [("2.5", 2.5), ("0", 0.0), ("", 30.0), ("10s", 30.0), ("nan", 30.0), ("-1", 30.0)])
def test_a_variable_is_a_number_or_named_and_its_default(text, expected, caplog):
    assert Config.read({"XDIT_IDLE_MINUTES": text, "XDIT_KEEP_SECONDS": "3"}) == Config(expected, keep_seconds=3.0)
    assert ("XDIT_IDLE_MINUTES is" in caplog.text) == (text in ("10s", "nan", "-1"))


def test_no_host_may_be_silent_for_no_time(caplog):
    assert Config.read({"XDIT_SILENT_SECONDS": "0"}) == Config() and "XDIT_SILENT_SECONDS is '0'" in caplog.text


def test_the_command_line_starts_with_variables_that_make_no_sense():
    wrong = {name: "10s" for name in ("XDIT_SILENT_SECONDS", "XDIT_IDLE_MINUTES", "XDIT_KEEP_SECONDS")}
    command = [sys.executable, "-m", "parallel_backend", "status"]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, **wrong}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "XDIT_SILENT_SECONDS is '10s'; give a number such as 10" in done.stderr


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """The temporary folder's cache, and no memory of one that was found before."""
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    folders.writable_cache.cache_clear()
    yield
    folders.writable_cache.cache_clear()


@pytest.mark.parametrize("cause", ["XDG_CACHE_HOME", "HOME"])
def test_kernels_are_kept_elsewhere_where_the_cache_folder_cannot_be_made(cause, caches, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(cause, "/dev/null/none")
    found = folders.writable_cache()
    assert found == folders.temporary_cache() and found.is_dir()
    assert f"compiled kernels are kept in {found}, as /dev/null/none" in caplog.text


def test_kernels_of_another_user_are_not_run(caches, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    made, owner = folders.temporary_cache(), os.getuid() + 1
    made.mkdir(parents=True)
    monkeypatch.setattr(folders, "temporary_cache", lambda: made)
    monkeypatch.setattr(folders.os, "getuid", lambda: owner)
    assert folders.writable_cache() == folders.preferred_cache()  # where they cannot be kept either
    assert "compiled kernels cannot be kept" in caplog.text and "belongs to another user" in caplog.text


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(folders.os.path, "expanduser", lambda path: path)  # as Python answers for an unknown user
    assert folders.preferred_cache() == folders.temporary_cache()
