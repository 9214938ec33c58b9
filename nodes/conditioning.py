"""Empty latents, and the core's conditioning as the text states and conditions of a job."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import node_helpers
import torch
from comfy_api.latest import io

from ..parallel_backend.errors import RequestError
from ..parallel_backend.jobs import empty_latent
from ..parallel_backend.model import ControlNet
from ..parallel_backend.validation import CHANNELS
from .base import CogVideoXNode, schema
from .comfy.types import CATEGORY

CONCAT, CONCAT_MASK = "concat_latent_image", "concat_mask"
"""The core's keys in a conditioning for a latent that is concatenated to the noise, and for the mask of what is replaced."""
IMAGE, CONTROL, CONTROLNETS = "cogvideox_image", "cogvideox_control", "cogvideox_controlnets"
"""This pack's keys for fields of a job that go with an image, for those that a control video sets, and for a tuple of
:class:`ControlInput`."""
START, END = "start_percent", "end_percent"
"""The core's keys for the range of steps of a prompt, as shares of all steps."""
USED = {"pooled_output", CONCAT, CONCAT_MASK, IMAGE, CONTROL, CONTROLNETS, START, END}
"""Keys without a warning: all that the sampler reads, and the pooled output, which T5 does not have."""


def size_inputs() -> list:
    """Returns inputs for the width, height, length and batch size of a video."""
    larger = "in pixels, a multiple of 16. Larger videos take more time and memory."
    return [
        io.Int.Input("width", default=720, min=16, max=4096, step=16, tooltip=f"Width of the video {larger}"),
        io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip=f"Height of the video {larger}"),
        io.Int.Input(
            "length",
            default=49,
            min=1,
            max=1025,
            step=4,
            tooltip="Frames of the video, 4k+1. CogVideoX 1.0 was trained with 49 (8 fps), 1.5 with 81 or 161 (16 fps). More "
            "frames take more time and memory.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Number of videos that are made together. Time and memory grow with it; replicasN in the plan shares them.",
        ),
    ]


