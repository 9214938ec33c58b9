"""Refuses jobs that a checkpoint cannot do, with a one-line message, before anything is loaded."""

from dataclasses import replace

import torch

from ...errors import RequestError
from ...jobs import DecodeJob, EncodeJob, Job, SampleJob, UpscaleJob, WindowJob
from ...model import ATTENTIONS
from ...plan import Plan
from ..attention import registry
from ..checkpoint import controlnet
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compression import SPATIAL, TEMPORAL, frames_of, latent_frames_of
from ..transformer.lora import open_all
from .upscaling import latent_shape
from .windows import Layout

TEXT_MODELS = "CogVideoX-2b, CogVideoX-5b or CogVideoX1.5-5B"
IMAGE_MODELS = "CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V"
CONTROL_MODELS = "CogVideoX-Fun-V1.1-5b-Control or CogVideoX-Fun-V1.1-5b-Pose"
INPAINT_MODELS = "CogVideoX-Fun-V1.1-5b-InP or CogVideoX-Fun-V1.5-5b-InP"
REMOVAL_MODELS = "VOID"
UPSCALERS = "DOVE, or SparkVSR without reference frames"
MAKES = {
    "text": "makes videos from text alone",
    "image": "makes videos from a start image",
    "control": "makes videos from a control video",
    "inpaint": "makes what is missing of a video",
    "removal": "removes objects from a video",
}
"""What a checkpoint of each task does; messages put its name in front."""
CONDITIONS = {
    "image": ("image", f"for a start image use an image-to-video model, such as {IMAGE_MODELS}"),
    "control": ("control", f"for a control video use a control model, such as {CONTROL_MODELS}"),
    "inpaint": ("mask", f"for an end image or a mask use an inpaint model, such as {INPAINT_MODELS}"),
    "removal": ("mask", f"to remove an object use an object removal model, such as {REMOVAL_MODELS}"),
}
"""By task: the job's field that only its models take, and advice naming those models."""


def check(checkpoint: Checkpoint, job: Job) -> None:
    """Checks a job against a checkpoint.

    Raises:
        RequestError: if the checkpoint cannot do the job; the message says what was given and what is supported.
    """
    if isinstance(job, WindowJob):
        check_window(checkpoint, job)
        return
    if isinstance(job, UpscaleJob):
        return check_upscale(checkpoint, job)
    if not isinstance(job, SampleJob):
        checkpoint.check_vae()
    if isinstance(job, EncodeJob):
        return
    name = checkpoint.name
    if job.latent.shape[1] != checkpoint.channels:
        raise RequestError(
            f"the latent has {job.latent.shape[1]} channels; {name} takes {checkpoint.channels}: use Empty CogVideoX Latent"
        )
    if isinstance(job, DecodeJob):
        return
    check_sample(checkpoint, job)


def check_plan(checkpoint: Checkpoint, plan: Plan, job: Job) -> None:
    """Checks that a plan can do a checkpoint's job.

    Raises:
        RequestError: if it cannot; the message names the nearest plan or setting that works.
    """
    plan.check_heads(checkpoint.heads)
    plan.check_layers(checkpoint.layers)
    if not isinstance(job, SampleJob | UpscaleJob):
        return
    plan.check_offload(job.model.offload)
    check_ring(plan, job.model.attention)
    if plan.pipefusion == 1:
        return
    other = plan.without_pipefusion
    if isinstance(job, UpscaleJob):
        raise RequestError(f"plan '{plan}': a tile takes one forward pass, and a pipeline needs several; use plan '{other}'")
    if job.controlnets:
        raise RequestError(
            f"plan '{plan}': a ControlNet's blocks run beside the model's first ones, and a pipeline's stages would each need the "
            f"ControlNet's tokens of the stage before; use plan '{other}'"
        )
    if job.model.step_cache:
        raise RequestError(
            f"plan '{plan}': a step cache decides after the first block, when other stages are running already; "
            f"use step_cache 0, or plan '{other}'"
        )
    if job.model.guidance_cache:
        raise RequestError(
            f"plan '{plan}': each stage keeps keys and values of both prompts, and a guidance cache spares one of them; "
            f"use guidance_cache 0, or plan '{other}'"
        )
    if job.windows is not None and job.windows.schedule == "uniform" and not Layout.of(job, checkpoint).is_whole:
        raise RequestError(
            f"plan '{plan}': windows of the schedule 'uniform' move, so there are no keys and values of the previous step to "
            f"reuse; use the schedule 'static', or plan '{other}'"
        )


