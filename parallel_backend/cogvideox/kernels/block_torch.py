"""What a block computes between its matrix products and attention, as torch has it.

:mod:`.block_triton` has the same for GPUs, each in one pass over memory. Both are handed to :func:`parallel_backend.cogvideox.transformer.block.forward`.
"""

import os

import torch
import torch.nn.functional as F

from ...system.folders import writable_cache

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = 1e-12
"""Below which a maximum counts as nothing to scale by."""
CONDITIONS = 6
"""What a norm makes of the timestep for each feature: shift, scale and gate for video tokens, then the same for text."""
SHIFT, SCALE, GATE = range(CONDITIONS // 2)
"""Their places."""

Inputs = tuple[torch.Tensor, ...]
"""What a linear layer is called with: tokens ``[batch, tokens, features]``, or the same in e4m3 and what each token is to be
multiplied by, ``[batch * tokens, 1]``."""


def keep_kernels() -> None:
    """Has whatever is compiled from now on keep its kernels on disk, unless TRITON_CACHE_DIR says where already."""
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(writable_cache() / "compiled")


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of ``[batch, tokens, heads, head_dim]`` by tables ``[tokens, head_dim]``."""
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return states * cosines[:, None] + turned * sines[:, None]


def quantize(states: torch.Tensor) -> torch.Tensor:
    """In e4m3; what is beyond it becomes its largest."""
    return states.clamp(-LARGEST, LARGEST).to(FP8)


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, features]`` in e4m3, and what each row is to be multiplied by, ``[rows, 1]`` in float32."""
    exact = rows.float()
    scales = exact.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (exact / scales).to(FP8), scales


def spread(states: torch.Tensor, ranks: int) -> torch.Tensor:
    """``[batch, tokens, heads, head_dim]`` as it is sent to ``ranks``: ``[batch, ranks, tokens, heads / ranks, head_dim]``."""
    return states.unflatten(2, (ranks, -1)).transpose(1, 2).contiguous()


def for_tokens(conditions: torch.Tensor, place: int, tokens: int, text: int) -> torch.Tensor:
    """One of the conditions ``[batch, tokens, features]`` for so many tokens, of which the first ``text`` are text."""
    parts = conditions[:, None].chunk(CONDITIONS, dim=-1)
    is_text = torch.arange(tokens, device=conditions.device)[:, None] < text
    return torch.where(is_text, parts[place + CONDITIONS // 2], parts[place])


class TorchBlockOps:
    """As torch has it. Layers in FP8 are given tokens, and round them themselves.

    ``states`` and ``update`` are tokens ``[batch, tokens, features]``, of which the first ``text`` are text; ``conditions``
    ``[batch, 6 * features]`` are a norm's (:data:`CONDITIONS`); ``fp8`` says whether the layers behind are in FP8.
    """

    def modulate(self, states: torch.Tensor, norm, conditions: torch.Tensor, text: int, *, fp8: bool) -> Inputs:
        """Tokens normalised, scaled and shifted, for the layers behind."""
        shift, scale = (for_tokens(conditions, place, states.shape[1], text) for place in (SHIFT, SCALE))
        return (norm(states) * (1 + scale) + shift,)

    def add(self, states: torch.Tensor, update: torch.Tensor, conditions: torch.Tensor, text: int) -> torch.Tensor:
        """The sum of tokens and what was made of them, times its gate."""
        return states + for_tokens(conditions, GATE, states.shape[1], text) * update

    def add_and_modulate(
        self,
        states: torch.Tensor,
        update: torch.Tensor,
        before: torch.Tensor,
        norm,
        conditions: torch.Tensor,
        text: int,
        *,
        fp8: bool,
    ) -> tuple[torch.Tensor, Inputs]:
        """:meth:`add` with the conditions ``before``, and :meth:`modulate` of the sum."""
        states = self.add(states, update, before, text)
        return states, self.modulate(states, norm, conditions, text, fp8=fp8)

    def inputs(self, states: torch.Tensor, *, fp8: bool) -> Inputs:
        """Tokens for the layers behind."""
        return (states,)

    def gelu(self, layer, inputs: Inputs, approximate: str, *, fp8: bool) -> Inputs:
        """GELU, of torch's kind ``approximate``, of what a linear layer makes of its inputs, for the layer behind."""
        return (F.gelu(layer(*inputs), approximate=approximate),)

    def normal_heads(
        self, states: torch.Tensor, norm, tables: Inputs | None, factor: float, *, fp8: bool, ranks: int
    ) -> torch.Tensor:
        """Normalises each head of ``[batch, tokens, heads, head_dim]``, rotates its pairs, and lays them out for ``ranks``.

        Args:
            states: of queries or keys.
            norm: the layer norm over a head.
            tables: cosines and sines ``[tokens, head_dim]`` in float32, or None.
            factor: that the result is multiplied by.
            fp8: whether it is rounded to e4m3, not to the dtype.
            ranks: among whom heads are spread.
        Returns:
            ``[batch, ranks, tokens, heads / ranks, head_dim]``.
        """
        normal = norm(states)  # called, as hooks may have to bring its weights
        exact = normal if states.dtype == torch.float64 else normal.float()
        turned = (rotate(exact, *tables) if tables else exact) * factor
        return spread(quantize(turned) if fp8 else turned.to(states.dtype), ranks)

    def swap(self, states: torch.Tensor) -> torch.Tensor:
        """``[batch, first, second, features]`` as ``[batch, second, first, features]``."""
        return states.transpose(1, 2).contiguous()
