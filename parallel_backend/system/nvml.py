"""What the driver knows of GPUs, asked without a CUDA context: free memory, and its own version."""

import torch


def free_bytes(device: torch.device) -> int:
    """Returns the free bytes of a GPU.

    NVML knows them without a CUDA context, which takes about 0.5 GB of a GPU that this process may never use. Where it cannot
    answer, as for a part of a GPU (MIG), CUDA does.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except Exception:  # not installed, no driver library, no such GPU: each library version has other errors
        return torch.cuda.mem_get_info(device)[0]


def driver_version() -> str:
    """Returns the version of the GPUs' driver; that of CUDA that it supports where NVML does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # as above
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())