def check_ring(plan: Plan, attention: str) -> None:
    """Raises RequestError if a plan has a ring and the user's attention function does not return the log-sum-exp."""
    if plan.ring == 1 or registry.can_ring(attention):
        return
    able = ", ".join(name for name in ATTENTIONS if registry.can_ring(name))
    other = replace(plan, ulysses=plan.sequence, ring=1)
    raise RequestError(
        f"plan '{plan}': a ring adds up results by their log-sum-exp, which attention '{attention}' does not give; "
        f"use attention {able}, or plan '{other}'"
    )


def check_window(checkpoint: Checkpoint, job: WindowJob) -> None:
    """Raises RequestError if a window of another rank's job is for a different checkpoint."""
    _, frames, channels, _, _ = job.seen.shape
    wanted = checkpoint.in_channels + sum(file.channels for file in controlnet.open_all(job.controlnets, checkpoint))
    if channels != wanted or checkpoint.padding_frames(frames):
        raise RequestError(
            f"a window has {channels} channels and {frames} frames; {checkpoint.name} takes {wanted} channels "
            f"and a multiple of {checkpoint.patch_size_t or 1} frames"
        )


def check_sample(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Checks a job's task, LoRAs, ControlNets, size, frames and text states."""
    check_task(checkpoint, job)
    open_all(job.model.loras, checkpoint)
    check_controlnets(checkpoint, job)
    check_positions(checkpoint, *job.latent.shape[3:])
    check_windows(checkpoint, job)
    check_padding(checkpoint, job)
    check_text(checkpoint, "positive", job.positive)
    if job.negative is not None:
        check_text(checkpoint, "negative", job.negative)


def check_text(checkpoint: Checkpoint, side: str, text: torch.Tensor) -> None:
    """Raises RequestError unless text states have the features and the tokens that the model takes."""
    taken = {"features": (text.shape[-1], checkpoint.text_features), "tokens": (text.shape[-2], checkpoint.text_tokens)}
    for what, (given, wanted) in taken.items():
        if given != wanted:
            raise RequestError(
                f"{side} conditioning has {given} {what}; {checkpoint.name} takes {wanted}: "
                "use this checkpoint's CLIP, or the core's CLIPLoader with type cogvideox"
            )


def check_upscale(checkpoint: Checkpoint, job: UpscaleJob) -> None:
    """Raises RequestError unless a model can have been trained to enlarge videos, and positions reach to the end of a tile."""
    if checkpoint.task not in ("text", "image") or not checkpoint.patch_size_t:
        what = MAKES.get(checkpoint.task, "is not known") if checkpoint.patch_size_t else "has the shape of CogVideoX 1.0"
        raise RequestError(f"{checkpoint.name} {what}; to enlarge a video use {UPSCALERS}")
    if "vae" not in checkpoint.elements:
        raise RequestError(f"{checkpoint.name} has no VAE of its own, which enlarging a tile needs; use a folder with one")
    open_all(job.model.loras, checkpoint)
    check_positions(checkpoint, *latent_shape(job)[3:])
    check_text(checkpoint, "positive", job.positive)


def check_controlnets(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Raises RequestError unless a job's ControlNets were made for models of this shape, and encoded their control videos."""
    wanted = [file.channels for file in controlnet.open_all(job.controlnets, checkpoint)]
    if wanted and job.controlnet_videos.shape[1] != sum(wanted):
        raise RequestError(
            f"the ControlNets' videos have {job.controlnet_videos.shape[1]} channels and the ControlNets take "
            f"{' + '.join(map(str, wanted))}; use Apply CogVideoX ControlNet"
        )


def check_end_image(checkpoint: Checkpoint, *, has_start: bool) -> None:
    """Raises RequestError unless the model's task allows an end image."""
    if checkpoint.task not in ("image", "inpaint"):
        raise RequestError(f"{checkpoint.name} takes no end image; {CONDITIONS['inpaint'][1]}")
    if checkpoint.task == "image" and not has_start:
        raise RequestError(f"{checkpoint.name} needs a start image with the end image; {CONDITIONS['inpaint'][1]}")


def check_task(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Raises RequestError unless the job's conditions are those that the model takes."""
    name = checkpoint.name
    if checkpoint.task is None:
        raise RequestError(
            f"{name} takes {checkpoint.in_channels} channels, which is not supported yet; use a text-to-video ({TEXT_MODELS}), "
            f"image-to-video ({IMAGE_MODELS}), control ({CONTROL_MODELS}), inpaint ({INPAINT_MODELS}) or object removal model "
            f"({REMOVAL_MODELS})"
        )
    if checkpoint.task == "inpaint" and job.image is not None:
        raise RequestError(
            f"{name} takes a start image as a masked video, and this one was encoded for an image-to-video model; "
            "give CogVideoX Image To Video the VAE of this checkpoint"
        )
    for task, (given, who_takes_it) in CONDITIONS.items():
        if not takes(checkpoint, given) and getattr(job, given) is not None:
            choice = f"; if {name} is one, set task to {task}" if task in checkpoint.possible_tasks else ""
            if (checkpoint.task, task) == ("image", "inpaint"):
                choice = f"; or, for frame interpolation, give CogVideoX Image To Video {name} or its VAE"
            raise RequestError(f"{name} {MAKES[checkpoint.task]}; {who_takes_it}{choice}")
    if job.image is None and checkpoint.task == "image":
        raise RequestError(
            f"{name} needs a start image (CogVideoX Image To Video, or --image); "
            f"from text alone use a text-to-video model, such as {TEXT_MODELS}"
        )
    if job.control is None and checkpoint.task == "control":
        raise RequestError(
            f"{name} needs a control video (CogVideoX Control To Video, or --control-video); "
            f"from text alone use a text-to-video model, such as {TEXT_MODELS}"
        )
    check_mask(checkpoint, job)


def takes(checkpoint: Checkpoint, given: str) -> bool:
    """Returns whether a model takes the condition in a field of a job."""
    return CONDITIONS.get(checkpoint.task, ("",))[0] == given


def check_mask(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Raises RequestError unless the mask has the form that the model takes: encoded for object removal, else one channel."""
    if job.mask is None:
        if checkpoint.removes:
            raise RequestError(
                f"{checkpoint.name} needs a video and a mask of what to remove (CogVideoX Inpaint, or --video and --mask)"
            )
        return
    if job.mask.shape[1] != checkpoint.in_channels - 2 * checkpoint.channels:
        other = "inpaint" if checkpoint.removes else "object removal"
        raise RequestError(
            f"{checkpoint.name} {MAKES[checkpoint.task]}, and the mask was made for an {other} model; connect this model to CogVideoX "
            "Inpaint, or its VAE"
        )


def check_padding(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Raises RequestError if the frames need padding where none is possible.

    An input latent cannot be padded, nor can conditions for every frame: diffusers' control pipeline refuses them as well, and
    VideoX-Fun, which was trained without padding, shortens the video.
    """
    if not (checkpoint.is_fun or job.denoise < 1):
        return
    who = checkpoint.name if checkpoint.is_fun else f"denoise below 1 with {checkpoint.name}"
    layout = Layout.of(job, checkpoint)
    lengths = {"the video": job.latent.shape[2]}
    if job.image is not None and not layout.is_whole:  # each of these windows is a job of its own
        lengths["a window"] = latent_frames_of(job.windows.frames)
    for what, frames in lengths.items():
        if padding := checkpoint.padding_frames(frames):
            raise RequestError(
                f"{who} needs a multiple of {checkpoint.patch_size_t} latent frames and {what} has "
                f"{frames}: use {frames_of(frames + padding)} frames"
            )


def check_positions(checkpoint: Checkpoint, height: int, width: int) -> None:
    """Raises RequestError if the size exceeds the model's positions.

    CogVideoX 1.5 counts positions from the corner. CogVideoX 1.0 interpolates them, except the learned ones of 5b-I2V.

    Args:
        checkpoint: of the model.
        height, width: in latent rows and columns.
    """
    name, width, height = checkpoint.name, width * SPATIAL, height * SPATIAL
    own_width, own_height = checkpoint.positions_size
    if checkpoint.learned_positions and (width, height) != (own_width, own_height):
        raise RequestError(
            f"{name} has learned positions for {own_width}x{own_height} only and the video is "
            f"{width}x{height}; use {own_width}x{own_height}"
        )
    most_width, most_height = checkpoint.reach
    if checkpoint.patch_size_t and (width > most_width or height > most_height):
        raise RequestError(
            f"{name} has positions up to {most_width}x{most_height}; {width}x{height} is larger: use a smaller size"
        )


def check_windows(checkpoint: Checkpoint, job: SampleJob) -> None:
    """Raises RequestError if windows do not advance by whole tokens, RIFLEx does not apply, or there is no VAE to continue an image."""
    layout = Layout.of(job, checkpoint)
    if job.riflex != "off" and not checkpoint.takes_riflex:
        raise RequestError(
            f"riflex is '{job.riflex}', but {checkpoint.name} is not of CogVideoX-5b's shape, which RIFLEx is for: use 'off'"
        )
    if layout.is_whole:
        return
    if layout.stride < 1:
        raise RequestError(
            f"windows of {job.windows.frames} frames that overlap by {job.windows.overlap} do not advance with "
            f"{checkpoint.name}, whose tokens are {layout.token * TEMPORAL} frames; use longer windows, or less overlap"
        )
    if job.image is not None and "vae" not in checkpoint.elements:
        raise RequestError(
            f"windows from a start image decode and encode frames in between, and {checkpoint.name} has no VAE of its own; use a folder "
            f"with one, or at most {job.windows.frames} frames"
        )
