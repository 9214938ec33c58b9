"""Compiles Triton kernels for GPUs that are not there, from the launches of the real code on tensors without data."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KIB = 2**10
SHARED = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Shared memory that one program may use, by compute capability: CUDA programming guide, technical specifications."""
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
HOPPER = 90
FIRST_FP8 = 89
"""The first compute capability with FP8."""


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one launch. Triton compiles each once."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    """Arguments that are multiples of 16."""
    warps: int

    @classmethod
    def of(cls, kernel, arguments: dict[str, Any], warps: int) -> "Variant":
        """Returns the variant that a launch with these arguments compiles, as Triton's own launcher would."""
        signature, constants, aligned = [], [], []
        for place, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            fixed = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
                kind = "constexpr"
                constants.append((parameter.name, value))
            else:
                kind = (
                    POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
                )
            if isinstance(value, torch.Tensor) or (kind == "i32" and not fixed and value % 16 == 0):
                aligned.append(place)
            signature.append((parameter.name, kind))
        return cls(kernel, tuple(signature), tuple(constants), tuple(aligned), warps)

    @property
    def kind(self) -> tuple[str, str | None]:
        """The kernel's name, and which 8 bits it rounds to or reads, if any."""
        return self.kernel.__name__, next((name for name in ("*fp8e4nv", "*i8") if name in dict(self.signature).values()), None)

    @property
    def chips(self) -> list[int]:
        """The compute capabilities that run it: those of GPUs without FP8 are refused before."""
        return [chip for chip in SHARED if chip >= FIRST_FP8 or self.kind[1] != "*fp8e4nv"]

    def compile(self, capability: int):
        """Compiles it for a compute capability; see :func:`compiled`."""
        attributes = {(place,): [["tt.divisibility", 16]] for place in self.aligned}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)
        return compiled(source, capability, self.warps)


def compiled(source, capability: int, warps: int = 4):
    """Compiles a source to machine code for a compute capability such as 86, and checks that its shared memory fits the chip."""
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert made.asm["cubin"] and made.metadata.shared <= SHARED[capability], (source.name, made.metadata.shared)
    return made


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel, note: Callable[[Variant], None]):
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid):
        return partial(self.launch)

    def launch(self, *arguments, num_warps: int, **constants) -> None:
        given = dict(zip(self.kernel.arg_names, arguments)) | constants
        self.note(Variant.of(self.kernel, given, num_warps))


@contextmanager
def recorded(module, *names: str):
    """Within the context, launches of a module's kernels are noted in the list that it gives, each variant once."""
    variants: dict[Variant, None] = {}
    kernels = {name: getattr(module, name) for name in names}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, Recorder(kernel, lambda variant: variants.setdefault(variant)))
        yield variants
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
