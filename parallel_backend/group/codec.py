"""Messages of the group's socket as bytes: safetensors, with all that is not a tensor as JSON in the metadata."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

VERSION = 5
MAX_HEADER = 2**20
PICTURE, LATENTS, PIXELS = 2**24, 2**30, 8 * 2**30
"""Limits in bytes. A preview has under 1 MB; 161 frames at 1360x768 are 43 MB as latents and 2 GB as float32 pixels."""
MAX_TENSORS = {
    "sample": LATENTS,
    "load": LATENTS,
    "window": LATENTS,
    "decode": LATENTS,
    "encode": PIXELS,
    "kept": LATENTS,
    "picture": PICTURE,
    "frames": PIXELS,
    "done": PIXELS,
}
"""Limit of a message's tensors in bytes, by its kind; other kinds have no tensors."""
LAST = ("done", "failed", "cancelled")
"""Kinds of the last answer to a request."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
"""Allowed dtypes, by their name in safetensors."""
MAX_DIMENSIONS = 6


class ProtocolError(ValueError):
    """The bytes are not a message of this version."""


@dataclass(frozen=True)
class Message:
    """One message.

    Requests are ``sample``, ``load``, ``window``, ``decode``, ``encode``, ``status``, ``free``, ``stop`` and, while a job runs,
    ``cancel``. Answers are ``step``, ``kept``, ``picture``, ``frames``, ``done``, ``failed`` and ``cancelled``.
    """

    kind: str
    plain: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def encode(message: Message) -> bytes:
    """Encodes a message as bytes."""
    return b"".join(split(message))


def split(message: Message) -> list[bytes | memoryview]:
    """Returns the header of a message, and the memory of each of its tensors.

    Raises:
        ProtocolError: for a tensor of another dtype than those of ``DTYPES``.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    head = {"version": VERSION, "kind": message.kind, "plain": message.plain}
    header: dict[str, Any] = {"__metadata__": {"message": json.dumps(head)}}
    views, end = [], 0
    for name, tensor in message.tensors.items():
        if tensor.dtype not in names:
            raise ProtocolError(f"'{name}' is {tensor.dtype}")
        views.append(bytes_of(tensor))
        begin, end = end, end + len(views[-1])
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    return [len(text).to_bytes(8, "little") + text, *views]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns a tensor's memory, copied if it is not contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class Head:
    """The header of a message."""

    kind: str
    plain: dict[str, Any]
    tensors: dict[str, tuple[torch.dtype, list[int], int]]
    """Dtype, shape and size in bytes of each tensor, in their order."""


def read_head(data: bytes) -> Head:
    """Parses and checks the header: its length, the version, and the dtypes, shapes and sizes of the tensors.

    Raises:
        ProtocolError: when the bytes are not a message, are of another version, or exceed the limit of their kind.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > min(MAX_HEADER, len(data) - 8):
            raise ProtocolError(f"a header of {length} bytes in {len(data)}")
        found = json.loads(data[8 : 8 + length])
        message = json.loads(found.pop("__metadata__")["message"])
        version, kind, plain = message["version"], str(message["kind"]), dict(message["plain"])
        tensors = checked(found) if version == VERSION else {}
    except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of the protocol and this side {VERSION}; "
            "install the same version of the pack on both sides, and start the group again"
        )
    size = sum(size for _, _, size in tensors.values())
    if size > MAX_TENSORS.get(kind, 0):
        raise ProtocolError(f"{size} bytes of tensors; a message '{kind}' has at most {MAX_TENSORS.get(kind, 0)}")
    return Head(kind, plain, tensors)


def checked(tensors: dict[str, dict[str, Any]]) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Returns the tensors of a header in the order of their bytes.

    Raises:
        ValueError: when dtypes, shapes and offsets do not match.
    """
    found, before = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
        if tensor["dtype"] not in DTYPES or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"'{name}' is {tensor['dtype']} in {len(shape)} dimensions")
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"'{name}' has shape {shape}")
        dtype = DTYPES[tensor["dtype"]]
        if end - begin != math.prod(shape) * dtype.itemsize or begin != before:
            raise ValueError(f"'{name}' has shape {shape} and bytes {begin} to {end}")
        found[name], before = (dtype, shape, end - begin), end
    return found


def decode(data: bytes) -> Message:
    """Decodes a message.

    Raises:
        ProtocolError: when the bytes are not a message, or are of another version.
    """
    head = read_head(data)
    try:
        return Message(head.kind, head.plain, load(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error
