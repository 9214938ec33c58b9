"""Long videos from a start image: one window after the other, each of which continues the last frames of the one before.

Windows that are blended in every step, as for text, do not know the image: the model is shown an image in its first frame, which only the
first window has. So each window is a job of its own. Its image and the frames that it begins with are those that the window before it ended
with, decoded and encoded again, as the VAE encodes a first frame otherwise than later ones. These frames are held while the
others are sampled (:class:`parallel_backend.cogvideox.pipeline.sampling.Sampling`), so that motion continues too.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.compression import TEMPORAL, frames_of, latent_frames_of
from ..cogvideox.pipeline.notes import WHOLE
from ..cogvideox.pipeline.windows import Layout
from ..jobs import MAX_SEED, DecodeJob, EncodeJob, Job, Report, Result, SampleJob
from ..notes import Information

Run = Callable[..., Result]
"""Runs a job; called with it, or for a window with the number of its place too."""


def is_continued(job: Job, checkpoint: Checkpoint) -> bool:
    """Whether a job is a video from a start image that is longer than a window."""
    if job.kind != SampleJob.kind or job.image is None or job.windows is None:
        return False
    return not Layout.of(job, checkpoint).is_whole


def spans(frames: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """Returns for each window its start and how many of its first frames the one before it has made.

    Args:
        frames: latent frames of the video.
        length: of a window.
        overlap: of neighbouring windows, at least; the last one may overlap by more.
    """
    found = [(0, 0)]
    while (end := found[-1][0] + length) < frames:
        start = min(end - overlap, frames - length)
        found.append((start, end - start))
    return found


def spans_of(job: SampleJob) -> list[tuple[int, int]]:
    """Returns the :func:`spans` of a job's windows."""
    length = latent_frames_of(job.windows.frames)
    return spans(job.latent.shape[2], length, max(1, job.windows.overlap // TEMPORAL))


def sample(job: SampleJob, run: Run) -> Result:
    """Samples the windows of a continued job.

    Args:
        job: see :func:`is_continued`.
        run: runs the jobs of windows and of the VAE.
    Returns:
        The latent of the video, and what all windows cost.
    """
    places = spans_of(job)
    parts, reports, known = [], [], {"image": job.image}
    for place, (start, kept) in enumerate(places):
        last = place == len(places) - 1
        result = run(window_of(job, place, start, known, last), place)
        parts.append(result.tensor[:, :, kept:])
        reports.append(result.report)
        if not last:
            known = ending(job, result.tensor, places[place + 1][1], run)
    frames = frames_of(places[1][1])
    note = f"{len(places)} windows, one after the other: each continues the last {frames} frames of the one before"
    return Result(torch.cat(parts, dim=2), joined(reports, Information(note)))


def window_of(job: SampleJob, place: int, start: int, known: dict[str, torch.Tensor], last: bool) -> SampleJob:
    """Returns the job of a window.

    Args:
        job: of the video.
        place: number of the window.
        start: its first latent frame.
        known: its start image, and after the first window the frames that it begins with.
        last: whether it ends the video, with the end image if there is one.
    """
    length = latent_frames_of(job.windows.frames)
    own = {
        name: value if value is None else value[:, :, start : start + length].contiguous()
        for name, value in ((name, getattr(job, name)) for name in ("latent", "noise", "controlnet_videos"))
    }
    return replace(
        job,
        **own,
        **known,
        end_image=job.end_image if last else None,
        windows=None if job.riflex == "off" else job.windows,
        seed=(job.seed + place) % (MAX_SEED + 1),
    )


def ending(job: SampleJob, latent: torch.Tensor, kept: int, run: Run) -> dict[str, torch.Tensor]:
    """Returns the last frames of a window as those that the next one begins with, and the first of them as its start image.

    Args:
        job: of the video.
        latent: of the window.
        kept: number of latent frames.
        run: runs the jobs of the VAE.
    """
    videos = run(DecodeJob(job.model, latent)).tensor[:, -frames_of(kept) :]
    encoded = {"image": [video[:1] for video in videos], "kept": list(videos)}
    return {
        name: torch.cat([run(EncodeJob(job.model, pixels.contiguous())).tensor for pixels in each])
        for name, each in encoded.items()
    }


def joined(reports: list[Report], *notes: str) -> Report:
    """Returns the report of all windows, or other parts of a job, together, with notes."""
    own = (line for report in reports for line in report.notes if not line.endswith(WHOLE))  # said of each window's job
    return replace(
        reports[0],
        load_seconds=sum(report.load_seconds for report in reports),
        run_seconds=sum(report.run_seconds for report in reports),
        step_seconds=tuple(seconds for report in reports for seconds in report.step_seconds),
        peak_memory=tuple(map(max, zip(*(report.peak_memory for report in reports)))),
        notes=tuple(dict.fromkeys([*notes, *own])),
    )
