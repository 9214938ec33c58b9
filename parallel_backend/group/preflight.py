"""Checks whether a group can start here before anything is started, and builds the environment of its processes."""

import os
import re
import socket
import sys
from pathlib import Path

import psutil

from ..config import CONFIG
from ..devices import Devices
from ..errors import GroupUnavailable, RequestError
from ..plan import Plan
from ..system.modules import has_module

PACK = Path(__file__).resolve().parents[2]
"""The folder that holds ``parallel_backend``."""
OTHER_LAUNCHERS = re.compile(
    "(PET|TORCHELASTIC|OMPI|PMI|PMIX|PRTE|HYDRA|MPI|MPIR|SLURM|FLUX|PALS|JSM|LSB)_.*|MASTER_(ADDR|PORT)|NNODES|ROLE_NAME"
    "|((LOCAL|GROUP|ROLE|NODE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE"
)
"""Variables by which torchrun, MPI and cluster schedulers assign ranks; they are not this group's."""
LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def group_python() -> str:
    """Returns the interpreter for a group's processes: ``XDIT_PYTHON``, or else this process's."""
    return os.path.expanduser(CONFIG.python) if CONFIG.python else sys.executable


def check_possible(plan: Plan | None, devices: Devices, nodes: int = 1) -> None:
    """Checks that a group can start here.

    Args:
        plan: None if it is not known yet.
        devices: of each machine.
        nodes: number of machines.
    Raises:
        RequestError: when plan and devices do not match.
        GroupUnavailable: when no group can start here, with the reason and what to do.
    """
    if plan:
        plan.check_world(devices.count, nodes)
        if plan.replicas > 1:
            raise RequestError(f"plan '{plan}': each replica is a separate group; one group takes plan '{plan.replica}'")
    if not sys.platform.startswith("linux"):
        raise GroupUnavailable(f"xDiT groups need Linux (this is {sys.platform}); on Windows use WSL2")
    if not CONFIG.python and not has_module("xfuser"):
        raise GroupUnavailable("xfuser is not installed: pip install xfuser, or set XDIT_PYTHON to a Python that has it")
    if nodes == 1:
        loopback()


def loopback() -> tuple[str, str]:
    """Returns the numeric loopback address and its interface. Needs no name resolution and no network.

    Raises:
        GroupUnavailable: when no loopback address works.
    """
    reasons = []
    for family, address in LOOPBACKS:
        try:
            with socket.create_server((address, 0), family=family) as server:
                socket.create_connection(server.getsockname()[:2], timeout=CONFIG.loopback_seconds).close()
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
            continue
        return address, interface_of(address) or "lo"
    raise GroupUnavailable(f"this machine has no loopback network ({'; '.join(reasons)}); bring it up: ip link set lo up")


def interface_of(address: str) -> str | None:
    """Returns the network interface with an address of this machine, for gloo and NCCL."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return "lo" if address.startswith("127.") else None


def without_other_launchers() -> dict[str, str]:
    """Returns this process's environment without the variables of torchrun, MPI and schedulers."""
    return {name: value for name, value in os.environ.items() if not OTHER_LAUNCHERS.fullmatch(name)}


def group_environment(kind: str) -> dict[str, str]:
    """Returns the environment of a fork server: the user's, without the variables of other launchers.

    Args:
        kind: of the group's devices, ``cuda`` or ``cpu``.
    """
    kept = without_other_launchers()
    paths = [str(PACK)]
    if CONFIG.python:
        kept.pop("PYTHONHOME", None)  # it belongs to this interpreter, as do the packages of PYTHONPATH
    elif os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    # Spinning threads take cores from computing ones: a step took 2.5 s, and 0.14 s with this bound (measured).
    spinning = {"GOMP_SPINCOUNT": "10000"} if kind == "cpu" else {}
    return {
        **kept,
        **spinning,
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "XDIT_LOGGING_LEVEL": "WARNING",
    }


def rank_environment(devices: Devices, interface: str | None, *, is_forced: bool) -> dict[str, str]:
    """Returns the environment of a group's ranks.

    Args:
        devices: of this machine.
        interface: network interface between the ranks.
        is_forced: whether it overrides the user's variables.
    """
    kept = group_environment(devices.kind)
    # From the host's name gloo often gets an address that other machines cannot reach.
    network = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"} if interface else {}
    return {
        **kept,
        **devices.environment(),
        **{name: value for name, value in network.items() if is_forced or name not in kept},
    }
