"""The devices that a plan runs on."""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from .errors import RequestError
from .plan import MOST_RANKS
from .system.limits import usable_cores

RANKS = "XDIT_RANKS"
"""Environment variable of a group's processes: the GPU index of each rank on this machine, separated by commas."""
RAY = "ray"
"""The user's word for the devices of a Ray cluster."""
BF16_CAPABILITY = (8, 0)
"""Lowest compute capability with bf16 and cuDNN attention (Ampere)."""
MOST_THREADS = 8
"""CPU threads of a process that works on a GPU; its CPU mostly copies memory."""


def visible_index(local_rank: int) -> int:
    """Returns the index of a rank's GPU among the GPUs that are visible to the group's processes."""
    return int(os.environ[RANKS].split(",")[local_rank])


def has_bf16(device: torch.device) -> bool:
    """Returns whether a device computes in bf16.

    In a group's process the answer covers all of its GPUs on this machine, as ranks must agree. Without CUDA, as in plans for
    another machine, it is True.
    """
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    group = range(torch.cuda.device_count()) if RANKS in os.environ else [device]
    return min(map(torch.cuda.get_device_capability, group)) >= BF16_CAPABILITY


def several_ranks_a_gpu() -> bool:
    """Returns whether a GPU may be named twice, to hold two ranks.

    This is for trying groups on one GPU. It is slower than one rank, and each rank counts all of the free memory as its own.

    Source:
        NCCL 2.30 and newer allow it if this variable is set; the ranks run in time slices.
    """
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


@dataclass(frozen=True)
class Devices:
    """GPUs by index, or a number of processes on the CPU.

    Raises:
        RequestError: from :meth:`parse`, for devices that this machine does not have.
    """

    kind: str
    """``cuda`` or ``cpu``."""
    indices: tuple[int, ...] = (0,)
    """GPU indices as this process sees them; on the CPU 0, 1, …"""
    others: int = 0
    """Processes of other groups that run at the same time and share the CPU cores."""
    on_ray: bool = False
    """Whether they are devices of a Ray cluster, which ``indices`` only count."""

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """Parses ``auto``, ``cpu``, ``cpu:2`` (two processes), ``0,1``, ``cuda:0,1``, ``ray`` or ``ray:8``."""
        text = text.strip()
        gpus = torch.cuda.device_count()
        if text == "auto":
            return cls("cuda", tuple(range(gpus))) if gpus else cls("cpu")
        if match := re.fullmatch(r"(cpu|ray)(?::(\d{1,9}))?", text):
            kind, count = match[1], match[2] and int(match[2])
            if count == 0:
                raise RequestError(f"devices '{text}' are no devices; use {kind}:1 or more")
            if count and count > MOST_RANKS:
                raise RequestError(f"devices '{text}' are more than {MOST_RANKS}; use fewer")
            return cls("cpu", tuple(range(count or 1))) if kind == "cpu" else cls._on_ray(count)
        if not re.fullmatch(r"(cuda:)?\d{1,9}(,(cuda:)?\d{1,9})*", text):
            raise RequestError(f"devices '{text}' are not understood; use auto, cpu, cpu:2, ray, or GPU numbers such as 0,1")
        indices = tuple(int(part.removeprefix("cuda:")) for part in text.split(","))
        if len(set(indices)) < len(indices) and not several_ranks_a_gpu():
            raise RequestError(f"devices '{text}' name a GPU twice; name each once")
        if missing := [index for index in indices if index >= gpus]:
            has = f"GPUs 0 to {gpus - 1}" if gpus else "no GPU; use cpu or cpu:2"
            raise RequestError(f"devices '{text}': there is no GPU {missing[0]}; this machine has {has}")
        return cls("cuda", indices)

    @classmethod
    def _on_ray(cls, count: int | None) -> "Devices":
        """Returns devices of the Ray cluster. A plan may wait for more than there are now, as nodes can be added."""
        from .cluster import nodes

        kind, sizes = nodes.devices_of(nodes.nodes())
        count = nodes.usable(sizes) if count is None else count
        if count < 1:
            raise RequestError(f"devices 'ray:{count}' are no devices; use ray:1 or more")
        return cls(kind, tuple(range(count)), on_ray=True)

    def __str__(self) -> str:
        if self.on_ray:
            return f"ray:{self.count}"
        return f"cpu:{self.count}" if self.kind == "cpu" else ",".join(map(str, self.indices))

    @property
    def count(self) -> int:
        """Number of processes that a group on these devices has."""
        return len(self.indices)

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """The device of each rank."""
        return tuple(torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", index) for index in self.indices)

    @property
    def first(self) -> torch.device:
        """The device for work in this process."""
        return self.torch_devices[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Entries for ``CUDA_VISIBLE_DEVICES``: the GPUs as the driver numbers or names them."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        given = visible.split(",") if visible else None
        return tuple(given[index] if given else str(index) for index in self.indices)

    def first_of(self, count: int) -> "Devices":
        """Returns the first ``count`` devices."""
        return replace(self, indices=self.indices[:count])

    def shared_out(self, parts: int) -> tuple["Devices", ...]:
        """Divides the devices among ``parts`` groups of equal size."""
        size = self.count // parts
        shares = [self.indices[first : first + size] for first in range(0, self.count, size)]
        if self.kind == "cpu" or self.on_ray:
            shares = [tuple(range(size))] * parts
        return tuple(replace(self, indices=share, others=self.count - size) for share in shares)

    def environment(self) -> dict[str, str]:
        """Returns the variables of a group's processes, by which local rank r gets the r-th of these devices."""
        threads = max(1, usable_cores() // (self.count + self.others))
        if self.kind == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
        threads = min(threads, MOST_THREADS)
        visible = list(dict.fromkeys(self.names))
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "CUDA_VISIBLE_DEVICES": ",".join(visible),
            RANKS: ",".join(str(visible.index(name)) for name in self.names),
        }


def current(device: torch.device):
    """Returns a context that makes a GPU the current one, where Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
