"""Messages that are none, for :mod:`benchmarks.soak`."""

import json
import random
import struct

from parallel_backend.group import codec


def invalid_bytes(rng: random.Random, valid: bytes) -> bytes:
    """Returns bytes that are no request: a valid one that is broken, or something else."""
    length = int.from_bytes(valid[:8], "little")
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    head = json.loads(header["__metadata__"]["message"])

    def packed(header, body=body) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    def with_head(**changes) -> bytes:
        return packed({**header, "__metadata__": {"message": json.dumps({**head, **changes})}})

    def with_tensor(**changes) -> bytes:
        name = rng.choice([name for name in header if name != "__metadata__"])
        return packed({**header, name: {**header[name], **changes}})

    def with_field() -> bytes:
        plain = {
            **head["plain"],
            rng.choice(list(head["plain"])): rng.choice([None, -1, 1e99, "x", [], {}, float("nan"), 2**80]),
        }
        return with_head(plain=plain)

    deep = "[" * 5000 + "]" * 5000
    ways = [
        lambda: valid[: rng.randrange(len(valid))],
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(200))),
        lambda: bytes(byte ^ (rng.random() < 0.01) * rng.randrange(256) for byte in valid[: length + 8]) + body,
        lambda: struct.pack("<Q", rng.choice([0, 1, 2**20 + 1, 2**40, 2**63, 2**64 - 1])) + valid[8:],
        lambda: with_head(version=rng.choice([0, 2, -1, "1", None])),
        lambda: with_head(kind=rng.choice(["", "dance", None, 7, "__class__"])),
        lambda: with_head(plain=rng.choice([[], "x", None, {}, {"model": {}}, {"model": {"path": "/etc"}}])),
        lambda: with_tensor(dtype=rng.choice(["F8_E4M3", "I64", "BOOL", "F64", "X"])),
        lambda: with_tensor(shape=rng.choice([[], [0], [2**40], [-1], [1, 16, 5, 9, 11], "x", [[1]]])),
        lambda: with_tensor(data_offsets=rng.choice([[0, 2**40], [5, 1], [-4, 4], "x"])),
        with_field,
        lambda: struct.pack("<Q", len(deep)) + deep.encode(),
        lambda: packed({**header, "__metadata__": {"message": deep}}),
    ]
    return rng.choice(ways)()


def parts(rng: random.Random, data: bytes) -> list[bytes]:
    """Returns a message as it is sent, header and tensors; or now and then cut elsewhere."""
    length = 8 + int.from_bytes(data[:8], "little")
    try:
        sizes = [size for _, _, size in codec.read_head(data[:length]).tensors.values()]
    except codec.ProtocolError:
        sizes = []
    cuts = [length, *sizes, len(data)] if rng.random() < 0.9 else [rng.randrange(len(data) + 1), len(data)]
    found = []
    for size in cuts:
        found, data = [*found, data[:size]], data[size:]
    return [part for index, part in enumerate(found) if part or not index]
