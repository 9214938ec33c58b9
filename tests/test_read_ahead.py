"""While a group starts, the system reads the weights that its ranks are going to need into the page cache."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor import base
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.plan import Plan
from parallel_backend.system import read_ahead

from .conftest import wait_until

PAGES = 2000
pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot read ahead")


def resident_pages(path: Path) -> int:
    """Returns how many pages of a file are in the page cache."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view,
    ):
        count = -(-len(view) // mmap.PAGESIZE)
        there = (ctypes.c_ubyte * count)()
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(view)), there)
        del start  # else the mapping cannot be closed
    assert not failed
    return sum(page & 1 for page in there)


@pytest.fixture
def file(tmp_path) -> Path:
    """A file that is on disk alone."""
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as written:
        written.write(os.urandom(PAGES * mmap.PAGESIZE))
        written.flush()
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path) > PAGES // 10:
        pytest.skip("this file system keeps its files in memory")
    return path


def test_a_file_is_read_into_the_page_cache(file):
    read_ahead.read_ahead([file])
    assert wait_until(lambda: resident_pages(file) > 0.9 * PAGES)


@pytest.mark.parametrize("usable, is_read", [(1.9, False), (2.1, True)])
def test_files_beyond_half_of_the_usable_memory_are_left_on_disk(usable, is_read, file, monkeypatch):
    monkeypatch.setattr(read_ahead, "usable_memory", lambda: int(usable * file.stat().st_size))
    assert (read_ahead.read_ahead([file]) is not None) == is_read


def test_a_missing_file_is_left_to_its_reader(tmp_path):
    assert read_ahead.read_ahead([tmp_path / "absent"]) is None


def test_a_group_that_starts_has_the_transformer_read_and_one_that_runs_does_not(checkpoints, monkeypatch):
    executor, read, runs = GroupExecutor(Plan(cfg=2), Devices("cpu", (0, 1))), [], []
    monkeypatch.setattr(base, "read_ahead", read.extend)
    monkeypatch.setattr(executor._launcher, "start", lambda: runs.append(True))
    monkeypatch.setattr(executor._launcher, "is_running", lambda: bool(runs))
    checkpoint = Checkpoint.open(checkpoints["5b"])
    executor.start(checkpoint)
    executor.start(checkpoint)
    assert read == checkpoint.files("transformer") and read
