"""Rates of devices: from the table of known GPUs, or a short measurement of this machine's GPUs that is saved on disk."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..cogvideox import offload
from ..cogvideox.attention import choice
from ..cogvideox.attention.function import Kind
from ..cogvideox.attention.torch_attention import HEAD_DIM
from ..config import CONFIG
from ..devices import Devices
from ..errors import RequestError, reason_of
from ..system.nvml import free_bytes, load_of
from . import hardware_cache
from .gpu_table import GIB, KNOWN, LINK_NAMES, LINKS, UNKNOWN, known, named
from .machine import CPU, SLOW_LINK, Link, Machine, as_slow_as

logger = logging.getLogger(__name__)

BUSY = 0.5
"""Share of the last moment in which a GPU may have computed, for it to be measured. A desktop takes some of it all the time."""
MOMENT = 1.0
"""Seconds after which the driver no longer counts what has ended."""
_measuring = threading.Lock()
"""Held while a GPU is measured: two measurements at once would slow each other down."""
ALIKE = 0.8
"""Devices count as equal if the smallest free memory is at least this share of the largest."""


def asked(name: str | None, *, count: int, link: str | None, memory_gib: float | None) -> Machine:
    """Returns devices that the user describes, which this machine need not have.

    Args:
        name: a GPU of ``KNOWN``, or words of its name such as ``3090``; None for the GPUs of this machine.
        count: devices in one host.
        link: a name in ``LINKS``; None for the GPU's own.
        memory_gib: free memory of each device in GiB; None for the GPU's own.
    Raises:
        RequestError: for a GPU that is not known.
    """
    if name is not None and (machine := known(name)) is None:
        raise RequestError(f"gpu '{name}' is not known; use one of {', '.join(KNOWN)}")
    if name is None:
        found = fastest_first(Devices.parse("auto"))
        machine = here(found) if found.kind == "cuda" else UNKNOWN
    if link is not None:
        machine = replace(machine, link=LINKS[link], link_from=f"assumed for {LINK_NAMES[link]}, set by the user")
    if memory_gib is not None:
        machine = replace(machine, free=int(memory_gib * GIB))
    is_changed = link is not None or memory_gib is not None or count != len(machine.together)
    return replace(machine, per_machine=count, together=() if is_changed else machine.together)


def here(devices: Devices) -> Machine:
    """Returns devices of this machine with their rates, link and free memory.

    Rates are measured if possible, else known or assumed. Unequal devices count as the slowest and the smallest of them; see
    :func:`fastest_first`. One device is not measured, as there is nothing to choose.
    """
    if devices.kind == "cpu":
        return CPU
    if devices.count == 1:
        return replace(alone(devices.first, is_measured=False), per_machine=1)
    each = apart(devices)
    together = tuple(joined(each[:count], devices.first_of(count)) for count in range(1, devices.count + 1))
    return replace(together[-1], together=together if are_unequal(each) else ())


def fastest_first(devices: Devices) -> Devices:
    """Returns the devices sorted by speed and then by free memory, so that the planner can leave out the last ones.

    Those of a Ray cluster are known only to its nodes, and stay as they are.
    """
    if devices.kind == "cpu" or devices.on_ray or devices.count == 1:
        return devices
    each = dict(zip(devices.indices, apart(devices)))
    if not are_unequal(list(each.values())):
        return devices
    order = sorted(devices.indices, key=lambda index: (-each[index].matrix, -each[index].free))
    return replace(devices, indices=tuple(order))


def apart(devices: Devices) -> list[Machine]:
    """Returns each GPU. The one that computes the least is asked first: what is measured on it counts for all GPUs of its model."""
    found = {device: alone(device) for device in sorted(devices.torch_devices, key=load_of)}
    return [found[device] for device in devices.torch_devices]


def alone(device: torch.device, *, is_measured: bool = True) -> Machine:
    """Returns one GPU with its rates, measured if ``is_measured`` and possible, and its free memory."""
    name = torch.cuda.get_device_name(device)
    found = replace(named(name), free=usable_bytes(device))
    if not is_measured:
        return found
    rates, about = calibrated(name, torch.__version__, device)
    if not rates:
        return replace(found, rates_from=f"{found.rates_from}; {about}")
    return replace(found, knows_seconds=True, rates_from=f"measured here on {about}", **rates)


def joined(each: Sequence[Machine], devices: Devices) -> Machine:
    """Returns the machine that devices of this host form when they wait for each other in every step."""
    link, measured_on = link_of(devices, each)
    return replace(
        as_slow_as(each),
        link=link,
        link_from=f"measured here by a group on {measured_on}" if measured_on else f"assumed for {link_name(link)}",
        knows_link=measured_on is not None,
        per_machine=devices.count,
    )


def are_unequal(each: Sequence[Machine]) -> bool:
    """Whether devices differ in speed or in free memory."""
    free = [machine.free for machine in each]
    return len({machine.name for machine in each}) > 1 or min(free) < ALIKE * max(free)


def warnings(devices: Devices) -> list[str]:
    """Returns a line for each reason why the devices work together badly."""
    if devices.kind == "cpu" or devices.count == 1:
        return []
    names = {index: torch.cuda.get_device_name(device) for index, device in zip(devices.indices, devices.torch_devices)}
    found = []
    if len(set(names.values())) > 1:
        each = ", ".join(f"{index} is {name}" for index, name in names.items())
        found.append(
            f"unequal GPUs ({each}): plans that split a step wait for the slowest GPU in every step; replicasN does not"
        )
    link, measured_on = link_of(devices, [named(name) for name in names.values()])
    if measured_on and link.bandwidth < SLOW_LINK:
        found.append(
            f"these GPUs exchange only {link.bandwidth / 1e9:.2g} GB/s (measured {measured_on}): "
            "the plan that sends the least is the fastest"
        )
    return found


def survey(devices: Devices) -> list[str]:
    """Returns a line for each GPU: its name, memory and compute capability."""
    lines = []
    for index, device in zip(devices.indices, devices.torch_devices):
        if device.type != "cuda":
            continue
        free, whole = free_bytes(device), torch.cuda.get_device_properties(device).total_memory
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        lines.append(f"GPU {index}: {name}, {free / GIB:.1f} of {whole / GIB:.1f} GiB free, compute capability {major}.{minor}")
    return lines


def usable_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU that a job can use. They include what this process has reserved, as it releases that before a job."""
    return allowed(free_bytes(device) + torch.cuda.memory_reserved(device))


