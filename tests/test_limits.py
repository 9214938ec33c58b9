"""Cores and memory are those of the container, whatever the machine around it has."""

import os
from types import SimpleNamespace

import pytest
import torch

from parallel_backend.cli import parser
from parallel_backend.devices import Devices
from parallel_backend.system import limits

GIB = 2**30
UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A machine of 8 cores and 32 GiB, and the cgroup files that a process finds on it: ``container("0::/a", {"a/cpu.max": …})``."""

    def make(cgroup: str, files: dict[str, str], cores: int = 8) -> None:
        for name, text in {"proc/cgroup": cgroup, **{f"cgroup/{name}": text for name, text in files.items()}}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
        monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(available=32 * GIB))

    return make


VERSION_1 = "4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n0::/"
USED = {"memory.current": f"{3 * GIB}", "memory.stat": f"anon 5\ninactive_file {GIB}"}
USED_1 = {"memory.usage_in_bytes": f"{3 * GIB}", "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}"}


@pytest.mark.parametrize(
    "cgroup, files, affinity, cores, gib",
    [
        ("0::/", {}, 8, 8, 32),
        ("0::/", {}, 3, 3, 32),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/b/memory.max": "max", **USED}, 8, 8, 32),
        ("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 8, 3, 32),
        ("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 2, 2, 32),
        ("0::/a/b", {"a/b/cpu.max": "600000 100000", "a/cpu.max": "50000 100000"}, 8, 1, 32),
        ("0::/of/the/host", {"cpu.max": "200000 100000", "memory.max": f"{8 * GIB}", **USED}, 8, 2, 6),
        ("0::/../../other", {"cpu.max": "200000 100000"}, 8, 2, 32),
        ("0::/", {"memory.max": f"{1 * GIB}", **USED}, 8, 8, 0),
        (VERSION_1, {"cpu/docker/x/cpu.cfs_quota_us": "-1", "cpu/docker/x/cpu.cfs_period_us": "100000"}, 8, 8, 32),
        (VERSION_1, {"cpu/docker/x/cpu.cfs_quota_us": "400000", "cpu/docker/x/cpu.cfs_period_us": "100000"}, 8, 4, 32),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 8, 4, 32),
        (
            VERSION_1,
            {"memory/memory.limit_in_bytes": f"{UNLIMITED}", **{f"memory/{name}": text for name, text in USED_1.items()}},
            8, 8, 32,
        ),
        (
            VERSION_1,
            {"memory/memory.limit_in_bytes": f"{8 * GIB}", **{f"memory/{name}": text for name, text in USED_1.items()}},
            8, 8, 6,
        ),
    ],
)  # fmt: skip
def test_the_smallest_of_affinity_and_cgroup_limits_counts(cgroup, files, affinity, cores, gib, container):
    container(cgroup, files, affinity)
    assert (limits.usable_cores(), limits.usable_memory()) == (cores, gib * GIB)


def test_a_system_without_affinity_and_cgroups_has_all_of_its_cores(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert limits.usable_cores() == 6


def test_groups_and_the_command_line_use_the_threads_that_the_container_has(container, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    container("0::/", {"cpu.max": "400000 100000"})
    assert Devices("cpu", (0, 1)).environment()["OMP_NUM_THREADS"] == "2"
    assert Devices("cuda", (0, 1)).environment()["OMP_NUM_THREADS"] == "2"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        assert parser.main(["status"]) == 0
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
