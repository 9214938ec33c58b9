"""What can be done on a device, found out by trying it once. That takes seconds, in which weights are read."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch

Trial = Callable[[torch.device], str | None]
"""Says why something cannot be done, in one line, or None."""


def once(trial: Trial) -> Trial:
    """A trial that is made once for a device; who asks meanwhile, from another thread, waits for its end."""
    found: dict[torch.device, str | None] = {}
    lock = threading.Lock()

    @wraps(trial)
    def ask(device: torch.device) -> str | None:
        with lock:
            if device not in found:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    found[device] = trial(device)
            return found[device]

    return ask


def begin(device: torch.device) -> None:
    """Makes all trials in a thread of their own."""

    def make() -> None:
        from . import attention, blocks

        blocks.why_not_compiled(device)
        if attention.is_hopper(device):
            attention.why_not_own(device)

    threading.Thread(target=make, name="trials", daemon=True).start()
