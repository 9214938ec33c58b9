"""Which devices a plan runs on."""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from .errors import RequestError
from .system.limits import usable_cores

RANKS = "XDIT_RANKS"
"""In the environment of a group's processes: the GPU of each of this machine's ranks."""
BF16_CAPABILITY = (8, 0)
"""Of the first GPUs that compute in bf16, and that cuDNN's attention is made for."""
MOST_THREADS = 8
"""Of a process that works on a GPU: its CPU has memory to copy and little to compute."""


def visible_index(local_rank: int) -> int:
    """The number of a rank's GPU among those that a group's processes see."""
    return int(os.environ[RANKS].split(",")[local_rank])


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16; a rank's says it for all that its group has on this machine, as they must agree. One that is not
    here, which is only planned for, does."""
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    group = range(torch.cuda.device_count()) if RANKS in os.environ else [device]
    return min(map(torch.cuda.get_device_capability, group)) >= BF16_CAPABILITY


def several_ranks_a_gpu() -> bool:
    """Whether a GPU that is named twice holds two ranks. That is slower than one, and each takes all of its free memory for its own:
    it is for trying groups where there is one GPU.

    Source:
        NCCL 2.30 and newer allow it where this variable is set; what runs is shared out in slices of time.
    """
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


@dataclass(frozen=True)
class Devices:
    """GPUs by number, or a number of processes on the CPU.

    Raises:
        RequestError: from :meth:`parse`, for what is not there.
    """

    kind: str
    """``cuda`` or ``cpu``."""
    indices: tuple[int, ...] = (0,)
    """GPU numbers, as this process sees them; on the CPU just 0, 1, …"""
    beside: int = 0
    """Processes of other groups that work at the same time, with whom the CPU's cores are shared."""

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """Reads ``auto``, ``cpu``, ``cpu:2`` (two processes), ``0,1`` or ``cuda:0,1``."""
        text = text.strip()
        gpus = torch.cuda.device_count()
        if text == "auto":
            return cls("cuda", tuple(range(gpus))) if gpus else cls("cpu")
        if match := re.fullmatch(r"cpu(?::(\d+))?", text):
            count = int(match[1] or 1)
            if count < 1:
                raise RequestError(f"devices '{text}' are none; use cpu:1 or more")
            return cls("cpu", tuple(range(count)))
        if not re.fullmatch(r"(cuda:)?\d+(,(cuda:)?\d+)*", text):
            raise RequestError(f"devices '{text}' are not understood; use auto, cpu, cpu:2, or GPU numbers such as 0,1")
        indices = tuple(int(part.removeprefix("cuda:")) for part in text.split(","))
        if len(set(indices)) < len(indices) and not several_ranks_a_gpu():
            raise RequestError(f"devices '{text}' name a GPU twice")
        if missing := [index for index in indices if index >= gpus]:
            has = f"GPUs 0 to {gpus - 1}" if gpus else "no GPU; use cpu or cpu:2"
            raise RequestError(f"devices '{text}': there is no GPU {missing[0]}; this machine has {has}")
        return cls("cuda", indices)

    def __str__(self) -> str:
        return f"cpu:{self.count}" if self.kind == "cpu" else ",".join(map(str, self.indices))

    @property
    def count(self) -> int:
        """Processes that a group on these devices has."""
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
        """The GPUs' numbers or names as the driver has them, whatever this process sees of them."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        given = visible.split(",") if visible else None
        return tuple(given[index] if given else str(index) for index in self.indices)

    def first_of(self, count: int) -> "Devices":
        """The first so many of them."""
        return replace(self, indices=self.indices[:count])

    def shared_out(self, parts: int) -> tuple["Devices", ...]:
        """The devices of each of so many groups of one size."""
        size = self.count // parts
        shares = [self.indices[first : first + size] for first in range(0, self.count, size)]
        if self.kind == "cpu":
            shares = [tuple(range(size))] * parts
        return tuple(Devices(self.kind, share, self.count - size) for share in shares)

    def environment(self) -> dict[str, str]:
        """What a group's processes must see: local rank r on the r-th of these devices."""
        threads = max(1, usable_cores() // (self.count + self.beside))
        if self.kind == "cpu":
            # Threads that spin for long take the cores that others compute on: 2.5 s a step, 0.14 with a bound (measured).
            return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
        # torch.distributed.run gives each process one thread; a video on its way from the GPU is copied faster by some.
        threads = min(threads, MOST_THREADS)
        visible = list(dict.fromkeys(self.names))
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "CUDA_VISIBLE_DEVICES": ",".join(visible),
            RANKS: ",".join(str(visible.index(name)) for name in self.names),
        }


def current(device: torch.device):
    """A context in which a GPU is the current one, on which Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