def memory_limit() -> int | None:
    """Returns the bytes of each GPU that the user allows a process's tensors; None for all that is free.

    Raises:
        RequestError: when the variable has an unusable value. The default would take memory that is meant for other programs.
    """
    if message := CONFIG.rejected.get("memory_gib"):
        raise RequestError(message)
    return None if CONFIG.memory_gib is None else int(CONFIG.memory_gib * GIB)


def limit_memory(device: torch.device, *, enforced: bool = True) -> None:
    """Limits this process's tensors on a GPU to :func:`memory_limit`; see :func:`.offload.allow`.

    Raises:
        RequestError: see :func:`memory_limit`.
    """
    limit = memory_limit() if device.type == "cuda" else None
    if limit is not None:
        offload.allow(device, limit, enforced=enforced)


def allowed(nbytes: int) -> int:
    """Returns ``nbytes``, or :func:`memory_limit` if that is less.

    Raises:
        RequestError: see :func:`memory_limit`.
    """
    limit = memory_limit()
    return nbytes if limit is None else min(nbytes, limit)


def emptied(machine: Machine, devices: Devices) -> Machine:
    """Returns the machine as it is when all memory of its devices is free."""
    sizes = [allowed(torch.cuda.get_device_properties(device).total_memory) for device in devices.torch_devices]
    together = tuple(replace(some, free=min(sizes[:count])) for count, some in enumerate(machine.together, 1))
    return replace(machine, free=min(sizes), together=together)


def link_of(devices: Devices, each: Sequence[Machine]) -> tuple[Link, str | None]:
    """Returns the link between GPUs, and the day when a group measured it.

    A link that was not measured is assumed: NVLink if all GPUs have it and can access each other's memory, else PCIe. The day is
    None then.
    """
    if kept := hardware_cache.link_of(kind_of([machine.name for machine in each]), devices.names):
        return kept
    first, *others = devices.indices
    reached = all(torch.cuda.can_device_access_peer(first, other) for other in others)
    is_card = any("pcie" in machine.name.lower() for machine in each)  # H100 and A100 are also sold as PCIe cards
    has_nvlink = reached and not is_card and all(machine.link == LINKS["nvlink"] for machine in each)
    return LINKS["nvlink" if has_nvlink else "pcie"], None


def link_name(link: Link) -> str:
    """Returns the user's name of a link in ``LINKS``."""
    return next(LINK_NAMES[key] for key, known in LINKS.items() if known == link)


def kind_of(names: Sequence[str]) -> str:
    """Returns the key under which a link is saved: the models of its GPUs."""
    return " and ".join(sorted(set(names)))


def calibrated(name: str, torch_version: str, device: torch.device) -> tuple[dict[str, float], str]:
    """Returns the rates of a GPU, and the day of the measurement. They are read from disk, or measured now.

    No rates, and the reason, if the GPU computes something else, or if the measurement fails, for example because its memory is full:
    what is measured then would be kept.
    """
    with _measuring:
        if kept := hardware_cache.rates_of(name, torch_version):
            return kept
        if is_busy(device):
            return {}, "not measured here, as the GPU is busy"
        try:
            rates = measure(device)
        except RuntimeError as error:
            logger.info("the rates of %s are assumed: %s", name, reason_of(error))
            return {}, f"not measured here: {reason_of(error)}"
        finally:
            torch.cuda.empty_cache()  # release the memory that ComfyUI's process has used for it
        hardware_cache.keep_rates(name, torch_version, rates)
        return rates, hardware_cache.today()


def is_busy(device: torch.device) -> bool:
    """Whether a GPU computes something that does not end in a moment, as a text encoder's work does before a job."""
    if load_of(device) <= BUSY:
        return False
    time.sleep(MOMENT)
    return load_of(device) > BUSY


def measure(device: torch.device) -> dict[str, float]:
    """Measures the rates of a GPU in bf16: one matrix product, one attention, one copy.

    It takes less than a second, without the time to build kernels.
    """

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
        function = choice.fastest_alone(Kind(torch.device(device), torch.bfloat16, HEAD_DIM), tokens)
        states = function.operands(*(torch.randn(1, tokens, heads, HEAD_DIM, **about) for _ in range(3)), torch.bfloat16)
        attention = 4 * tokens**2 * heads * HEAD_DIM / median_seconds(lambda: function.attend(*states))
        large = torch.empty(2**28, device=device, dtype=torch.uint8)
        bandwidth = 2 * large.nbytes / median_seconds(large.clone)
    return {"matrix": matrix, "attention": attention, "bandwidth": bandwidth}
