"""Rates of devices: of known GPUs, and of the ones that are here by a short measurement kept on disk.

H100 and H200 are measured (benchmarks/results/h100x2.json; FACTS). A100, L40, L40S, L20 and 4090 are from NVIDIA's data sheets:
dense bf16 operations, of which a product reaches ``REACHED``, and the memory's bandwidth. NVLink is assumed to give two thirds of
its data sheet. PCIe's 7 GB/s, while all GPUs send, is what xDiT's published L40 curves come to for 5b and 1.5-5B (docs/plans.md).
"""

import json
import logging
import os
from dataclasses import replace

import torch

from .cogvideox.blocks import CACHE
from .costs import CPU, Link, Machine
from .devices import Devices
from .errors import RequestError, first_line

logger = logging.getLogger(__name__)

GIB = 2**30
REACHED = 0.8
"""Of a data sheet's operations, what a large product reaches: 767 of 989 on an H100 (h100x2.json)."""
ATTENDED = 0.7
"""Of a product's rate, what FlashAttention-2 reaches on GPUs before Hopper: assumed."""
LINKS = {"nvlink": Link(300e9, 20e-6), "pcie": Link(7e9, 30e-6), "network": Link(5e9, 60e-6)}
"""By the word of ``--link``. ``network`` is one rank's share of a machine's adapters: assumed."""


def data_sheet(name: str, teraflops: float, bandwidth: float, gib: int | None, link: str, *, fp8: bool) -> Machine:
    """A GPU by its data sheet: dense bf16 TFLOP/s, bytes a second, memory."""
    rate, between = teraflops * 1e12 * REACHED, LINKS[link]
    products = 1.75 if fp8 else 1.0
    return Machine(
        name, rate, rate * ATTENDED, bandwidth, between, LINKS["network"], matrix_fp8=products, free=gib and gib * GIB
    )


HOPPER = {"link": LINKS["nvlink"], "network": LINKS["network"], "matrix_fp8": 1.75, "attention_fp8": 651 / 571}
"""FP8: products from ``fp8`` of h100x2.json (0.1 s of a half less), attention from FACTS."""
KNOWN = {
    "H200": Machine("H200", 790e12, 571e12, 4.8e12, attention_fp16=436e12, free=140 * GIB, **HOPPER),
    "H100": Machine("H100", 767e12, 554e12, 3.35e12, attention_fp16=423e12, free=79 * GIB, **HOPPER),
    "A100": data_sheet("A100", 312, 2.0e12, 79, "nvlink", fp8=False),
    "L40S": data_sheet("L40S", 362, 0.864e12, 44, "pcie", fp8=True),
    "L40": data_sheet("L40", 181, 0.864e12, 44, "pcie", fp8=True),
    "L20": data_sheet("L20", 119.5, 0.864e12, 44, "pcie", fp8=True),
    "4090": data_sheet("4090", 165, 1.008e12, 23, "pcie", fp8=True),
}
"""By a part of torch's name for it; the first that is in it. An H100's attention is an H200's by the rates of their products."""
UNKNOWN = replace(data_sheet("unknown", 120, 0.8e12, None, "pcie", fp8=False), knows_seconds=False)
"""A GPU that is not in ``KNOWN`` and cannot be measured."""

CALIBRATION = CACHE.parent / "rates.json"
"""Where measured rates are kept, beside the compiled kernels."""
MEASURED = ("matrix", "attention", "bandwidth")
"""Fields of a machine that are measured."""


def known(name: str) -> Machine:
    """The GPU that a name is of."""
    return next((machine for part, machine in KNOWN.items() if part.lower() in name.lower()), replace(UNKNOWN, name=name))


def asked(name: str | None, *, count: int, link: str | None, memory_gib: float | None) -> Machine:
    """Devices that a person describes, which need not be here; GPUs of this machine where no name is given.

    Raises:
        RequestError: for a GPU that is not known.
    """
    if name is not None and (machine := known(name)).name not in KNOWN:
        raise RequestError(f"gpu '{name}' is not known; use one of {', '.join(KNOWN)}")
    if name is None:
        found = Devices.parse("auto")
        machine = here(found) if found.kind == "cuda" else UNKNOWN
    if link is not None:
        machine = replace(machine, link=LINKS[link])
    return replace(machine, per_machine=count, free=int(memory_gib * GIB) if memory_gib else machine.free)


