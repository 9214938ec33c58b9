"""Cancels a model's work between its modules."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import Cancelled

GoOn = Callable[[], bool]
"""Returns whether a job is still wanted."""


def always() -> bool:
    """Returns True: for work that cannot be cancelled."""
    return True


def check(go_on: GoOn, doing: str) -> None:
    """Raises Cancelled if ``go_on`` returns False; ``doing`` is part of its message."""
    if not go_on():
        raise Cancelled(f"stopped while {doing}")


@contextmanager
def stoppable(modules: Iterable[nn.Module], go_on: GoOn, doing: str) -> Iterator[None]:
    """Within the context, calls :func:`check` before each of these modules runs."""
    hooks = [module.register_forward_pre_hook(lambda *_: check(go_on, doing)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
