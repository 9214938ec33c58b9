"""An attention function: what it needs of a device, what it is given, and what it returns.

Tensors are ``[batch, tokens, heads, head_dim]``, the layout of the projections' outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...system.modules import has_module
from ..kernels.block_torch import quantize
from .operands import factors
from .torch_attention import NEAR, Attention

AttentionWithSums = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Returns attention, and the natural log-sum-exp of its scores ``[batch, heads, tokens]`` in float32."""
HALVES = (torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


QUERY, KEY, VALUE = range(3)
"""Places of the arguments of an attention function."""


@dataclass(frozen=True)
class Kind:
    """The kind of tensors that attention is computed of."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        return f"heads of {self.head_dim} in {NAMES.get(self.dtype, self.dtype)} on {self.device}"


@dataclass(frozen=True)
class Needs:
    """What a function needs."""

    capability: tuple[int, int] | None = None
    """Lowest compute capability of an NVIDIA GPU; None if it runs on any device."""
    is_hopper_only: bool = False
    runs_on_amd: bool = False
    """Whether it may run on a GPU of AMD, of any generation; a trial decides."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """None for all."""
    head_dims: tuple[int, ...] | None = None
    """None for all."""
    modules: tuple[str, ...] = ()
    """Modules of which one must be installed."""
    package: str = ""
    """The package to install for that."""

    def unmet(self, kind: Kind) -> str | None:
        """Returns what a device or its tensors lack, or None. Packages are not looked for."""
        if self.capability and (reason := self._unmet_by_device(kind.device)):
            return reason
        if self.dtypes and kind.dtype not in self.dtypes:
            return f"it needs {' or '.join(NAMES[dtype] for dtype in self.dtypes)}"
        if self.head_dims and kind.head_dim not in self.head_dims:
            return f"it needs heads of {' or '.join(map(str, self.head_dims))} features, and this model's have {kind.head_dim}"
        return None

    def _unmet_by_device(self, device: torch.device) -> str | None:
        makers = "a Hopper GPU, such as an H100" if self.is_hopper_only else "a GPU of NVIDIA" + " or AMD" * self.runs_on_amd
        if device.type != "cuda":
            return f"it needs {makers}"
        if torch.version.hip:  # whose capability is no number of NVIDIA's
            return None if self.runs_on_amd else f"it needs {makers}"
        found = torch.cuda.get_device_capability(device)
        if self.is_hopper_only:
            return None if found[0] == self.capability[0] else f"it needs {makers}"
        if found < self.capability:
            return f"it needs compute capability {version(self.capability)} or newer, and this GPU has {version(found)}"
        return None

    def missing_package(self) -> str | None:
        """Returns which package is not installed, or None."""
        if not self.modules or any(map(has_module, self.modules)):
            return None
        return f"it needs the package {self.package}, which is not installed"


def version(capability: tuple[int, int]) -> str:
    """Formats a compute capability for the user, such as 8.9."""
    return ".".join(map(str, capability))


@dataclass(frozen=True)
class AttentionFunction:
    """One way to compute attention."""

    name: str
    """As the user writes it."""
    attend: Attention
    needs: Needs = Needs()
    attend_with_sums: AttentionWithSums | None = None
    """The same, with the log-sum-exp; None if it does not give that, which a ring needs. Queries and keys are in 16 bits even if
    ``fp8`` is set."""
    is_exact: bool = True
    """Whether its error is that of rounding to the dtype. ``auto`` chooses such functions only."""
    comes_first: bool = False
    """Whether ``auto`` takes it without timing where it works, as it is known to be the fastest there."""
    near: float = NEAR
    """Largest relative error, compared with float32, at which it is used."""
    base_two: bool = False
    """Whether it takes scores in base two; see :func:`.operands.factors`."""
    fp8: bool = False
    """Whether it takes queries and keys in e4m3."""

    def missing(self, kind: Kind) -> str | None:
        """Returns what it needs and does not have here, or None. Nothing is computed."""
        return self.needs.unmet(kind) or self.needs.missing_package()

    def operands(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, *, in_ring: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rounds heads in float32 to what a block gives to this function."""
        in_fp8 = self.fp8 and not in_ring
        of_query, of_key = factors(query.shape[-1], base_two=self.base_two, fp8=in_fp8)
        query, key = query * of_query, key * of_key
        return (
            (quantize(query), quantize(key), value.to(dtype)) if in_fp8 else (query.to(dtype), key.to(dtype), value.to(dtype))
        )
