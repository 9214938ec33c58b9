"""What was measured of this machine, kept on disk: the rates of its GPUs, and how fast groups of them exchange data.

They are kept in one JSON file in the user's cache folder. A file that is broken, or of another version of this pack, is ignored with one
line and replaced.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from ..errors import WriteFailure
from ..system.files import whole_file
from ..system.folders import preferred_cache
from .machine import Link

logger = logging.getLogger(__name__)

FILE = preferred_cache() / "rates.json"
VERSION = 2
RATES = ("matrix", "attention", "bandwidth")
"""Fields of :class:`parallel_backend.planner.machine.Machine` that are measured."""
LINK = ("bandwidth", "latency")
"""Those of a link."""


def rates_of(gpu: str, torch_version: str) -> tuple[dict[str, float], str] | None:
    """The kept rates of a kind of GPU under a version of torch, and the day they were measured."""
    return numbers(read()["rates"].get(rates_key(gpu, torch_version)), RATES)


def keep_rates(gpu: str, torch_version: str, rates: dict[str, float]) -> None:
    """Keeps measured rates."""
    key = rates_key(gpu, torch_version)
    keep(lambda kept: kept["rates"].update({key: {**rates, "measured": today()}}), f"the rates of {gpu}")


def link_of(kind: str, gpus: Sequence[str]) -> tuple[Link, str] | None:
    """How fast such GPUs exchange data, and the day that was measured: these, or the smallest group that had them all."""
    links = [(set(key.split(",")), found) for key, found in read()["links"].get(kind, {}).items()]
    for _, found in sorted((link for link in links if link[0] >= set(gpus)), key=lambda link: len(link[0])):
        if said := numbers(found, LINK):
            return Link(**said[0]), said[1]
    return None


def keep_link(kind: str, gpus: Sequence[str], link: Link) -> None:
    """Keeps how fast a group of GPUs, named as the driver numbers them, exchanges data."""
    found = {"bandwidth": link.bandwidth, "latency": link.latency, "measured": today()}
    keep(lambda kept: kept["links"].setdefault(kind, {}).update({",".join(sorted(gpus)): found}), f"the link of {kind}")


def rates_key(gpu: str, torch_version: str) -> str:
    """What rates are kept under: another torch has other kernels."""
    return f"{gpu}, torch {torch_version}"


def today() -> str:
    """The date, as it is kept."""
    return date.today().isoformat()


def numbers(found: Any, names: Sequence[str]) -> tuple[dict[str, float], str] | None:
    """A record's numbers and date, or None where they are not all there, finite and positive."""
    if not isinstance(found, dict) or not isinstance(found.get("measured"), str):
        return None
    values = {name: found.get(name) for name in names}
    good = all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in values.values())
    return (values, found["measured"]) if good else None


def read() -> dict[str, dict]:
    """What is kept: ``rates`` and ``links``, which are empty where there is no file that can be used."""
    nothing = {"rates": {}, "links": {}}
    try:
        kept = json.loads(FILE.read_text())
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError) as error:
        logger.warning("what was measured of this machine, %s, cannot be read and is measured again: %s", FILE, error)
        return nothing
    if not isinstance(kept, dict) or kept.get("version") != VERSION:
        logger.warning("what was measured of this machine, %s, is of another version and is measured again", FILE)
        return nothing
    if not all(isinstance(kept.get(part), dict) for part in nothing) or not all(
        isinstance(links, dict) for links in kept["links"].values()
    ):
        logger.warning("what was measured of this machine, %s, is broken and is measured again", FILE)
        return nothing
    return kept


def keep(change: Callable[[dict], None], what: str) -> None:
    """Writes the file with a change. Of two processes that do so at once, one change may be lost, and is then measured again."""
    kept = read()
    change(kept)
    try:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(FILE) as partial:
            partial.write_text(json.dumps({"version": VERSION, **kept}, indent=1))
    except (OSError, WriteFailure) as error:
        logger.info("%s are not kept: %s", what, error)
