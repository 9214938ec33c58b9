"""Stops a model in the middle of its work."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import Cancelled

GoOn = Callable[[], bool]
"""Says whether a job is still wanted."""


def always() -> bool:
    """A job that is wanted whatever happens."""
    return True


def check(go_on: GoOn, doing: str) -> None:
    """Raises Cancelled, saying what was done, where a job is not wanted any more."""
    if not go_on():
        raise Cancelled(f"stopped while {doing}")


@contextmanager
def stoppable(modules: Iterable[nn.Module], go_on: GoOn, doing: str) -> Iterator[None]:
    """Within, each of these modules calls :func:`check` before its work."""
    hooks = [module.register_forward_pre_hook(lambda *_: check(go_on, doing)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
