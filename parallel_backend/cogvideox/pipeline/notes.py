"""What the user should know of a job before it runs: what was concluded, and what has no effect."""

from ...jobs import SampleJob
from ...notes import Information
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compression import frames_of
from ..checkpoint.tasks import INTERPOLATION_PIPELINE
from ..transformer.positions import riflex_frames, riflex_period
from .windows import Layout

WHOLE = ": it is sampled whole"
"""The end of the note of windows that have no effect."""


def notes(job: SampleJob, checkpoint: Checkpoint) -> list[str]:
    """Returns one line for each thing to know of a job with a checkpoint."""
    lines = (of_windows(job, checkpoint), of_riflex(job, checkpoint), of_end_image(job, checkpoint), of_guidance(job))
    return [line for line in lines if line]


def of_windows(job: SampleJob, checkpoint: Checkpoint) -> str | None:
    """Returns a note if the windows have no effect or the video would need some."""
    name, most, frames = checkpoint.name, checkpoint.most_frames, frames_of(job.latent.shape[2])
    if job.windows is not None and Layout.of(job, checkpoint).is_whole:
        return f"the video of {frames} frames fits in one window of {job.windows.frames}{WHOLE}"
    if job.windows is None and frames > most:
        return f"{frames} frames are more than the {most} that {name} was trained for; CogVideoX Context Windows (--window) may help"
    return None


def of_riflex(job: SampleJob, checkpoint: Checkpoint) -> str | None:
    """Returns what RIFLEx does to a window, if it is on."""
    if job.riflex == "off":
        return None
    frames = Layout.of(job, checkpoint).length
    if stretched := riflex_frames(checkpoint, frames, job.riflex):
        return Information(f"riflex '{job.riflex}': temporal positions are stretched to {frames_of(stretched)} frames")
    return f"riflex has no effect on {frames_of(frames)} frames; it begins after {frames_of(riflex_period(checkpoint))}"


def of_end_image(job: SampleJob, checkpoint: Checkpoint) -> str | None:
    """Returns where an image-to-video model is shown the end image, which not every one was trained for."""
    if job.end_image is None:
        return None
    place = f"{checkpoint.name} is shown the end image in the last latent frame"
    if checkpoint.is_anisora:
        return Information(f"{place}, as AniSora V1 was trained")
    if checkpoint.pipeline == INTERPOLATION_PIPELINE:
        return Information(f"{place}, as {INTERPOLATION_PIPELINE} in its model_index.json asks for")
    return (
        f"{place}, as CogvideoX-Interpolation's weights were trained; they have the shapes of CogVideoX-5b-I2V, which was not, so for "
        "an end image use those weights or an inpaint model"
    )


def of_guidance(job: SampleJob) -> str | None:
    """Returns a note if a guidance cache has nothing to spare."""
    if job.guided or not job.model.guidance_cache:
        return None
    return f"guidance_cache has no effect: cfg is {job.cfg:g}, so no step runs on the negative prompt"
