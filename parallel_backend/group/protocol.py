"""Messages of the group's socket as bytes: safetensors, with everything that is no tensor as JSON in the metadata.

A message goes in two parts, the header and the tensors' bytes, so that the other side can refuse the second before it takes
memory for it.
"""

import json
import math
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

VERSION = 2
MAX_HEADER = 2**20
LATENTS, PIXELS = 2**30, 8 * 2**30
"""Bytes; a video of 161 frames at 1360x768 is 43 MB as latents and 2 GB as float32 pixels."""
MAX_TENSORS = {"sample": LATENTS, "decode": LATENTS, "encode": PIXELS, "kept": LATENTS, "done": PIXELS}
"""Bytes of tensors in a message of each kind; the others have none."""
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
"""Bytes of a value, by the name that safetensors has for its dtype."""
MAX_DIMENSIONS = 6


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


@dataclass(frozen=True)
class Head:
    """What a message says before its tensors."""

    kind: str
    plain: dict[str, Any]
    size: int
    """Bytes of the tensors that follow."""


def read_head(data: bytes) -> Head:
    """The first part of some bytes, checked: length, version, and number, dtypes and shapes of the tensors.

    Raises:
        ProtocolError: when they are no message, of another version, or larger than a message of their kind can be.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > min(MAX_HEADER, len(data) - 8):
            raise ProtocolError(f"a header of {length} bytes in {len(data)}")
        tensors = json.loads(data[8 : 8 + length])
        message = json.loads(tensors.pop("__metadata__")["message"])
        version, kind, plain = message["version"], str(message["kind"]), dict(message["plain"])
        size = sum(checked_size(name, tensor) for name, tensor in tensors.items()) if version == VERSION else 0
    except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of the protocol and this side {VERSION}; "
            "install the same version of the pack on both sides, and start the group again"
        )
    if size > MAX_TENSORS.get(kind, 0):
        raise ProtocolError(f"{size} bytes of tensors; a message '{kind}' has at most {MAX_TENSORS.get(kind, 0)}")
    return Head(kind, plain, size)


def checked_size(name: str, tensor: dict[str, Any]) -> int:
    """Bytes of a tensor as its header has it; ValueError where that does not add up."""
    shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
    if tensor["dtype"] not in ITEM_SIZES or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"'{name}' is {tensor['dtype']} in {len(shape)} dimensions")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"'{name}' has shape {shape}")
    size = math.prod(shape) * ITEM_SIZES[tensor["dtype"]]
    if end - begin != size:
        raise ValueError(f"'{name}' has shape {shape} and {end - begin} bytes")
    return size


def decode(data: bytes) -> Message:
    """The message of some bytes.

    Raises:
        ProtocolError: when they are none, or of another version.
    """
    head = read_head(data)
    try:
        return Message(head.kind, head.plain, load(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error


def send(connection: Connection, message: Message) -> None:
    """Sends a message.

    Raises:
        ProtocolError: when it is larger than the other side would take.
        OSError: when the other side has gone.
    """
    data = encode(message)
    read_head(data)
    length = 8 + int.from_bytes(data[:8], "little")
    connection.send_bytes(data[:length])
    if len(data) > length:
        connection.send_bytes(data, length)


def receive(connection: Connection) -> bytes:
    """The bytes of the next message, whose first part has been checked before the second is read.

    Raises:
        ProtocolError: when they are none; the connection can still be written to.
        EOFError, OSError: when the other side has gone.
    """
    data = receive_part(connection, 8 + MAX_HEADER)
    size = read_head(data).size
    return data + receive_part(connection, size) if size else data


def receive_part(connection: Connection, most: int) -> bytes:
    """The next bytes, unless there are more than ``most``."""
    try:
        return connection.recv_bytes(most)
    except OSError as error:
        if connection.closed or connection.readable:  # it has gone; a part that is too long is what ends only the reading
            raise
        raise ProtocolError(f"a part of a message is longer than {most} bytes; is it from another version?") from error
