"""A block's operations between its matrix products and attention, in torch.

:mod:`.block_triton` has the same operations for GPUs, each in one pass over memory. Either is used by
:func:`parallel_backend.cogvideox.transformer.block.forward`.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...system.folders import writable_cache

FP8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = torch.finfo(FP8).max
LARGEST_OF = {FP8: LARGEST, INT8: 127.0}
"""The dtypes that rows are rounded to, and what the largest value of each row becomes."""
SMALLEST = 1e-12
"""Lower bound of a maximum that values are scaled by; avoids a division by zero."""
CONDITIONS = 6
"""Vectors that a norm computes from the timestep: shift, scale and gate for video tokens, then the same for text tokens."""
SHIFT, SCALE, GATE = range(CONDITIONS // 2)
"""Their indices."""

Inputs = tuple[torch.Tensor, ...]
"""Arguments of a linear layer: tokens ``[batch, tokens, features]``; or the same in e4m3 or int8, and the scale of each token,
``[batch * tokens, 1]``."""


@dataclass(frozen=True)
class Own:
    """Memory for the heads that this rank attends to itself. They are written there, and not to where heads are sent from."""

    memory: torch.Tensor
    """``[batch, parts, tokens, heads, head_dim]``: this rank's parts, each of them contiguous."""
    first: int
    """Number of the first of them among the parts of all ranks."""

    @property
    def parts(self) -> slice:
        """Which parts they are."""
        return slice(self.first, self.first + self.memory.shape[1])


def keep_kernels() -> None:
    """Makes compilers cache kernels on disk, unless TRITON_CACHE_DIR is already set."""
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(writable_cache() / "compiled")


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of features of ``[batch, tokens, heads, head_dim]`` by tables ``[tokens, head_dim]``."""
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return states * cosines[:, None] + turned * sines[:, None]


def quantize(states: torch.Tensor) -> torch.Tensor:
    """Converts to e4m3; values beyond its range are clamped."""
    return states.clamp(-LARGEST, LARGEST).to(FP8)


def quantize_rows(rows: torch.Tensor, dtype: torch.dtype = FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts ``[rows, features]`` to e4m3 or int8. Also returns the scale of each row, ``[rows, 1]`` in float32."""
    exact = rows.float()
    scales = exact.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST_OF[dtype]
    scaled = exact / scales
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales


def for_tokens(conditions: torch.Tensor, place: int, tokens: int, text: int) -> torch.Tensor:
    """Returns one of the conditions per token, ``[batch, tokens, features]``.

    Args:
        conditions: ``[batch, 6 * features]``.
        place: ``SHIFT``, ``SCALE`` or ``GATE``.
        tokens: total number of tokens.
        text: how many of the first tokens are text.
    """
    parts = conditions[:, None].chunk(CONDITIONS, dim=-1)
    is_text = torch.arange(tokens, device=conditions.device)[:, None] < text
    return torch.where(is_text, parts[place + CONDITIONS // 2], parts[place])


class TorchBlockOps:
    """The operations in torch. Quantised layers get unquantised tokens and quantise them themselves.

    ``states`` and ``update`` are tokens ``[batch, tokens, features]``, of which the first ``text`` are text. ``conditions``
    ``[batch, 6 * features]`` are those of a norm (:data:`CONDITIONS`). ``rounded`` is the dtype in which the following layers take
    tokens with a scale each, or None if they take them as they are.
    """

    def modulate(
        self, states: torch.Tensor, norm, conditions: torch.Tensor, text: int, *, rounded: torch.dtype | None
    ) -> Inputs:
        """Normalises, scales and shifts tokens. Returns the inputs of the following layers."""
        shift, scale = (for_tokens(conditions, place, states.shape[1], text) for place in (SHIFT, SCALE))
        return (norm(states) * (1 + scale) + shift,)

    def add(self, states: torch.Tensor, update: torch.Tensor, conditions: torch.Tensor, text: int) -> torch.Tensor:
        """Adds a gated update to tokens."""
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
        rounded: torch.dtype | None,
    ) -> tuple[torch.Tensor, Inputs]:
        """Runs :meth:`add` with the conditions ``before``, then :meth:`modulate` on the sum. Returns both results."""
        states = self.add(states, update, before, text)
        return states, self.modulate(states, norm, conditions, text, rounded=rounded)

    def inputs(self, states: torch.Tensor, *, rounded: torch.dtype | None) -> Inputs:
        """Returns the inputs of the following layers."""
        return (states,)

    def gelu(self, layer, inputs: Inputs, approximate: str, *, rounded: torch.dtype | None) -> Inputs:
        """Applies a linear layer and GELU (torch's variant ``approximate``). Returns the inputs of the following layer."""
        return (F.gelu(layer(*inputs), approximate=approximate),)

    def normal_heads(
        self,
        states: torch.Tensor,
        norm,
        tables: Inputs | None,
        factor: float,
        *,
        fp8: bool,
        parts: int,
        own: Own | None = None,
    ) -> torch.Tensor:
        """Normalises each head of ``[batch, tokens, heads, head_dim]``, applies rotary positions, and spreads heads over parts.

        Args:
            states: queries or keys.
            norm: layer norm over a head.
            tables: cosines and sines ``[tokens, head_dim]`` in float32, or None.
            factor: that the result is multiplied by.
            fp8: whether the result is in e4m3 instead of the input's dtype.
            parts, own: as in :meth:`spread`.
        Returns:
            As :meth:`spread`.
        """
        normal = norm(states)  # called as a module, as offload hooks may load its weights
        exact = normal if states.dtype == torch.float64 else normal.float()
        turned = (rotate(exact, *tables) if tables else exact) * factor
        return self.spread(quantize(turned) if fp8 else turned.to(states.dtype), parts, own)

    def spread(self, states: torch.Tensor, parts: int, own: Own | None = None) -> torch.Tensor:
        """Lays out heads in parts, one after the other, for the ranks that compute them.

        Args:
            states: ``[batch, tokens, heads, head_dim]``.
            parts: number of parts.
            own: memory for this rank's own parts, which are then undefined in the result; or None.
        Returns:
            ``[batch, parts, tokens, heads / parts, head_dim]``.
        """
        result = states.unflatten(2, (parts, -1)).transpose(1, 2).contiguous()
        if own:
            own.memory.copy_(result[:, own.parts])
        return result

    def join(self, states: torch.Tensor) -> torch.Tensor:
        """Returns what :meth:`spread` was given, ``[batch, tokens, features]``."""
        return states.transpose(1, 2).flatten(2)

    def put(self, states: torch.Tensor, target: torch.Tensor) -> None:
        """Copies ``[tokens, heads, head_dim]`` to where tokens are further apart."""
        target.copy_(states)