class EmptyCogVideoXLatent(CogVideoXNode):
    """Makes a latent of zeros, which sets the size of a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTEmptyCogVideoXLatent",
            display_name="Empty CogVideoX Latent",
            aliases="empty latent video, t2v, text to video, size",
            category=CATEGORY,
            description="Sets the size of a video that is made from text alone.",
            inputs=size_inputs(),
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput({"samples": empty_latent(width=width, height=height, frames=length, batch=batch_size)})


def with_values(positive, negative, values: dict) -> tuple:
    """Adds values to the conditioning of both prompts."""
    return tuple(node_helpers.conditioning_set_values(prompt, values) for prompt in (positive, negative))


@dataclass(frozen=True, eq=False)
class ControlInput:
    """A ControlNet and its encoded control video."""

    net: ControlNet
    video: torch.Tensor


def with_controlnet(conditioning, net: ControlNet, video: torch.Tensor) -> list:
    """Adds a ControlNet to the conditioning of a prompt, after those that it has."""
    added = ControlInput(net, video)
    return [[states, {**options, CONTROLNETS: (*options.get(CONTROLNETS, ()), added)}] for states, options in conditioning]


def controlnet_fields(given: tuple[ControlInput, ...]) -> dict:
    """Returns ControlNets as fields of a sampling job.

    Raises:
        RequestError: if their videos have different sizes.
    """
    if not given:
        return {}
    if len({one.video.shape[2:] for one in given}) > 1:
        raise RequestError(
            "the control videos of several ControlNets have different sizes or lengths; connect the latent of each Apply CogVideoX "
            "ControlNet to the next one, and give the shortest video first"
        )
    return {"controlnets": tuple(one.net for one in given), "controlnet_videos": torch.cat([one.video for one in given], dim=1)}


def conditions_of(conditioning, name: str, say: Callable[[str], None]) -> dict:
    """Returns the images and videos of a conditioning as fields of a sampling job; see :func:`text_fields`."""
    carried = [options for _, options in conditioning if {CONCAT, CONTROL, CONTROLNETS} & options.keys()]
    if not carried:
        return {}
    options = carried[0]
    nets = options.get(CONTROLNETS, ())
    if any(other.get(key) is not options.get(key) for other in carried for key in (CONCAT, CONTROL)) or any(
        other.get(CONTROLNETS, ()) != nets for other in carried
    ):
        say(f"the prompts of {name} carry different images or videos; those of the first are used")
    fields = options.get(CONTROL, {}) | controlnet_fields(nets)
    if CONCAT not in options:
        return fields
    fields, latent = fields | options.get(IMAGE, {}), options[CONCAT]
    if CONCAT_MASK in options:
        return {**fields, "masked_video": latent, "mask": options[CONCAT_MASK]}
    if latent.shape[1:2] == (2 * CHANNELS,):  # for object removal: the mask, encoded, and the video
        return {**fields, "mask": latent[:, :CHANNELS], "masked_video": latent[:, CHANNELS:]}
    return {**fields, "image": latent}


def text_fields(conditioning, name: str, *, limit: int, say: Callable[[str], None]) -> dict:
    """Returns the text states of a conditioning as fields of a sampling job: one prompt, or several in turn.

    Args:
        conditioning: the core's, ``[[states, options], …]``. The options may contain the steps' range of a prompt, as set by
            Conditioning Set Timestep Range.
        name: of the input and of the field.
        limit: number of tokens that the model takes.
        say: called with a warning for everything that is not used.
    Raises:
        RequestError: for prompts of different shapes.
    """
    turns, lines = turns_of([(options.get(START, 0.0), options.get(END, 1.0)) for _, options in conditioning])
    for line in lines:
        say(f"{name}: {line}")
    used = [conditioning[number] for number in turns.values()]
    if ignored := sorted({option for _, options in used for option in options} - USED):
        say(f"{name} carries {', '.join(ignored)}, which CogVideoX does not use")
    longest = max(states.shape[1] for states, _ in used)
    if longest > limit:
        say(f"{name} has {longest} tokens; the model takes {limit}, the rest is cut off")
    prompts = [states[:, :limit] for states, _ in used]
    if len(prompts) == 1:
        return {name: prompts[0]}
    if len({prompt.shape[1:] for prompt in prompts}) > 1 or len({len(prompt) for prompt in prompts} - {1}) > 1:
        shapes = ", ".join(str(tuple(prompt.shape)) for prompt in prompts)
        raise RequestError(
            f"the prompts of {name} have shapes {shapes}; they must be equal: encode all of them with the model's CLIP"
        )
    return {name: torch.stack(torch.broadcast_tensors(*prompts), dim=1), f"{name}_starts": tuple(turns)}


def turns_of(ranges: list[tuple[float, float]]) -> tuple[dict[float, int], list[str]]:
    """Decides which prompt each part of the steps uses.

    Args:
        ranges: start and end of each prompt, as shares of the steps.
    Returns:
        The number of the prompt, by the share of the steps at which it starts; and a warning for each deviation from the
        ranges.
    """
    edges = sorted({0.0, *(edge for both in ranges for edge in both if 0 < edge < 1)})
    spans = list(pairwise((*edges, 1.0)))
    holding = [
        [number for number, (first, last) in enumerate(ranges) if first <= start and end <= last] for start, end in spans
    ]
    number = next((numbers[0] for numbers in holding if numbers), 0)
    turns: dict[float, int] = {}
    for (start, _), numbers in zip(spans, holding):
        before, number = number, numbers[0] if numbers else number
        if not turns or number != before:
            turns[start] = number
    lines = []
    if several := [span for span, numbers in zip(spans, holding) if len(numbers) > 1]:
        lines.append(f"several prompts are set for {shown(several)} of the steps; the first of them is used")
    if none := [span for span, numbers in zip(spans, holding) if not numbers]:
        lines.append(
            f"no prompt is set for {shown(none)} of the steps; the previous one continues, or the first one starts earlier"
        )
    if unused := sorted(set(range(len(ranges))) - set(turns.values())):
        lines.append(f"prompt {', '.join(str(number + 1) for number in unused)} of {len(ranges)} is not used")
    return turns, lines


def shown(spans: list[tuple[float, float]]) -> str:
    """Returns spans as text in percent. Adjacent spans are joined."""
    joined: list[list[float]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return ", ".join(f"{100 * start:.4g} to {100 * end:.4g} %" for start, end in joined)
