"""Sends and receives messages over the group's socket.

A message is sent in parts: the header, then the tensors' bytes, a few MiB at a time. So the receiver can refuse them before it
allocates memory, and a video is copied from the sender's tensor to the receiver's without copies in between.
"""

from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from .codec import MAX_HEADER, Head, Message, ProtocolError, read_head, split

PART = 4 * 2**20
"""Largest part of a tensor, in bytes."""


def send(connection: Connection, message: Message) -> None:
    """Sends a message.

    Raises:
        ProtocolError: when it exceeds the limit of its kind.
        OSError: when the connection is closed.
    """
    header, *views = split(message)
    read_head(header)
    connection.send_bytes(header)
    for view in views:
        for part in parts(len(view)):
            connection.send_bytes(view[part])


def parts(size: int) -> Iterator[slice]:
    """Divides ``size`` bytes into the parts that are sent."""
    return (slice(start, min(start + PART, size)) for start in range(0, size, PART))


def receive(connection: Connection) -> Message:
    """Receives the next message. Its header is checked before the rest is read.

    Raises:
        ProtocolError: when it is not a message; the connection can still be written to.
        EOFError, OSError: when the connection is closed.
    """
    _, head = receive_head(connection)
    tensors = {}
    for name, (dtype, shape, size) in head.tensors.items():
        memory = torch.empty(size, dtype=torch.uint8)
        view = memoryview(memory.numpy())
        for part in parts(size):
            view[part] = receive_part(connection, part.stop - part.start)
        tensors[name] = memory.view(dtype).view(shape)
    return Message(head.kind, head.plain, tensors)


def receive_bytes(connection: Connection) -> bytes:
    """Receives the bytes of the next message without decoding it; raises as :func:`receive` does."""
    header, head = receive_head(connection)
    sizes = (part.stop - part.start for _, _, size in head.tensors.values() for part in parts(size))
    return b"".join([header, *(receive_part(connection, size) for size in sizes)])


def receive_head(connection: Connection) -> tuple[bytes, Head]:
    """Receives the header of the next message."""
    data = receive_part(connection, 8 + MAX_HEADER, exactly=False)
    head = read_head(data)
    if len(data) != 8 + int.from_bytes(data[:8], "little"):
        raise ProtocolError("the first part is longer than its header")
    return data, head


def receive_part(connection: Connection, most: int, *, exactly: bool = True) -> bytes:
    """Receives one part of at most ``most`` bytes, or of ``exactly`` that many.

    Raises:
        ProtocolError: for a part of another size.
    """
    try:
        part = connection.recv_bytes(most)
    except OSError as error:
        if connection.closed or connection.readable:  # closed; a part that is too long ends only reading
            raise
        raise ProtocolError(f"a part of a message is longer than {most} bytes; is it from another version?") from error
    if exactly and len(part) != most:
        raise ProtocolError(f"a part of a message is {len(part)} bytes; {most} were expected")
    return part
