"""What can be done on a device, found out by trying it once. That takes seconds, in which weights are read."""

import threading
from collections.abc import Callable
from functools import wraps

import torch

from ...devices import current
from ...errors import first_line

Trial = Callable[..., str | None]
"""Says why something cannot be done on a device, in one line, or None; may be asked about more than that."""


def once(trial: Trial) -> Trial:
    """A trial that is made once for a device and what else it is asked about; who asks meanwhile, from another thread, waits for its
    end. One that raises an error has that for its reason: Triton, a C compiler or Python's headers may be missing, or torch too old, and
    each fails in its own way."""
    found: dict[tuple, str | None] = {}
    lock = threading.Lock()

    @wraps(trial)
    def ask(device: torch.device, *others) -> str | None:
        about = (device, *others)
        with lock:
            if about not in found:
                with current(device):
                    try:
                        found[about] = trial(*about)
                    except Exception as error:
                        found[about] = first_line(error)
            return found[about]

    return ask


def is_near(found: torch.Tensor, exact: torch.Tensor, share: float) -> bool:
    """Whether what a trial found is no further from what is right than this share of it; what is not a number is not near."""
    return bool((found.float() - exact.float()).norm() <= share * exact.float().norm())


def beside(*trials: Callable[[], object]) -> None:
    """Makes trials in a thread of their own; who asks for what is found waits for it."""

    def make() -> None:
        for trial in trials:
            trial()

    threading.Thread(target=make, name="trials", daemon=True).start()
