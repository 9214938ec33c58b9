"""Attention over a sequence that is spread over ranks: xDiT's USP inside a diffusers attention processor."""

import torch
import torch.nn.functional as F

BACKEND = "cogvideox"
"""The name our attention function has in xfuser's registry."""


def attend(query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=None):
    """Attention of ``[batch, heads, tokens, head_dim]``, and its log-sum-exp where a ring needs it.

    In a ring this is called once for each rank's keys, own first, then those of the rank before, and so
    on. Only the last rank's keys can end in padding, which is cut off here.
    """
    ring: RingPosition | None = (attention_kwargs or {}).get("ring")
    if ring is None:
        return F.scaled_dot_product_attention(query, key, value), None
    key, value = ring.trim(key, value)
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
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


class SequenceAttention:
    """A CogVideoX attention processor whose tokens are one rank's chunk of the joint sequence.

    Args:
        ulysses, ring: degrees of the sequence group.
        ring_rank: this rank's place in its ring.
    """

    def __init__(self, *, ulysses: int, ring: int, ring_rank: int):
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY
        from xfuser.model_executor.layers.usp import USP

        ATTENTION_FUNCTION_REGISTRY[BACKEND] = attend
        self.usp = USP
        self.ulysses = ulysses
        self.ring = ring
        self.ring_rank = ring_rank
        self.padding = 0
        """Tokens of padding at the end of the whole sequence; set for each forward."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        """Returns this rank's video and text tokens, each ``[batch, tokens, features]``."""
        num_text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None and hidden_states.shape[1]:
            query, key = (rotate_video(states, num_text, image_rotary_emb) for states in (query, key))

        output = self.usp(query, key, value, combine_qkv_a2a=True, backend=BACKEND, attention_kwargs=self._kwargs(joint))
        output = output.transpose(1, 2).flatten(2).to(joint.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        return output[:, num_text:], output[:, :num_text]

    def _kwargs(self, joint: torch.Tensor) -> dict:
        if self.ring > 1:
            return {"ring": RingPosition(self.ring_rank, self.ring, self.padding)}
        return {"valid_kv_len": joint.shape[1] * self.ulysses - self.padding} if self.padding else {}


def rotate_video(states: torch.Tensor, num_text: int, rotary) -> torch.Tensor:
    """Applies rotary positions to the tokens after the text; ``states`` is ``[batch, heads, tokens, head_dim]``."""
    from diffusers.models.embeddings import apply_rotary_emb

    return torch.cat([states[:, :, :num_text], apply_rotary_emb(states[:, :, num_text:], rotary)], dim=2)
