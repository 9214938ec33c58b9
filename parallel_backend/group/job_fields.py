"""Converts jobs to plain JSON values and tensors, and back, for the socket."""

from dataclasses import asdict, fields
from typing import Any

import torch

from ..errors import RequestError
from ..jobs import JOBS, Job, Progress
from ..model import ControlNet, Lora, Model, Windows


def split_fields(record: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Splits a request, or a part of one, into plain JSON values and tensors. Fields with their default are left out."""
    plain: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, torch.Tensor):
            tensors[item.name] = value
        elif isinstance(value, Model):
            plain[item.name] = split_plain(value)
        elif isinstance(value, Progress):
            plain[item.name], inner = split_fields(value)
            tensors |= {f"{item.name}.{name}": tensor for name, tensor in inner.items()}
        elif isinstance(value, Windows):
            plain[item.name] = split_plain(value)
        elif item.name == "controlnets":
            plain |= {item.name: [asdict(net) for net in value]} if value else {}
        elif value != item.default:  # so an older version that lacks the field understands the message
            plain[item.name] = value
    return plain, tensors


def split_plain(record: Model | Windows) -> dict[str, Any]:
    """Converts a model or windows to plain JSON values. Fields with their default are left out."""
    defaults = {item.name: item.default for item in fields(record)}
    return {name: value for name, value in asdict(record).items() if value != defaults[name]}


def join_model(plain: dict[str, Any]) -> Model:
    """Rebuilds and validates the model that :func:`split_plain` converted."""
    if not isinstance(plain, dict):
        raise TypeError(f"a model is not {plain!r}")
    return Model(**{**plain, "loras": tuple(Lora(**lora) for lora in plain.get("loras", ()))})


def join_fields(kind: str, plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Job:
    """Rebuilds and validates the request that :func:`split_fields` split.

    Raises:
        RequestError: for an unknown kind or unknown fields.
    """
    if kind not in JOBS:
        raise RequestError(f"job kind is '{kind}'; use one of {', '.join(JOBS)}")
    try:
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        values = {**plain, **tensors, "model": join_model(plain["model"])}
        if "progress" in plain:
            names = [name for name in tensors if name.startswith("progress.")]
            inner = {name.removeprefix("progress."): values.pop(name) for name in names}
            values["progress"] = Progress(**plain["progress"], **inner)
        if "windows" in plain:
            values["windows"] = Windows(**plain["windows"])
        if "controlnets" in plain:
            values["controlnets"] = tuple(ControlNet(**net) for net in plain["controlnets"])
        return JOBS[kind](**values)
    except (KeyError, TypeError) as error:
        raise RequestError(f"a {kind} job does not fit: {error}") from error
