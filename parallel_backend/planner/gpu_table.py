"""Known GPUs and links. Importable without torch.

H100 and H200 are measured (``peak_tflops`` in benchmarks/results, which differs between runs; NOTES is benchmarks/NOTES.md). All others
are from NVIDIA's data sheets: dense operations in 16 bits with sums in float32, of which a product reaches ``REACHED``, memory bandwidth,
and memory. GeForce cards sum in float32 at half the rate that their sheets print in large. NVLink is assumed to reach two thirds of its
data sheet. PCIe's 7 GB/s, while all GPUs send, follows from xDiT's published L40 curves for 5b and 1.5-5B (benchmarks/NOTES.md).
"""

import re
from dataclasses import replace

from .machine import Link, Machine

GIB = 2**30
REACHED = 0.8
"""Share of a data sheet's operations that a large product reaches: 767 of 989 on an H100 (h100x2.json)."""
TWICE = 1.75
"""Speedup of products in 8 bits, whose rate on data sheets is at least twice that of 16 bits: FP8's of h100x2.json, 0.1 s less for each
half of guidance. That int8 gains as much is assumed, but for Hopper."""
INT8_ON_HOPPER = 1.1
"""Speedup of products by comfy-kitchen's kernel, which is for GPUs before Hopper: 204 ms for a half of 5b where bf16 takes 224 (NOTES)."""
ATTENDED, ATTENDED_BEFORE_AMPERE = 0.7, 0.35
"""Share of a product's rate that attention reaches: with FlashAttention-2, and with the kernels that older GPUs have. Assumed."""
LINKS = {"nvlink": Link(300e9, 20e-6), "pcie": Link(7e9, 30e-6), "network": Link(5e9, 60e-6)}
"""Links by their names in ``--link``. ``network`` is one rank's share of a host's network adapters: assumed."""
LINK_NAMES = {"nvlink": "NVLink", "pcie": "PCIe", "network": "the network"}
FP8_SINCE, INT8_SINCE, AMPERE = (8, 9), (7, 5), (8, 0)
"""Compute capabilities: the first with products in FP8 and in int8, and the first that the pack compiles blocks for."""
HOPPER = {
    "link": LINKS["nvlink"], "network": LINKS["network"], "matrix_fp8": TWICE, "matrix_int8": INT8_ON_HOPPER, "attention_fp8": 1.51,
    "rates_from": "the table of known GPUs, measured", "link_from": "assumed for NVLink",
}  # fmt: skip
"""Fields that all Hopper GPUs share. Attention in FP8 takes 190 ms of a half of a step of 5b where that in bf16 takes 287, on H100s and H200s
(``python -m benchmarks.kernels``)."""


def data_sheet(
    name: str, capability: tuple[int, int], teraflops: float, bandwidth: float, memory: int | None, link: str = "pcie"
) -> Machine:
    """Returns a GPU by its data sheet.

    Args:
        name: of the GPU.
        capability: its compute capability.
        teraflops: dense, in 16 bits with sums in float32.
        bandwidth: of its memory, in GB/s.
        memory: in GiB that the driver reports, which is less than is sold where ECC is on; 1 GiB of it counts as taken. Or None.
        link: a name in ``LINKS``.
    """
    rate, is_new = teraflops * 1e12 * REACHED, capability >= AMPERE
    return Machine(
        name,
        rate,
        rate * (ATTENDED if is_new else ATTENDED_BEFORE_AMPERE),
        bandwidth * 1e9,
        LINKS[link],
        LINKS["network"],
        matrix_fp8=TWICE if capability >= FP8_SINCE else 1.0,
        matrix_int8=TWICE if capability >= INT8_SINCE else 1.0,
        compiles=is_new,
        free=memory and (memory - 1) * GIB,
        rates_from="its data sheet",
        link_from=f"assumed for {LINK_NAMES[link]}",
    )


