"""The actors that Ray starts on the nodes."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import GroupError
from ..plan import Plan
from .nodes import NAMESPACE, connect

PACKAGE = Path(__file__).resolve().parents[1]
RESOURCES = {"cuda": "GPU", "cpu": "CPU"}
"""Ray's names for the kinds of devices."""
CALLS = 64
"""Calls that an actor answers at a time; each request is one until it is done."""


def actor_class():
    """Returns the class that Ray starts. It is sent by value and imports the pack of its node, as the caller may have it under another name."""
    pack, module = str(PACKAGE.parent), f"{PACKAGE.name}.executor.cluster_actor"

    class XDiTGroup:
        def __init__(self, role: str, *about):
            import importlib
            import sys

            if pack not in sys.path:
                sys.path.append(pack)
            self.held = getattr(importlib.import_module(module), role)(*about)

        def call(self, name: str, *words):
            return getattr(self.held, name)(*words)

        def stream(self, name: str, *words):
            yield from getattr(self.held, name)(*words)

    return XDiTGroup


def place(role: str, plan: Plan, kind: str, count: int, bundle: tuple[Any, int], name: str | None = None) -> Any:
    """Has Ray start an actor once its node is there, and again when it was lost. Returns its handle.

    Args:
        role: the class of :mod:`parallel_backend.executor.cluster_actor` in it.
        plan: of the whole group.
        kind: of its devices.
        count: bundles of the group; each has equally many devices.
        bundle: a placement group, and the number of the bundle.
        name: by which other processes find it.
    """
    ray = connect()
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    each = plan.world_size // count
    options = {"num_gpus": each, "num_cpus": 0} if kind == "cuda" else {"num_cpus": each}
    options |= {"name": name, "namespace": NAMESPACE, "max_restarts": -1, "max_concurrency": CALLS}
    strategy = PlacementGroupSchedulingStrategy(*bundle)
    return ray.remote(actor_class()).options(**options, scheduling_strategy=strategy).remote(role, str(plan), kind, count)


def greet(handle: Any) -> Any:
    """Asks an actor where it is; see :func:`about_here`. Returns Ray's reference to the answer, which comes once the actor is up."""
    return handle.call.options(max_task_retries=-1).remote("start")


def check_version(about: dict[str, Any]) -> None:
    """Raises GroupError when the code of an actor's node differs from this one's, and would compute something else."""
    own = code_version()
    if about["version"] != own:
        raise GroupError(
            f"node {about['node']} has version {about['version']} of the pack, and {socket.gethostname()} {own}; "
            "install the same on all nodes"
        )


def about_here() -> dict[str, Any]:
    """Returns what an actor says of itself when it starts."""
    ray = connect()
    node_id, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
    return {"node": socket.gethostname(), "node_id": node_id, "address": address, "pid": os.getpid(), "version": code_version()}


def devices_here(kind: str) -> int:
    """Returns how many devices of a kind this actor's node has. Those that are not its own share the node's cores with it."""
    here = connect().get_runtime_context().get_node_id()
    return next(int(node["Resources"].get(RESOURCES[kind], 0)) for node in connect().nodes() if node["NodeID"] == here)


@cache
def code_version() -> str:
    """Returns a digest of this package's code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
