"""A rank's sign of life: what it does and how long that may take, in a file that the group's agent reads."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pulse:
    """What a rank said last."""

    count: int
    """How often it has said something; ranks that do the same work count alike."""
    doing: str
    seconds: float | None
    """How long this may take; None is for ever."""


class Heart:
    """Writes a rank's pulse. The main thread does it, so that one which hangs is silent.

    Args:
        path: the file; see :meth:`.address.GroupAddress.pulse_file`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._count = 0

    def beat(self, doing: str, seconds: float | None) -> None:
        """Says what comes next, and within how many seconds the next beat does."""
        self._count += 1
        written = self._path.with_suffix(".partial")
        written.write_text(json.dumps(asdict(Pulse(self._count, doing, seconds))))
        os.replace(written, self._path)  # the agent reads it at any moment


def read(path: Path) -> Pulse | None:
    """The last pulse in a file, or None before the first."""
    try:
        return Pulse(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
