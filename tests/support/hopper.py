"""Compiles the attention kernels for Hopper: ``python -m tests.support.hopper FOLDER`` writes the PTX of each to ``NAME.ptx``.

It is a process of its own because Triton's Gluon, once it has compiled something, ends a process with a page about leaks.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from parallel_backend.cogvideox.attention.torch_attention import HEAD_DIM
from parallel_backend.cogvideox.kernels import attention_hopper, attention_hopper_fp8

from .targets import HOPPER, compiled

ROWS, KEYS = attention_hopper.ROWS.value, attention_hopper.KEYS.value
FP8 = "fp8e4nv"


def tiles(kind: str, rows: int, columns: int) -> str:
    """Returns the type of a descriptor of tiles in shared memory."""
    bits = 8 if kind == FP8 else 16
    layout = NVMMASharedLayout(swizzle_byte_width=min(columns * bits // 8, 128), element_bitwidth=bits, rank=2)
    return f"tensordesc<{kind}[{rows}, {columns}],{layout!r}>"


def source_of(kernel, queries: str, values: str, result: str, scaled: dict[str, str], **constants) -> GluonASTSource:
    """Returns a kernel with the types of a launch.

    Args:
        queries: dtype of queries and keys.
        values: type of the tiles of values.
        result: dtype of the result.
        scaled: types of the scales of the values, if it has them.
        constants: of the launch, in addition to those of all kernels.
    """
    of_queries, of_keys = (tiles(queries, count, HEAD_DIM) for count in (ROWS, KEYS))
    tensors = {"queries": of_queries, "near": of_queries, "keys": of_keys, "values": values, "result": f"*{result}"}
    sizes = dict.fromkeys(("query_count", "key_rows", "key_count", "heads"), "i32")
    constants |= {"FEATURES": HEAD_DIM, "num_warps": 4}
    signature = tensors | {"log_sums": "*fp32", "failed": "*i32"} | scaled | sizes | dict.fromkeys(constants, "constexpr")
    return GluonASTSource(kernel, signature=signature, constexprs=constants)


def sources() -> dict[str, GluonASTSource]:
    """Returns each kernel by its name."""
    found = {}
    for queries, values, running in (("bf16", "bf16", True), ("fp16", "fp16", False), (FP8, "bf16", False)):
        about = (attention_hopper.optimistic_kernel, queries, tiles(values, KEYS, HEAD_DIM), values, {})
        found[queries] = source_of(*about, RUNNING=running)
    for raises in (False, True):
        about = (
            attention_hopper_fp8.fp8_kernel,
            FP8,
            tiles(FP8, HEAD_DIM, KEYS),
            "bf16",
            {"scales": "*fp32", "centers": "*fp32"},
        )
        found[f"all-{FP8}-{raises}"] = source_of(*about, RAISES=raises)
    return found


def main(folder: Path) -> None:
    def make(name: str, source: GluonASTSource) -> None:
        (folder / f"{name}.ptx").write_text(compiled(source, HOPPER).asm["ptx"])

    found = sources()
    with ThreadPoolExecutor(2) as pool:  # most of the time is that of ptxas, a process
        list(pool.map(make, found, found.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
