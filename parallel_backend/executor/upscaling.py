"""Enlarging a video: one tile after the other, each in three jobs that any executor can run."""

import re
import time
from collections.abc import Callable
from dataclasses import replace

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline import upscaling
from ..cogvideox.pipeline.upscaling import Mosaic, Tile, tiles_of
from ..jobs import DecodeJob, Job, Result, UpscaleJob
from ..plan import Plan
from .continuing import joined

Run = Callable[[Job], Result]
"""Runs a job; raises Cancelled if the caller wants to stop."""


def upscale(job: UpscaleJob, checkpoint: Checkpoint, run: Run, on_tile: Callable[[int], None]) -> Result:
    """Makes all tiles of a job, or the one that it is for.

    Args:
        job: checked.
        checkpoint: of the job.
        run: runs the jobs of a tile.
        on_tile: called with the number of tiles done after each of them.
    Returns:
        The video, or the tile, and what all tiles cost.
    """
    tiles, reports = tiles_of(job), []
    mosaic = Mosaic(job) if job.place is None else None
    for number, tile in enumerate(tiles):
        result = one_tile(job, tile, checkpoint, run)
        reports.append(result.report)
        if mosaic:
            mosaic.add(number, result.tensor)
        on_tile(number + 1)
    return Result(mosaic.video if mosaic else result.tensor, joined(reports))


def without_effect(job: UpscaleJob, plan: Plan) -> list[str]:
    """Returns a note for each thing that was asked for and changes nothing here."""
    notes = [
        f"{name} has no effect: a tile takes one step" for name in ("step_cache", "guidance_cache") if getattr(job.model, name)
    ]
    if plan.cfg > 1:
        notes.append(f"an upscaling model has no guidance: both halves of plan '{plan}' compute the same")
    return notes


def without_repetition(result: Result) -> Result:
    """Returns a result whose report has each note once, though tiles saw different numbers, such as of free memory."""
    first: dict[str, str] = {}
    for note in result.report.notes:
        first.setdefault(re.sub(r"[\d.]+", "0", note), note)
    return replace(result, report=replace(result.report, notes=tuple(first.values())))


def one_tile(job: UpscaleJob, tile: Tile, checkpoint: Checkpoint, run: Run) -> Result:
    """Enlarges one tile."""
    began = time.perf_counter()
    encoded = run(upscaling.encode_job(job, tile))
    seen = upscaling.model_input(encoded.tensor, checkpoint)
    predicted = run(upscaling.forward_job(job, seen))
    latent = upscaling.clean_latent(seen, predicted.tensor, encoded.tensor.shape[2], checkpoint)
    decoded = run(DecodeJob(job.model, latent, job.tiling))
    report = joined([one.report for one in (encoded, predicted, decoded)])
    seconds = time.perf_counter() - began - report.load_seconds
    return Result(decoded.tensor[0], replace(report, run_seconds=seconds, step_seconds=(seconds,)))