MEASURED = {
    "H200": Machine("H200", 787e12, 640e12, 4.8e12, attention_fp16=567e12, free=140 * GIB, **HOPPER),
    "H100": Machine("H100", 767e12, 651e12, 3.35e12, attention_fp16=567e12, free=79 * GIB, **HOPPER),
}
"""Attention is this pack's own, of 48 x 17776 x 64 (NOTES)."""
SHEETS = (
    ("RTX 3060", (8, 6), 25.5, 360, 12),
    ("RTX 3060 Ti", (8, 6), 32.4, 448, 8),
    ("RTX 3070", (8, 6), 40.6, 448, 8),
    ("RTX 3070 Ti", (8, 6), 43.5, 608, 8),
    ("RTX 3080", (8, 6), 59.5, 760, 10),
    ("RTX 3080 Ti", (8, 6), 68.2, 912, 12),
    ("RTX 3090", (8, 6), 71, 936, 24),
    ("RTX 3090 Ti", (8, 6), 80, 1008, 24),
    ("RTX 4060", (8, 9), 30.2, 272, 8),
    ("RTX 4060 Ti", (8, 9), 44.1, 288, 16),
    ("RTX 4070", (8, 9), 58.3, 504, 12),
    ("RTX 4070 SUPER", (8, 9), 71, 504, 12),
    ("RTX 4070 Ti", (8, 9), 80.2, 504, 12),
    ("RTX 4070 Ti SUPER", (8, 9), 88.2, 672, 16),
    ("RTX 4080", (8, 9), 97.5, 717, 16),
    ("RTX 4080 SUPER", (8, 9), 104.4, 736, 16),
    ("RTX 4090", (8, 9), 165.2, 1008, 24),
    ("RTX 5060 Ti", (12, 0), 47.4, 448, 16),
    ("RTX 5070", (12, 0), 61.7, 672, 12),
    ("RTX 5070 Ti", (12, 0), 87.9, 896, 16),
    ("RTX 5080", (12, 0), 112.6, 960, 16),
    ("RTX 5090", (12, 0), 209.5, 1792, 32),
    ("RTX A4000", (8, 6), 76.7, 448, 16),
    ("RTX A5000", (8, 6), 111.1, 768, 24),
    ("RTX A6000", (8, 6), 154.8, 768, 48),
    ("RTX 6000 Ada", (8, 9), 364.2, 960, 48),
    ("L4", (8, 9), 121, 300, 23),
    ("L20", (8, 9), 119.5, 864, 45),
    ("L40", (8, 9), 181, 864, 45),
    ("L40S", (8, 9), 362, 864, 45),
    ("A10", (8, 6), 125, 600, 23),
    ("A40", (8, 6), 149.7, 696, 45),
    ("A100", (8, 0), 312, 2000, 80, "nvlink"),
    ("T4", (7, 5), 65, 320, 15),
    ("V100", (7, 0), 125, 900, 32, "nvlink"),
)
"""By the arguments of :func:`data_sheet`."""
KNOWN = MEASURED | {sheet[0]: data_sheet(*sheet) for sheet in SHEETS}
"""GPUs by name."""
UNKNOWN = replace(data_sheet("unknown", AMPERE, 120, 800, None), knows_seconds=False, rates_from="assumed")
"""A GPU that is not in ``KNOWN`` and was not measured."""


def known(name: str) -> Machine | None:
    """Returns the GPU with a name, or None if it is not in the table.

    Args:
        name: torch's name for it, such as ``NVIDIA GeForce RTX 3090 Ti``, or the user's, such as ``3090 ti``. The longest entry whose
            words are in it counts. A laptop's GPU is slower than the card of the same name, so it is not known.
    """
    given = words(name)
    if "laptop" in given:
        return None
    matching = [entry for entry in KNOWN if is_part(words(entry), given) or is_part(words(entry.removeprefix("RTX ")), given)]
    best = max(matching, key=len, default=None)
    return KNOWN[best] if best else None


def named(name: str) -> Machine:
    """Returns the GPU with torch's name; ``UNKNOWN`` with that name if it is not in the table."""
    return replace(known(name) or UNKNOWN, name=name)


def words(name: str) -> list[str]:
    """Splits a GPU's name into words in lower case; ``RTX3090Ti`` is three."""
    apart = re.sub(r"(?<=rtx)(?=\d)|(?<=\d)(?=ti|super|gb)", " ", name.lower())
    return re.findall(r"[a-z0-9]+", apart)


def is_part(some: list[str], whole: list[str]) -> bool:
    """Whether words stand in a row in a name."""
    return any(whole[start : start + len(some)] == some for start in range(len(whole) - len(some) + 1))
