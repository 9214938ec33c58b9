"""Measurements of this machine on disk: the rates of its GPUs, and the speed of the links between them.

They are in one JSON file; see :mod:`parallel_backend.system.measurements`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..system import measurements
from ..system.folders import preferred_cache
from ..system.measurements import today
from .machine import RATES, Link

FILE = preferred_cache() / "rates.json"
VERSION = 3
"""Rates of version 2 may have been measured while the GPU was busy."""
LINK = ("bandwidth", "latency")
"""The measured fields of :class:`parallel_backend.planner.machine.Link`."""


def rates_of(gpu: str, torch_version: str) -> tuple[dict[str, float], str] | None:
    """Returns the rates of a GPU model under a version of torch, and the day of the measurement; None if there are none."""
    return numbers(read()["rates"].get(rates_key(gpu, torch_version)), RATES)


def keep_rates(gpu: str, torch_version: str, rates: dict[str, float]) -> None:
    """Saves the measured rates of a GPU model."""
    key = rates_key(gpu, torch_version)
    keep(lambda kept: kept["rates"].update({key: {**rates, "measured": today()}}), f"the rates of {gpu}")


def link_of(kind: str, gpus: Sequence[str]) -> tuple[Link, str] | None:
    """Returns the measured link of GPUs, and the day of the measurement; None if there is none.

    If these GPUs were not measured together, the smallest measured group that contains them counts.

    Args:
        kind: the models of the GPUs, from :func:`.hardware.kind_of`.
        gpus: the GPUs as the driver numbers them.
    """
    links = [(set(key.split(",")), found) for key, found in read()["links"].get(kind, {}).items()]
    for _, found in sorted((link for link in links if link[0] >= set(gpus)), key=lambda link: len(link[0])):
        if measured := numbers(found, LINK):
            return Link(**measured[0]), measured[1]
    return None


def keep_link(kind: str, gpus: Sequence[str], link: Link) -> None:
    """Saves the measured link of GPUs; arguments as for :func:`link_of`."""
    found = {"bandwidth": link.bandwidth, "latency": link.latency, "measured": today()}
    keep(lambda kept: kept["links"].setdefault(kind, {}).update({",".join(sorted(gpus)): found}), f"the link of {kind}")


def rates_key(gpu: str, torch_version: str) -> str:
    """Returns the key of rates. Another torch has other kernels."""
    return f"{gpu}, torch {torch_version}"


def numbers(found: Any, names: Sequence[str]) -> tuple[dict[str, float], str] | None:
    """Returns a record's numbers and date; None unless all are present, finite and positive."""
    if not isinstance(found, dict) or not isinstance(found.get("measured"), str):
        return None
    values = {name: found.get(name) for name in names}
    is_valid = all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in values.values())
    return (values, found["measured"]) if is_valid else None


def read() -> dict[str, dict]:
    """Reads ``rates`` and ``links`` from the file; both are empty if there is no usable file."""
    return measurements.read(
        FILE,
        version=VERSION,
        parts=("rates", "links"),
        is_valid=lambda kept: all(isinstance(links, dict) for links in kept["links"].values()),
    )


def keep(change: Callable[[dict], None], what: str) -> None:
    """Changes the file.

    Args:
        change: changes the contents in place.
        what: names the change, for the log.
    """
    kept = read()
    change(kept)
    measurements.save(FILE, kept, version=VERSION, what=what)
