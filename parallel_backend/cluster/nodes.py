"""The Ray cluster that this process uses, and its nodes."""

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from ..errors import RequestError, reason_of
from ..planner.gpu_table import named
from ..planner.machine import CPU, Machine, as_slow_as
from ..system.modules import has_module

ADDRESS = "RAY_ADDRESS"
"""Ray's own environment variable: the cluster's address, such as ``10.0.0.1:6379``."""
NAMESPACE = "cogvideox-xdit"
"""Ray's namespace of the actors."""
REACH_SECONDS = 5.0
"""After this long without a connection an address counts as wrong: Ray itself tries for minutes, and prints a line at each attempt."""
_connecting = threading.Lock()
GPU_TYPE = "accelerator_type:"
"""Start of the resource by which Ray names a node's kind of GPU."""


@dataclass(frozen=True)
class Node:
    """One node of the cluster."""

    name: str
    address: str
    cpus: int
    gpus: int
    gpu: str | None
    """Ray's name for its kind of GPU, such as ``H100``."""

    @classmethod
    def of(cls, known: dict) -> "Node":
        """Returns a node from Ray's description of it."""
        has = known["Resources"]
        gpu = next((name.removeprefix(GPU_TYPE) for name in has if name.startswith(GPU_TYPE)), None)
        sizes = (int(has.get(kind, 0)) for kind in ("CPU", "GPU"))
        return cls(known["NodeManagerHostname"], known["NodeManagerAddress"], *sizes, gpu)


def connect() -> ModuleType:
    """Connects this process to the cluster unless it is connected, and returns the module ``ray``.

    Raises:
        RequestError: when Ray is not installed, or there is no cluster.
    """
    if not has_module("ray"):
        raise RequestError("devices 'ray' need Ray, which is not installed: pip install -r requirements-ray.txt")
    import ray

    with _connecting:
        _connect(ray)
    return ray


def _connect(ray: ModuleType) -> None:
    if ray.is_initialized():
        return
    address = os.environ.get(ADDRESS) or "auto"
    if address.startswith("ray://"):
        raise RequestError(
            f"{ADDRESS} is {address}, of Ray's client; run this on a node of the cluster (`ray start --num-gpus 0` joins one), "
            "and set the address without ray://, or none"
        )
    try:
        check_reached(address)
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="WARNING")
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, or AuthenticationError
        raise RequestError(
            f"no Ray cluster answers at '{address}' ({reason_of(error)}); start one with `ray start --head`, or set {ADDRESS}"
        ) from error


def check_reached(address: str) -> None:
    """Raises OSError if nothing listens at an address. One without a port, such as ``auto``, is left to Ray."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


def dashboard() -> str | None:
    """Returns the address of Ray's dashboard; None if it does not run."""
    found = connect().init(ignore_reinit_error=True, logging_level="ERROR").dashboard_url
    return f"http://{found}" if found else None


def nodes() -> list[Node]:
    """Returns the nodes that are alive, those with most devices first."""
    found = [Node.of(each) for each in connect().nodes() if each["Alive"]]
    return sorted(found, key=lambda node: (-node.gpus, -node.cpus, node.name))


def devices_of(found: Sequence[Node]) -> tuple[str, list[int]]:
    """Returns the kind of device that groups use, and the number on each node that has some: GPUs, or CPUs where there is no GPU.

    Raises:
        RequestError: when there are none.
    """
    for kind, sizes in (("cuda", [node.gpus for node in found]), ("cpu", [node.cpus for node in found])):
        if any(sizes):
            return kind, [size for size in sizes if size]
    raise RequestError("the Ray cluster has no GPU and no CPU; add nodes with `ray start --address …`")


def layout(size: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Returns how a group is laid out: the number of bundles, each on one node, and the devices of a bundle.

    Consecutive ranks share a bundle, so the inner degrees of a plan (tensor, ulysses, ring) stay on a node if they fit.

    Args:
        size: devices of the group.
        sizes: devices of each node.
    Raises:
        RequestError: when the cluster is too small for one such group.
    """
    for count in range(1, size + 1):
        each, left = divmod(size, count)
        if left == 0 and sum(there // each for there in sizes) >= count:
            return count, each
    raise RequestError(
        f"a group of {size} devices does not fit: the nodes of the Ray cluster have {', '.join(map(str, sizes))}; "
        "use a smaller plan, or replicasN, or add nodes"
    )


def machine() -> Machine:
    """Returns the cluster as the planner sees it: as many devices on each node as the smallest has, of the slowest kind."""
    found = nodes()
    kind, sizes = devices_of(found)
    if kind == "cpu":
        return replace(CPU, per_machine=min(sizes))
    return replace(as_slow_as([named(node.gpu or "unknown") for node in found if node.gpus]), per_machine=min(sizes))


def usable(sizes: Sequence[int]) -> int:
    """Returns the devices that a plan for ``machine`` may use: each node gives whole multiples of what the smallest has."""
    return sum(size // min(sizes) * min(sizes) for size in sizes)
