"""Where compiled kernels are kept on machines whose home cannot be written to."""

import os
from pathlib import Path

import pytest

from parallel_backend import folders


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A machine with these folders for the user's cache and for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    folders.writable_cache.cache_clear()
    yield folders.writable_cache
    folders.writable_cache.cache_clear()


def test_the_user_s_own_cache_is_preferred(cache, tmp_path, caplog):
    assert cache() == tmp_path / "home" / folders.NAME and cache().is_dir()
    assert not caplog.text


@pytest.mark.parametrize("home", ["a file", "relative/place"])
def test_without_a_home_kernels_are_kept_among_temporary_files(home, cache, tmp_path, monkeypatch, caplog):
    if home == "a file":
        (tmp_path / "home").touch()
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert cache() == folders.temporary_cache() and cache().parent == tmp_path
    assert ("cannot be used: Not a directory" in caplog.text) == (home == "a file")
    assert cache().stat().st_mode & 0o777 == 0o700


def test_kernels_of_another_user_are_not_run(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "home").touch()
    owner = os.getuid() + 1
    monkeypatch.setattr(folders.os, "getuid", lambda: owner)
    assert cache() == Path(tmp_path, "home", folders.NAME)  # where they cannot be kept either
    assert "compiled kernels cannot be kept" in caplog.text and "belongs to another user" in caplog.text
