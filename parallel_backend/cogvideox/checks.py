"""What a checkpoint cannot do, said in one line before anything is loaded."""

from ..errors import RequestError
from ..jobs import DecodeJob, EncodeJob, Job, SampleJob
from .checkpoint import SPATIAL, TEMPORAL, Checkpoint
from .lora import open_all
from .windows import Layout

TEXT_MODELS = "CogVideoX-2b, CogVideoX-5b or CogVideoX1.5-5B"
IMAGE_MODELS = "CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V"


def check(checkpoint: Checkpoint, job: Job) -> None:
    """Refuses what a checkpoint cannot do, before anything is loaded.

    Raises:
        RequestError: naming what was given and what fits.
    """
    if not isinstance(job, SampleJob):
        checkpoint.check_vae()
    if isinstance(job, EncodeJob):
        return
    name = checkpoint.path.name
    if job.latent.shape[1] != checkpoint.channels:
        raise RequestError(
            f"the latent has {job.latent.shape[1]} channels; {name} takes {checkpoint.channels}: use Empty CogVideoX Latent"
        )
    if isinstance(job, DecodeJob):
        return
    check_sample(checkpoint, job)


def check_sample(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Task, LoRAs, size, frames and text."""
    name = checkpoint.path.name
    check_task(checkpoint, job)
    open_all(job.model.loras, checkpoint)
    check_positions(checkpoint, *job.latent.shape[3:])
    check_windows(checkpoint, job)
    frames = job.latent.shape[2]
    if job.denoise < 1 and (padding := checkpoint.padding_frames(frames)):
        raise RequestError(
            f"denoise below 1 with {name} needs a multiple of {checkpoint.patch_size_t} latent frames and the video has "
            f"{frames}: use {(frames + padding - 1) * TEMPORAL + 1} frames"
        )
    for side in ("positive", "negative"):
        text = getattr(job, side)
        if text is None:
            continue
        if text.shape[2] != checkpoint.text_features:
            raise RequestError(
                f"{side} conditioning has {text.shape[2]} features; {name} takes {checkpoint.text_features}: "
                "use this checkpoint's CLIP, or the core's CLIPLoader with type cogvideox"
            )
        if text.shape[1] != checkpoint.text_tokens:
            raise RequestError(
                f"{side} conditioning has {text.shape[1]} tokens; {name} takes {checkpoint.text_tokens}: "
                "use this checkpoint's CLIP, or the core's CLIPLoader with type cogvideox"
            )


def check_task(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Whether what is given fits what the model makes videos from."""
    name = checkpoint.path.name
    if not checkpoint.is_known:
        raise RequestError(
            f"{name} takes {checkpoint.in_channels} channels, which is not supported yet; "
            f"use a text-to-video ({TEXT_MODELS}) or image-to-video model ({IMAGE_MODELS})"
        )
    if job.image is not None and not checkpoint.takes_image:
        raise RequestError(
            f"{name} makes videos from text alone; for a start image use an image-to-video model, such as {IMAGE_MODELS}"
        )
    if job.image is None and checkpoint.takes_image:
        raise RequestError(
            f"{name} needs a start image (CogVideoX Image To Video, or --image); "
            f"from text alone use a text-to-video model, such as {TEXT_MODELS}"
        )


def check_positions(checkpoint: Checkpoint, height: int, width: int) -> None:
    """CogVideoX 1.5 cuts its positions from a table; 1.0 stretches them, but those that 5b-I2V has learned."""
    name, (most_width, most_height) = checkpoint.path.name, checkpoint.positions_size
    width, height = width * SPATIAL, height * SPATIAL
    if checkpoint.learned_positions and (width, height) != (most_width, most_height):
        raise RequestError(
            f"{name} has learned positions for {most_width}x{most_height} alone and the video is "
            f"{width}x{height}; use {most_width}x{most_height}"
        )
    if checkpoint.patch_size_t and (width > most_width or height > most_height):
        raise RequestError(
            f"{name} has positions up to {most_width}x{most_height}; {width}x{height} is larger: use a smaller size"
        )


def check_windows(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Whether a video's windows advance in this model's tokens, and whether each of them can be told what the first is."""
    layout = Layout.of(job, checkpoint)
    if layout.is_whole:
        return
    if layout.stride < 1:
        raise RequestError(
            f"windows of {job.windows.frames} frames that overlap by {job.windows.overlap} do not advance with "
            f"{checkpoint.path.name}, whose tokens are {layout.token * TEMPORAL} frames; use longer windows, or less overlap"
        )
    if job.image is not None:
        raise RequestError(
            "context windows with a start image are not supported, as only the first window would see it: use a text-to-video "
            f"model ({TEXT_MODELS}), from text or a video, or at most {job.windows.frames} frames"
        )
