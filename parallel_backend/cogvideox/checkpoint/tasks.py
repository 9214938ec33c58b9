"""The task that a checkpoint was trained for: what it makes a video from, and what that was concluded from."""

from typing import Any

from ...errors import RequestError

TASKS = {
    "text": "text to video",
    "image": "image to video",
    "control": "control video to video",
    "inpaint": "inpainting, first and last frame",
    "removal": "object removal",
}
"""What a checkpoint makes a video from, and its name in messages."""
INTERPOLATION_PIPELINE = "CogVideoXInterpolationPipeline"
"""Of CogvideoX-Interpolation, which makes a video between two images."""
IMAGE_PIPELINES = ("CogVideoXImageToVideoPipeline", INTERPOLATION_PIPELINE)
"""They distinguish image to video from control if the transformer of 32 channels does not."""


def possible(channels: int, in_channels: int) -> tuple[str, ...]:
    """Returns the tasks of published models with these channels of noise and of input; none if the numbers are unknown."""
    by_channels = {
        channels: ("text",),
        2 * channels: ("image", "control"),
        2 * channels + 1: ("inpaint",),
        3 * channels: ("removal",),
    }
    return by_channels.get(in_channels, ())


def infer(tasks: tuple[str, ...], transformer: dict[str, Any], pipeline: str | None) -> tuple[str | None, str]:
    """Returns the task and the reason for it, in a few words.

    Published models: 16 channels are noise only. 33 are VideoX-Fun's InP (noise, mask, masked video). 48 are VOID (noise, encoded mask,
    video). 32 are noise and either a start image (5b-I2V has learned positions, 1.5-5B-I2V an ``ofs`` embedding) or a control video
    (Fun Control and Pose, which have neither: VideoX-Fun's issue 176). Other models of 32 channels, such as a start-image finetune of 2b, are identified by the pipeline
    in ``model_index.json``. A folder without that file, such as the CogVideoX wrapper's, and a single file are taken for a control model.

    Args:
        tasks: from :func:`possible`.
        transformer: its configuration.
        pipeline: the pipeline class in ``model_index.json``; None without that file.
    """
    channels = f"{transformer.get('in_channels', 16)} channels in"
    if len(tasks) < 2:
        return (tasks[0] if tasks else None), channels
    if transformer.get("use_learned_positional_embeddings"):
        return "image", f"{channels} and learned positions"
    if transformer.get("ofs_embed_dim"):
        return "image", f"{channels} and an ofs embedding"
    if pipeline in IMAGE_PIPELINES:
        return "image", f"{channels} and {pipeline} in model_index.json"
    return "control", f"{channels} with neither learned positions nor an ofs embedding"


def check(name: str, asked: str, tasks: tuple[str, ...], in_channels: int) -> None:
    """Raises RequestError unless a checkpoint's channels allow the task that the user asks for."""
    if asked != "auto" and asked not in tasks:
        allowed = " or ".join((*tasks, "auto"))
        raise RequestError(f"task is '{asked}', but {name} has {in_channels} channels in: use {allowed}")
