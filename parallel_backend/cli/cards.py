"""The command ``cards``: which GPU can run which published model, and how."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..cogvideox.checkpoint import published
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..fit import Fit, fit
from ..model import Model
from ..planner import gpu_table
from ..planner.machine import Machine
from ..workload import work_of
from .console import show

GIB = 2**30
MODELS = {"2b": "2b", "5b": "5b, 5b-I2V and Fun 5b", "1.5": "1.5-5B and 1.5-5B-I2V"}
"""The published models that stand for all, and what they stand for: conditions add less than 2 % of weights."""
SIZES = {
    8: "RTX 3070, 4060",
    12: "RTX 3060, 4070, 5070",
    16: "RTX 4060 Ti, 4080, 5080, A4000",
    24: "RTX 3090, 4090, A5000, L4",
    32: "RTX 5090, V100",
}
"""Memory of a GPU in GB, and examples."""


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``cards``."""
    parser.set_defaults(run=cards)


def cards(args: Namespace) -> int:
    """Prints two tables in Markdown: what fits by memory, and predicted seconds of a step by GPU."""
    show("\n".join([*by_memory(), "", *by_gpu()]))
    return 0


def by_memory() -> Iterator[str]:
    """Yields the lines of the table of what fits."""
    yield "| model | GB a GPU | GPUs | lossless | weights in 8 bits |"
    yield "|---|---|---|---|---|"
    generic = gpu_table.known("RTX 3090")
    for model, title in MODELS.items():
        checkpoint = published.find(model)
        for memory in SIZES:
            machine = replace(generic, free=(memory - 1) * GIB)
            for count in (1, 2):
                cells = (cell(fitted(checkpoint, machine, count, quantize=kind)) for kind in ("off", "int8"))
                yield f"| {title} | {memory} | {count} | {' | '.join(cells)} |"


def by_gpu() -> Iterator[str]:
    """Yields the lines of the table of predicted seconds."""
    yield f"| GPU | {' | '.join(f'{model} on one · on two' for model in MODELS)} |"
    yield "|---" * (len(MODELS) + 1) + "|"
    checkpoints = [published.find(model) for model in MODELS]
    for name, machine in gpu_table.KNOWN.items():
        cells = (" · ".join(seconds(fitted(checkpoint, machine, count)) for count in (1, 2)) for checkpoint in checkpoints)
        yield f"| {name} | {' | '.join(cells)} |"


def fitted(checkpoint: Checkpoint, machine: Machine, count: int, *, quantize: str = "off") -> Fit:
    """Returns how a model fits at its own size, with guidance."""
    size, model = checkpoint.default_size, Model(str(checkpoint.path), quantize=quantize)
    return fit(checkpoint, work_of(checkpoint, torch.device("cuda"), size=size, model=model), machine, count, size=size)


def cell(found: Fit) -> str:
    """Describes how a model fits, in a few words."""
    if not found.fits:
        return "too small at this size"
    offload = "" if found.offload == "none" else f", offload `{found.offload}`"
    decode = ", decode in tiles" if found.is_tiled else ""
    return f"`{found.plan}`{offload}{decode}: {found.peak / GIB:.1f} GiB, host {found.host / GIB:.0f}"


def seconds(found: Fit) -> str:
    """Formats the seconds of a step; a dash where they are not predicted."""
    return (
        "–"
        if found.seconds is None or not found.fits
        else f"{found.seconds:.2g}"
        if found.seconds < 10
        else f"{found.seconds:.0f}"
    )
