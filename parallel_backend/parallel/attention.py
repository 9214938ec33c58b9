"""Attention over a sequence that is spread over ranks: xDiT's USP."""

import torch

from ..cogvideox import attention

BACKEND = "cogvideox"
"""The name our attention function has in xfuser's registry."""


def attend(query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=None):
    """Attention of ``[batch, heads, tokens, head_dim]``, and its log-sum-exp where a ring needs it.

    In a ring this is called once for each rank's keys, own first, then those of the rank before, and so
    on. Only the last rank's keys can end in padding, which is cut off here.
    """
    ring: RingPosition | None = (attention_kwargs or {}).get("ring")
    fp8 = (attention_kwargs or {}).get("fp8", False)
    if ring is None:
        whole = attention.attention_of(query.device, query.dtype, fp8=fp8)
        return whole(*(states.transpose(1, 2) for states in (query, key, value))).transpose(1, 2), None
    key, value = ring.trim(key, value)
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
    if attention.uses_flash_3(query.device, query.dtype):
        output, log_sum_exp = attention.flash(*(states.transpose(1, 2) for states in (query, key, value)), fp8=fp8)
        return output.transpose(1, 2), log_sum_exp
    if query.dtype in (torch.bfloat16, torch.float16):
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

        cudnn = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.CUDNN]
        return cudnn(query, key, value, dropout_p, is_causal)
    output, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, compute_log_sumexp=True
    )
    return output, log_sum_exp[..., : query.shape[2]]  # the kernel rounds its length up


class RingPosition:
    """Which rank's keys a call of :func:`attend` sees, within one attention.

    Args:
        rank: this rank's place in the ring.
        size: ranks in the ring.
        padding: keys of padding at the end of the last rank's.
    """

    def __init__(self, rank: int, size: int, padding: int):
        self.source = rank
        self.size = size
        self.padding = padding

    def trim(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of this call without padding; moves on to the next call's."""
        valid = key.shape[2] - (self.padding if self.source == self.size - 1 else 0)
        self.source = (self.source - 1) % self.size
        return key[:, :, :valid], value[:, :, :valid]


class SharedAttention:
    """Attention whose tokens are one rank's chunk of the joint sequence.

    Args:
        ulysses, ring: degrees of the sequence group.
        ring_rank: this rank's place in its ring.
        fp8: whether to attend in FP8 where that can be done.
    """

    def __init__(self, *, ulysses: int, ring: int, ring_rank: int, fp8: bool):
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY
        from xfuser.model_executor.layers.usp import USP

        ATTENTION_FUNCTION_REGISTRY[BACKEND] = attend
        self.usp = USP
        self.ulysses = ulysses
        self.ring = ring
        self.ring_rank = ring_rank
        self.fp8 = fp8
        self.padding = 0
        """Tokens of padding at the end of the whole sequence; set for each forward."""

    @torch.compiler.disable  # xDiT's groups and its runtime state are not for a compiler to see
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of ``[batch, tokens, heads, head_dim]``, this rank's tokens to everyone's."""
        heads_first = (states.transpose(1, 2) for states in (query, key, value))
        kwargs = self._kwargs(query.shape[1])
        output = self.usp(*heads_first, combine_qkv_a2a=True, backend=BACKEND, attention_kwargs=kwargs)
        return output.transpose(1, 2).to(query.dtype)

    def _kwargs(self, tokens: int) -> dict:
        if self.ring > 1:
            return {"ring": RingPosition(self.ring_rank, self.ring, self.padding), "fp8": self.fp8}
        return {"fp8": self.fp8, **({"valid_kv_len": tokens * self.ulysses - self.padding} if self.padding else {})}
