"""torch's own attention: its choice, which is also the reference for testing other functions, and each of its functions by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
HEAD_DIM = 64
"""CogVideoX's head dimension."""
NEAR = 0.02
"""Largest relative error, compared with float32, at which a function counts as exact; that of bf16 is about 0.004."""
aten = torch.ops.aten


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Swaps tokens and heads: the layout of torch's functions."""
    return [states.transpose(1, 2) for states in tensors]


def few_states(device: torch.device, head_dim: int) -> list[torch.Tensor]:
    """Returns queries, keys and values in float32, with which functions are tried.

    torch's default dtype is another one while a text encoder is read.
    """
    generator = torch.Generator(device).manual_seed(0)
    like = {"device": device, "dtype": torch.float32}
    return [torch.randn(1, tokens, 2, head_dim, generator=generator, **like) for tokens in (200, 700, 700)]


def attend_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with the function that torch chooses."""
    return F.scaled_dot_product_attention(*heads_first(query, key, value)).transpose(1, 2)


def torch_with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp with torch's function for the CPU, or the one that runs on most GPUs."""
    if query.device.type != "cpu":
        return efficient_with_sums(query, key, value)
    output, sums = aten._scaled_dot_product_flash_attention_for_cpu(*heads_first(query, key, value))[:2]
    return output.transpose(1, 2), sums


def flash_with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp with torch's FlashAttention-2."""
    output, sums = aten._scaled_dot_product_flash_attention(*heads_first(query, key, value))[:2]
    return output.transpose(1, 2), sums[..., : query.shape[1]]


def attend_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with torch's FlashAttention-2."""
    return flash_with_sums(query, key, value)[0]


def cudnn_with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp with cuDNN."""
    output, sums = aten._scaled_dot_product_cudnn_attention(*heads_first(query, key, value), None, True)[:2]
    return output.transpose(1, 2), sums.view(sums.shape[:3])  # some versions add a dimension of one


def attend_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with cuDNN."""
    return aten._scaled_dot_product_cudnn_attention(*heads_first(query, key, value), None, False)[0].transpose(1, 2)


def efficient_with_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and its log-sum-exp with torch's memory-efficient function."""
    output, sums = aten._scaled_dot_product_efficient_attention(*heads_first(query, key, value), None, True)[:2]
    return output.transpose(1, 2), sums[..., : query.shape[1]]  # it pads them


def attend_efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention with torch's memory-efficient function."""
    return aten._scaled_dot_product_efficient_attention(*heads_first(query, key, value), None, False)[0].transpose(1, 2)
