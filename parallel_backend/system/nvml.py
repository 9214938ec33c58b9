"""What the driver knows of GPUs, asked without a CUDA context: free and total memory, load, and its own version."""

from typing import Any

import torch


def free_bytes(device: torch.device) -> int:
    """Returns the free bytes of a GPU."""
    return free_and_total(device)[0]


def used_and_total(device: torch.device) -> tuple[int, int]:
    """Returns the bytes of a GPU in use, by whichever process, and in all."""
    free, total = free_and_total(device)
    return total - free, total


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Returns the free bytes of a GPU, and all of them.

    NVML knows them without a CUDA context, which takes about 0.5 GB of a GPU that this process may never use. Where it cannot
    answer, as for a part of a GPU (MIG), CUDA does.
    """
    try:
        nvml = opened()
        memory = nvml.nvmlDeviceGetMemoryInfo(handle_of(device, nvml))
        return int(memory.free), int(memory.total)
    except Exception:  # not installed, no driver library, no such GPU: each library version has other errors
        return torch.cuda.mem_get_info(device)


def load_of(device: torch.device) -> float:
    """Returns the share of the last moment, at most a second, in which a GPU computed, for whichever process. 0 if NVML cannot say."""
    try:
        nvml = opened()
        return nvml.nvmlDeviceGetUtilizationRates(handle_of(device, nvml)).gpu / 100
    except Exception:  # as above
        return 0.0


def driver_version() -> str:
    """Returns the version of the GPUs' driver; that of CUDA that it supports where NVML does not answer."""
    try:
        return str(opened().nvmlSystemGetDriverVersion())
    except Exception:  # as above
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


def opened() -> Any:
    """Returns NVML, ready to answer."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def handle_of(device: torch.device, nvml: Any) -> Any:
    """Returns NVML's handle of a GPU."""
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
