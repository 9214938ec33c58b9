"""Measured times of functions that compute the same: attention's, and products in int8. On disk, in a JSON file beside the planner's; see
:mod:`parallel_backend.system.measurements`."""

import math
from dataclasses import dataclass, field
from typing import Any

from ...system import measurements
from ...system.folders import preferred_cache

FILE = preferred_cache() / "attention.json"
VERSION = 1
PARTS = ("timings",)


@dataclass(frozen=True)
class Timings:
    """What was measured on a GPU for one kind of tensors."""

    milliseconds: dict[str, float]
    """Of each function that is right, by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why each other function was left out."""


def read(key: str, versions: str) -> Timings | None:
    """Returns what was measured, or None.

    Args:
        key: GPU, and kind of tensors with their sizes.
        versions: of all that may change the times; with others they are measured again.
    """
    found = measurements.read(FILE, version=VERSION, parts=PARTS)["timings"].get(key)
    if not isinstance(found, dict) or found.get("versions") != versions:
        return None
    milliseconds, left_out = found.get("milliseconds"), found.get("left_out")
    is_valid = are(milliseconds, is_time) and are(left_out, lambda reason: isinstance(reason, str))
    return Timings(milliseconds, left_out) if is_valid and milliseconds else None


def keep(key: str, versions: str, timings: Timings) -> None:
    """Saves what was measured; see :func:`read`. It replaces what was measured with other versions."""
    kept = measurements.read(FILE, version=VERSION, parts=PARTS)
    kept["timings"][key] = {
        "versions": versions,
        "milliseconds": timings.milliseconds,
        "left_out": timings.left_out,
        "measured": measurements.today(),
    }
    measurements.save(FILE, kept, version=VERSION, what=f"the times on {key}")


def are(found: Any, is_valid) -> bool:
    """Returns whether this is an object with valid values only."""
    return isinstance(found, dict) and all(map(is_valid, found.values()))


def is_time(value: Any) -> bool:
    """Returns whether this is a finite, positive number."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
