"""CPU cores and memory that this process may use, within the limits of its container."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Returns the number of usable CPU cores: the least of affinity and cgroup quotas, rounded up, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have neither this nor cgroups
        return os.cpu_count() or 1
    return max(1, min([cores, *(-(-quota // period) for quota, period in quotas())]))


def usable_memory() -> int:
    """Returns the bytes of main memory that this process can still allocate: the least of the machine's and its cgroups'."""
    return max(0, min([psutil.virtual_memory().available, *(allowed - used for allowed, used in memory_limits())]))


def whole_memory() -> int:
    """Returns the bytes of main memory that this process could allocate if nothing else did."""
    return min([psutil.virtual_memory().total, *(allowed for allowed, _ in memory_limits())])


def quotas() -> Iterator[tuple[int, int]]:
    """Yields CPU time and period, in microseconds, of each cgroup that sets a limit."""
    for folder in folders("cpu"):
        words = read(folder / "cpu.max").split() or [read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if all(word.isdecimal() and int(word) for word in words):  # no limit is "max", or -1 in version 1
            yield int(words[0]), int(words[1])


def memory_limits() -> Iterator[tuple[int, int]]:
    """Yields bytes allowed and used of each cgroup that sets a limit. Cached files do not count: the kernel can drop them."""
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
    """Yields the folders of this process's cgroup and its ancestors, for version 2 and for one controller of version 1.

    The root is always included: a container sees its own cgroup there, even if its path is one of the host.
    """
    for line in read(PROC / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        inside = root / path.strip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder == root or root in folder.parents)


def read(path: Path) -> str:
    """Returns a file's text, or an empty string if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
