"""Messages of the group's socket as bytes: safetensors, with everything that is no tensor as JSON in the metadata."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

VERSION = 1
MAX_MESSAGE = 4 * 2**30
"""Bytes; a video of 161 frames at 1360x768 as float32 pixels is 2 GB."""
MAX_HEADER = 2**20


class ProtocolError(ValueError):
    """Bytes that are no message of this version."""


@dataclass(frozen=True)
class Message:
    """One message.

    Requests are ``sample``, ``decode``, ``encode``, ``status``, ``free``, ``stop`` and, while a job runs,
    ``cancel``. Answers are ``step``, ``kept``, ``done``, ``failed`` and ``cancelled``.
    """

    kind: str
    plain: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def encode(message: Message) -> bytes:
    """The bytes of a message; tensors are copied, so that aliases and views may be sent."""
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in message.tensors.items()
    }
    head = {"version": VERSION, "kind": message.kind, "plain": message.plain}
    return save(tensors, metadata={"message": json.dumps(head)})


def decode(data: bytes) -> Message:
    """The message of some bytes.

    Raises:
        ProtocolError: when they are none, or of another version.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > min(MAX_HEADER, len(data) - 8):
            raise ProtocolError(f"a header of {length} bytes in a message of {len(data)}")
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["message"])
        version, kind, plain = head["version"], head["kind"], head["plain"]
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of the protocol and this side {VERSION}; "
            "install the same version of the pack on both sides, and start the group again"
        )
    try:
        return Message(str(kind), dict(plain), load(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error
