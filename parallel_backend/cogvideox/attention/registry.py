"""The registry of attention functions, by the names of :data:`parallel_backend.model.ATTENTIONS`."""

import torch

from ...plan import AUTO
from . import hopper, packages
from . import torch_attention as of_torch
from .function import HALVES, AttentionFunction, Kind, Needs

FUNCTIONS: dict[str, AttentionFunction] = {}
"""By name. Among equally fast ones, ``auto`` takes the first."""
LAST_RESORT = "torch"
"""Runs everywhere: torch chooses one of its functions, or multiplies matrices."""
ROUNDED = 0.05
"""Largest relative error of functions that round to int8; SageAttention 1 has 0.012 and comfy-kitchen 0.014 (docs/speed.md)."""


def register(function: AttentionFunction) -> None:
    """Adds a function, or replaces the one of this name."""
    FUNCTIONS[function.name] = function


def usable(kind: Kind) -> list[AttentionFunction]:
    """Returns the functions that miss nothing here. None of them has been tried."""
    return [function for function in FUNCTIONS.values() if function.missing(kind) is None]


def can_ring(name: str) -> bool:
    """Returns whether a function, or ``auto``, works in a ring: it gives the log-sum-exp of its scores."""
    return name == AUTO or FUNCTIONS[name].attend_with_sums is not None


def to_time(kind: Kind) -> list[AttentionFunction]:
    """Returns the exact functions among which ``auto`` chooses by time, untried; empty if there is only the last resort."""
    return [each for each in usable(kind) if each.is_exact and not each.comes_first and each.name != LAST_RESORT]


OF_HOPPER = Needs((9, 0), is_hopper_only=True, dtypes=HALVES, head_dims=(32, 64))
"""Of this pack's kernels. Small test models have heads of 32."""

for _function in (
    AttentionFunction(  # 5.97 ms where FlashAttention-3 takes 6.96 and cuDNN 9.0 (benchmarks/NOTES.md)
        "hopper", hopper.attend_own, OF_HOPPER, hopper.own_attention, base_two=True, comes_first=True
    ),
    AttentionFunction(
        "cudnn", of_torch.attend_cudnn, Needs((8, 0), dtypes=HALVES), of_torch.cudnn_with_sums
    ),
    AttentionFunction(
        "flash", of_torch.attend_flash, Needs((8, 0), runs_on_amd=True, dtypes=HALVES), of_torch.flash_with_sums
    ),
    AttentionFunction(
        "efficient", of_torch.attend_efficient, Needs((5, 0), runs_on_amd=True), of_torch.efficient_with_sums
    ),
    AttentionFunction(
        "flash3",
        packages.attend_flash_3,
        Needs((9, 0), is_hopper_only=True, dtypes=(torch.bfloat16,), modules=packages.FLASH_3, package="fa3-fwd"),
        packages.flash_3_with_sums,
    ),
    AttentionFunction(
        "flash2",
        packages.attend_flash_2,
        Needs((8, 0), runs_on_amd=True, dtypes=HALVES, modules=("flash_attn",), package="flash-attn"),
        packages.flash_2_with_sums,
    ),
    AttentionFunction(LAST_RESORT, of_torch.attend_torch, Needs(), of_torch.torch_with_sums),
    AttentionFunction(
        "int8",
        packages.attend_int8,
        Needs((7, 5), runs_on_amd=True, modules=("comfy_kitchen",), package="comfy-kitchen"),
        is_exact=False,
        near=ROUNDED,
    ),
    AttentionFunction(
        "sage",
        packages.attend_sage,
        Needs((8, 0), runs_on_amd=True, dtypes=HALVES, modules=("sageattention",), package="sageattention"),
        is_exact=False,
        near=ROUNDED,
    ),
    AttentionFunction(
        "fp8", hopper.attend_own, OF_HOPPER, hopper.own_in_ring, is_exact=False, near=0.12, base_two=True, fp8=True
    ),
):  # fmt: skip
    register(_function)
