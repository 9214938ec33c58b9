"""Checks of the values that other nodes and scripts pass to a node's inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy_api.latest import io

from ..parallel_backend.errors import RequestError
from ..parallel_backend.media.pictures import check_finite, checked_latent, checked_mask, checked_pictures
from ..parallel_backend.validation import between, check_size
from .comfy.types import BackendHandle, BackendSocket, ControlNetHandle, ControlNetSocket, ModelHandle, ModelSocket


def checked(value: Any, declared: io.Input) -> Any:
    """Checks a value against its input, and converts it if its meaning is clear.

    Args:
        value: as it was passed.
        declared: the input in the node's schema.
    Returns:
        The value for the node.
    Raises:
        RequestError: naming the input, what was given and what is allowed.
    """
    check = CHECKS.get(declared.io_type)
    return check(value, declared) if check else value


def label(declared: io.Input) -> str:
    """Returns an input's name as the node shows it, which is the core's for the same thing. ComfyUI 0.3.64 shows the id."""
    return declared.display_name or declared.id


def number(value: Any, declared: io.Input) -> int | float:
    """Checks a number against the input's limits. Also accepts a number as text, and a tensor or array with one element."""
    try:
        value = value.item() if hasattr(value, "item") else value
        whole = isinstance(value, int) or isinstance(value, str) and value.strip().isdigit()
        found = int(value) if whole else float(value)  # a float would round a seed of 64 bits
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(f"{label(declared)} is {shown(value)}; it must be a number") from None
    between(label(declared), found, declared.min, declared.max)
    return found


def whole_number(value: Any, declared: io.Input) -> int:
    """Checks a whole number against the input's limits. Also accepts a float without a fraction."""
    found = number(value, declared)
    if found != int(found):
        raise RequestError(f"{label(declared)} is {found}; it must be a whole number, such as {round(found)}")
    return int(found)


def text(value: Any, declared: io.Input) -> str:
    """Checks text. Also accepts a number."""
    if isinstance(value, str | int | float):
        return str(value)
    raise RequestError(f"{label(declared)} is {shown(value)}; it must be text")


def switch(value: Any, declared: io.Input) -> bool:
    """Checks True or False. Also accepts 1 and 0."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RequestError(f"{label(declared)} is {shown(value)}; it must be True or False")


def latent(value: Any, declared: io.Input) -> dict:
    """Checks the core's latent."""
    if not isinstance(value, dict) or "samples" not in value:
        raise RequestError(f"{label(declared)} is {shown(value)}; connect a latent, such as that of Empty CogVideoX Latent")
    return {**value, "samples": checked_latent(value["samples"], label(declared))}


def conditioning(value: Any, declared: io.Input) -> list:
    """Checks the core's conditioning. Refuses the CogVideoX wrapper's, which has the same socket name."""
    name = label(declared)
    if isinstance(value, torch.Tensor):
        raise RequestError(
            f"{name} comes from the CogVideoX wrapper, whose conditioning is a bare tensor; "
            "use CLIP Text Encode with Load CogVideoX or the core's CLIPLoader (type cogvideox)"
        )
    if not isinstance(value, list | tuple) or not all(is_entry(entry) for entry in value):
        raise RequestError(f"{name} is {shown(value)}; connect CLIP Text Encode (Prompt)")
    if not value:
        raise RequestError(f"{name} has no prompt; use CLIP Text Encode")
    for states, _ in value:
        check_finite(states, name)
    return value


def is_entry(entry: Any) -> bool:
    """Returns whether it is a pair of text states and a dictionary of options."""
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and isinstance(entry[0], torch.Tensor)
        and isinstance(entry[1], dict)
    )


def checked_vae(value: Any, declared: io.Input) -> Any:
    """Checks for this pack's or the core's VAE. Refuses the CogVideoX wrapper's, which has the same socket name."""
    if not hasattr(value, "decode_tiled"):
        raise RequestError("this VAE comes from the CogVideoX wrapper; use Load CogVideoX or the core's VAELoader")
    return value


def noise(value: Any, declared: io.Input) -> Any:
    """Checks the core's noise, an object that makes it for a latent."""
    if not hasattr(value, "generate_noise"):
        raise RequestError(
            f"{label(declared)} is {shown(value)}; connect the core's RandomNoise or another node that makes noise"
        )
    return value


def handle(kind: type, source: str) -> Callable[[Any, io.Input], Any]:
    """Returns the check for one of the pack's own sockets."""

    def check(value: Any, declared: io.Input) -> Any:
        if not isinstance(value, kind):
            raise RequestError(f"{label(declared)} is {shown(value)}; connect {source}")
        return value

    return check


def check_video_size(given: Mapping[str, Any]) -> None:
    """Checks the size among a node's inputs, if it has one. The message has the names of the inputs."""
    if {"width", "height", "length"} <= given.keys():
        names = {"frames": "length", "batch": "batch_size"}
        check_size(given["width"], given["height"], given["length"], given.get("batch_size", 1), names=names)


def shown(value: Any) -> str:
    """Describes a value briefly."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, str | int | float):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


CHECKS: dict[str, Callable[[Any, Any], Any]] = {
    io.Int.io_type: whole_number,
    io.Float.io_type: number,
    io.String.io_type: text,
    io.Combo.io_type: text,
    io.Boolean.io_type: switch,
    io.Image.io_type: lambda value, declared: checked_pictures(value, label(declared)),
    io.Mask.io_type: lambda value, declared: checked_mask(value, label(declared)),
    io.Latent.io_type: latent,
    io.Conditioning.io_type: conditioning,
    io.Vae.io_type: checked_vae,
    io.Noise.io_type: noise,
    ModelSocket.io_type: handle(ModelHandle, "Load CogVideoX"),
    BackendSocket.io_type: handle(BackendHandle, "xDiT Backend"),
    ControlNetSocket.io_type: handle(ControlNetHandle, "Load CogVideoX ControlNet"),
}
"""The check for each type of input."""
