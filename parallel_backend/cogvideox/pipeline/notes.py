"""What the user should know of a job before it runs: what was concluded, and what has no effect."""

from ...jobs import SampleJob
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.facts import TEMPORAL
from ..checkpoint.tasks import INTERPOLATION_PIPELINE
from .windows import Layout


def notes(job: SampleJob, checkpoint: Checkpoint) -> list[str]:
    """Returns one line for each thing to know of a job with a checkpoint."""
    return [line for line in (of_windows(job, checkpoint), of_end_image(job, checkpoint)) if line]


def of_windows(job: SampleJob, checkpoint: Checkpoint) -> str | None:
    """Returns a note if the windows have no effect or the video would need some."""
    name, most, frames = checkpoint.name, checkpoint.most_frames, (job.latent.shape[2] - 1) * TEMPORAL + 1
    if job.windows is not None and Layout.of(job, checkpoint).is_whole:
        return f"the video of {frames} frames fits in one window of {job.windows.frames}: it is sampled whole"
    if job.windows is None and job.image is None and frames > most:
        return f"{frames} frames are more than the {most} that {name} was trained for; CogVideoX Context Windows (--window) may help"
    return None


def of_end_image(job: SampleJob, checkpoint: Checkpoint) -> str | None:
    """Returns where an image-to-video model is shown the end image, which not every one was trained for."""
    if job.end_image is None:
        return None
    place = f"{checkpoint.name} is shown the end image in the last latent frame"
    if checkpoint.is_anisora:
        return f"{place}, as AniSora V1 was trained"
    if checkpoint.pipeline == INTERPOLATION_PIPELINE:
        return f"{place}, as {INTERPOLATION_PIPELINE} in its model_index.json asks for"
    return (
        f"{place}, as CogvideoX-Interpolation's weights were trained; they have the shapes of CogVideoX-5b-I2V, which was not, so for "
        "an end image use those weights or an inpaint model"
    )
