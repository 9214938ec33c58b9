"""How the pack's errors appear in ComfyUI: by a plain name, in the node and in a toast."""

import logging
import re
from collections.abc import Iterator

from ...parallel_backend.errors import Failure, OutOfMemory, RequestError
from . import lines, submission
from .events import send_event

TOO_LARGE = re.compile(r"(?:can't allocate|not enough) memory: you tried to allocate (\d+) bytes")
"""What torch says of a tensor that main memory has no room for."""


def kinds(*bases: type[Exception]) -> Iterator[type[Exception]]:
    """Yields classes of errors and all of their subclasses."""
    for base in bases:
        yield base
        yield from kinds(*base.__subclasses__())


def name_plainly() -> None:
    """Makes ComfyUI print ``CogVideoXError: …`` for every error of the pack.

    It prints a class with its module, which for a pack is the path of its folder. The front end has sentences of its own for names
    such as ``RequestError``, and would show them in place of ours.
    """
    for kind in kinds(RequestError, Failure):
        kind.__module__, kind.__qualname__ = "builtins", "CogVideoXError"


def sentence(error: Exception) -> str:
    """Returns what one of the pack's errors says: its first line, without a remote traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: RuntimeError) -> OutOfMemory | None:
    """Returns the error for a tensor that main memory has no room for; None if another error was raised."""
    found = TOO_LARGE.search(str(error))
    size = found and f"{int(found[1]) / 2**30:.1f} GiB"
    return found and OutOfMemory(f"{size} do not fit into main memory; use a smaller size, fewer frames or fewer videos")


def show(error: Exception, node_id: str | None) -> None:
    """Shows an error's sentence in the node, by default the one that is executing."""
    lines.show(sentence(error), logging.ERROR, node_id)


def refuse(message: str, node_id: str | None) -> str:
    """Shows in a toast why an input is refused before the workflow runs, and returns the message.

    The front end itself shows only the input's name.
    """
    send_event("refused", {"node": node_id, "text": message}, submission.client_id())
    return message
