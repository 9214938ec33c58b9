"""CPU cores and memory that this process may use: of a container, not of the machine around it."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """CPU cores that this process may use: the smallest of affinity and cgroup quotas, rounded up, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have neither this nor cgroups
        return os.cpu_count() or 1
    return max(1, min([cores, *(-(-quota // period) for quota, period in quotas())]))


def usable_memory() -> int:
    """Bytes of main memory that this process can still get: what the machine has available, or less where a cgroup allows less."""
    return max(0, min([psutil.virtual_memory().available, *(allowed - used for allowed, used in memory_limits())]))


def quotas() -> Iterator[tuple[int, int]]:
    """Microseconds of CPU time in each period, of every cgroup that sets a limit."""
    for folder in folders("cpu"):
        words = read(folder / "cpu.max").split() or [read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if all(word.isdecimal() and int(word) for word in words):  # no limit is "max", or -1 in version 1
            yield int(words[0]), int(words[1])


def memory_limits() -> Iterator[tuple[int, int]]:
    """Bytes allowed and bytes used, of every cgroup that sets a limit. Cached files, which the kernel gives up, are not used."""
    for folder in folders("memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed, used = read(folder / limit), read(folder / usage)
            if allowed.isdecimal() and used.isdecimal():
                counted = dict(line.split() for line in read(folder / "memory.stat").splitlines())
                yield int(allowed), int(used) - int(counted.get(cached, 0))


def folders(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those that it is in, for version 2 and for one controller of version 1.

    A container sees its own cgroup at the root, though its path may be that of the machine around it, so the root is always there.
    """
    for line in read(PROC / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        inside = root / path.strip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder == root or root in folder.parents)


def read(path: Path) -> str:
    """A file's text, empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
