"""torch's own attention, which is also the reference for testing the kernels. On a Hopper GPU it is cuDNN's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
HEAD_DIM = 64
"""CogVideoX's head dimension."""
NEAR = 0.02
"""Largest relative error, compared with float32, at which the kernels are used; that of bf16 is about 0.004."""


def attend_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with torch."""
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
