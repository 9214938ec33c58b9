"""Ring attention over a sequence that is sharded over ranks, by xDiT's USP."""

import torch

from ..cogvideox.attention.function import AttentionFunction
from . import xdit

BACKEND = "cogvideox"
"""The name of this pack's attention function in xfuser's registry."""


def attend_in_ring(query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=None):
    """Computes attention of ``[batch, heads, tokens, head_dim]`` and its log-sum-exp, for xDiT's ring.

    It is called once per rank's keys: first this rank's, then those of the previous rank, and so on. Only the last rank's keys
    may end in padding, which is removed here.
    """
    ring = attention_kwargs["ring"]
    key, value = ring.trim(key, value)
    tokens_first = (states.transpose(1, 2) for states in (query, key, value))
    output, log_sum_exp = attention_kwargs["function"].attend_with_sums(*tokens_first)
    return output.transpose(1, 2), log_sum_exp


class RingPosition:
    """Tracks which rank's keys a call of :func:`attend_in_ring` gets.

    Args:
        rank: of this process in the ring.
        size: of the ring.
        padding: padding keys at the end of the last rank's.
    """

    def __init__(self, rank: int, size: int, padding: int):
        self.source = rank
        self.size = size
        self.padding = padding

    def trim(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Removes padding from the current call's keys and values, and advances to the next call."""
        valid = key.shape[2] - (self.padding if self.source == self.size - 1 else 0)
        self.source = (self.source - 1) % self.size
        return key[:, :, :valid], value[:, :, :valid]


class RingAttention:
    """Ring attention, with Ulysses if the plan has both, by xDiT's USP.

    Args:
        ring: degree.
        rank: of this process in its ring.
    """

    def __init__(self, *, ring: int, rank: int):
        self.usp = xdit.usp({BACKEND: attend_in_ring})
        self.ring, self.rank = ring, rank
        self.function: AttentionFunction | None = None
        self.padding = 0

    def begin(self, function: AttentionFunction, *, padding: int) -> None:
        """Prepares a forward pass.

        Args:
            function: one that returns the log-sum-exp.
            padding: padding tokens at the end of the full sequence.
        """
        self.function, self.padding = function, padding

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Computes attention of ``[batch, 1, tokens, heads, head_dim]`` from this rank's tokens to all tokens."""
        heads_first = (states.squeeze(1).transpose(1, 2) for states in (query, key, value))
        position = RingPosition(self.rank, self.ring, self.padding)
        about = {"ring": position, "function": self.function}
        output = self.usp(*heads_first, combine_qkv_a2a=True, backend=BACKEND, attention_kwargs=about)
        return output.transpose(1, 2).to(query.dtype).unsqueeze(1)
