"""What can be done on a device, found out by trying it once. That takes seconds, in which weights are read."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch

Trial = Callable[..., str | None]
"""Says why something cannot be done on a device, in one line, or None; may be asked about a dtype too."""


def once(trial: Trial) -> Trial:
    """A trial that is made once for a device and what else it is asked about; who asks meanwhile, from another thread, waits for its
    end."""
    found: dict[tuple, str | None] = {}
    lock = threading.Lock()

    @wraps(trial)
    def ask(device: torch.device, *dtype: torch.dtype) -> str | None:
        about = (device, *dtype)
        with lock:
            if about not in found:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    found[about] = trial(*about)
            return found[about]

    return ask


def begin(device: torch.device, dtype: torch.dtype) -> None:
    """Makes all trials for a transformer in a thread of their own."""

    def make() -> None:
        from . import attention, blocks

        blocks.why_not_compiled(device)
        if attention.is_for_own(device, dtype, attention.HEAD_DIM):
            attention.why_not_own(device, dtype)

    threading.Thread(target=make, name="trials", daemon=True).start()
