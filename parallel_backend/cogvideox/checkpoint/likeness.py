"""Whether machines have the same files for a job."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from ...jobs import Job
from .checkpoint import Checkpoint
from .controlnet import ControlNetFile


def likeness(job: Job, checkpoint: Checkpoint) -> str:
    """Returns a digest that is equal where a job's files are the same.

    It covers the names, sizes and middles of the files of weights: of the model, its LoRAs and its ControlNets.
    """
    digest = hashlib.sha256()
    for path in dict.fromkeys(files_of(job, checkpoint)):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(size // 2)
            digest.update(f"{path.name} {size} ".encode() + file.read(4096))
    return digest.hexdigest()


def files_of(job: Job, checkpoint: Checkpoint) -> Iterator[Path]:
    """Yields the files of weights that a job needs."""
    for part in ("transformer", "vae"):
        if part in checkpoint.elements:
            yield from checkpoint.files(part)
    yield from (Path(lora.path) for lora in job.model.loras)
    for net in getattr(job, "controlnets", ()):
        yield from ControlNetFile.open(net.path).files
