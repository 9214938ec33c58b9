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
        nvml, handle = handle_of(device)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.free), int(memory.total)
    except Exception:  # not installed, no driver library, no such GPU: each library version has other errors
        return torch.cuda.mem_get_info(device)


def load(device: torch.device) -> float:
    """Returns the share of the last moment, at most a second, in which a GPU computed, for whichever process. 0 if NVML cannot say."""
    try:
        nvml, handle = handle_of(device)
        return nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except Exception:  # as above
        return 0.0


def handle_of(device: torch.device) -> tuple[Any, Any]:
    """Returns NVML, and its handle of a GPU."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def driver_version() -> str:
    """Returns the version of the GPUs' driver; that of CUDA that it supports where NVML does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # as above
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())
