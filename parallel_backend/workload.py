"""What one step of a checkpoint computes and keeps, for the planner."""

import torch

from .cogvideox.checkpoint.checkpoint import Checkpoint
from .cogvideox.checkpoint.facts import SPATIAL, TEMPORAL
from .cogvideox.offload import block_parts
from .cogvideox.pipeline.windows import forward_size
from .jobs import SampleJob
from .planner.cost_model import Work


def work_of(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    size: tuple[int, int, int] | None = None,
    guided: bool = True,
    batch: int = 1,
    dtype: str = "auto",
    fp8: str = "off",
    compile: str = "auto",
) -> Work:
    """One step.

    Args:
        checkpoint: opened; no weight is read.
        device: of the kind to compute on.
        size: width and height in pixels and frames; the checkpoint's own where it is not known.
        guided: whether cfg is above 1.
        batch: videos at a time.
        dtype, fp8, compile: as in :class:`parallel_backend.jobs.Model`.
    """
    width, height, frames = size or checkpoint.default_size
    tokens = checkpoint.tokens((frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL) + checkpoint.text_tokens
    found = checkpoint.dtype(dtype, device)
    vectors, matrices = block_parts(checkpoint, found, fp8=fp8 != "off")
    whole = sum(block_parts(checkpoint, found))
    return Work(
        layers=checkpoint.layers,
        heads=checkpoint.heads,
        head_dim=checkpoint.head_dim,
        tokens=tokens,
        prompts=batch * (2 if guided else 1),
        itemsize=found.itemsize,
        matrices=matrices,
        vectors=vectors,
        rest=checkpoint.weight_bytes("transformer", found) - whole,
        guided=guided,
        dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(found, "fp32"),
        fp8=fp8,
        compile=compile,
    )


def work_of_job(job: SampleJob, checkpoint: Checkpoint, device: torch.device) -> Work:
    """One forward of a job: of one window where it has several."""
    batch, frames, height, width = forward_size(job, checkpoint)
    size, model = (width * SPATIAL, height * SPATIAL, (frames - 1) * TEMPORAL + 1), job.model
    about = {"dtype": model.dtype, "fp8": model.fp8, "compile": model.compile}
    return work_of(checkpoint, device, size=size, guided=job.guided, batch=batch, **about)
