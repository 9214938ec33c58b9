"""Tests what a device supports by trying it once. A test takes seconds, during which weights are read."""

import threading
from collections.abc import Callable
from functools import wraps

import torch

from ...devices import current
from ...errors import reason_of

Trial = Callable[..., str | None]
"""Returns why something does not work on a device, in one line, or None. May take arguments in addition to the device."""


def once(trial: Trial) -> Trial:
    """Caches a trial's result by its arguments. Concurrent callers wait for it.

    An exception is a result as well, since failures take many forms: Triton, a C compiler or Python's headers may be missing,
    or torch may be too old.
    """
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
                        found[about] = reason_of(error)
            return found[about]

    return ask


def is_near(found: torch.Tensor, exact: torch.Tensor, share: float) -> bool:
    """Returns whether a result's error, relative to ``exact``, is at most ``share``; False if it has NaNs."""
    return bool((found.float() - exact.float()).norm() <= share * exact.float().norm())


def in_background(*trials: Callable[[], object]) -> None:
    """Runs trials in a background thread. Callers that need a result wait for it."""

    def make() -> None:
        for trial in trials:
            trial()

    threading.Thread(target=make, name="trials", daemon=True).start()