def here(devices: Devices) -> Machine:
    """The devices of this machine: known or assumed rates, replaced by measured ones, their link and free memory.

    One device needs no measurement: there is nothing to choose.
    """
    if devices.kind == "cpu":
        return CPU
    name = torch.cuda.get_device_name(devices.first)
    found = replace(known(name), name=name, free=min(map(usable_bytes, devices.torch_devices)), per_machine=devices.count)
    if devices.count == 1:
        return found
    rates = calibrated(name, torch.__version__, devices.first) or {}
    return replace(found, link=link_of(devices, found), knows_seconds=found.knows_seconds or bool(rates), **rates)


def usable_bytes(device: torch.device) -> int:
    """Bytes that the driver has and that this process holds, which are given up before a job."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def whole_bytes(devices: Devices) -> int:
    """Memory of the smallest device, used or not."""
    return min(torch.cuda.mem_get_info(device)[1] for device in devices.torch_devices)


def link_of(devices: Devices, machine: Machine) -> Link:
    """NVLink where the GPU has it and all reach each other's memory, else PCIe."""
    first, *others = devices.indices
    reached = all(torch.cuda.can_device_access_peer(first, other) for other in others)
    is_card = "PCIe" in machine.name  # the H100 and A100 for a slot
    return machine.link if reached and not is_card else LINKS["pcie"]


def calibrated(name: str, torch_version: str, device: torch.device) -> dict[str, float] | None:
    """Rates of a GPU: from disk, or measured now and kept. None where that fails, as when its memory is full."""
    key, kept = f"{name}, torch {torch_version}", read()
    if is_whole(kept.get(key)):
        return kept[key]
    try:
        rates = measure(device)
        torch.cuda.empty_cache()  # ComfyUI's process keeps none of it
    except RuntimeError as error:
        logger.info("the rates of %s are assumed: %s", name, first_line(error))
        return None
    try:
        CALIBRATION.parent.mkdir(parents=True, exist_ok=True)
        written = CALIBRATION.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({**kept, key: rates}, indent=1))
        written.replace(CALIBRATION)
    except OSError as error:
        logger.info("the rates of %s are not kept: %s", name, error)
    return rates


def read() -> dict:
    """What is kept; nothing where the file is not there or broken."""
    try:
        kept = json.loads(CALIBRATION.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def is_whole(rates) -> bool:
    """Whether rates from disk can be used."""
    return (
        isinstance(rates, dict)
        and set(rates) == set(MEASURED)
        and all(isinstance(rate, (int, float)) and rate > 0 for rate in rates.values())
    )


def measure(device: torch.device) -> dict[str, float]:
    """Rates of a GPU in bf16, in less than a second: one product, one attention, one copy."""
    from .cogvideox.attention import attention_of

    def median_seconds(run) -> float:
        run()
        found = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(device))
            run()
            end.record(torch.cuda.current_stream(device))
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        return sorted(found)[2]

    side, tokens, heads = 6144, 8192, 24
    about = {"device": device, "dtype": torch.bfloat16}
    with torch.cuda.device(device), torch.inference_mode():
        first, second = (torch.randn(side, side, **about) for _ in range(2))
        matrix = 2 * side**3 / median_seconds(lambda: first @ second)
        states = [torch.randn(1, tokens, heads, 64, **about) for _ in range(3)]
        attend = attention_of(torch.device(device), torch.bfloat16)
        attention = 4 * tokens**2 * heads * 64 / median_seconds(lambda: attend(*states, [None] * 3))
        large = torch.empty(2**28, device=device, dtype=torch.uint8)
        bandwidth = 2 * large.nbytes / median_seconds(large.clone)
    return {"matrix": matrix, "attention": attention, "bandwidth": bandwidth}
