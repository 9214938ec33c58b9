"""Products of int8 matrices by torch (cuBLASLt), in int32: exact, and to be scaled afterwards."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

AT_ONCE = 2**24
"""Numbers of a product that are in int32 at a time, 64 MiB: few enough that large GPUs keep much of them in their cache until they are
scaled, and about 500 tiles of 128 x 256, which fill every GPU. On an H100 2**25 takes 4 % less; ``python -m benchmarks.int8`` compares others."""
ALIGNMENT = 128
"""Rows of a part are a multiple of these: what a tile of a product has."""
FEWEST = 32
"""Rows of a product on a GPU; fewer are padded. torch takes more than 16, and columns in multiples of 8."""


def parts(rows: int, features: int) -> Iterator[slice]:
    """Divides rows into parts of which a product with ``features`` columns has at most about :data:`AT_ONCE` numbers."""
    step = max(AT_ONCE // features // ALIGNMENT, 1) * ALIGNMENT
    return (slice(first, first + step) for first in range(0, rows, step))


def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies int8 rows ``[rows, features]`` with a weight ``[out, features]``; returns ``[rows, out]`` in int32."""
    count = len(rows)
    padded = F.pad(rows, (0, 0, 0, FEWEST - count)) if count < FEWEST else rows
    return torch._int_mm(padded, weight.t())[:count]
