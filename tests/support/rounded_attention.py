"""An approximate attention function for the CPU, in the manner of int8 attention: ``rounded``."""

import torch

from parallel_backend import model
from parallel_backend.cogvideox.attention import registry
from parallel_backend.cogvideox.attention.function import AttentionFunction
from parallel_backend.cogvideox.attention.torch_attention import attend_torch

NAME = "rounded"
LEVELS = 127


def to_levels(states: torch.Tensor, *dims: int) -> torch.Tensor:
    """Rounds to the levels of int8, with one scale over these dimensions."""
    scales = states.abs().amax(dim=dims, keepdim=True).clamp(min=1e-12) / LEVELS
    return (states / scales).round() * scales


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention of queries rounded token by token, and of keys and values rounded head by head over all tokens."""
    return attend_torch(to_levels(query, 3), to_levels(key, 1, 3), to_levels(value, 1))


def register() -> None:
    """Adds the function to this process."""
    registry.register(AttentionFunction(NAME, attend, is_exact=False, near=registry.ROUNDED))
    model.ATTENTIONS = (*model.ATTENTIONS, NAME)
