"""The actors that Ray starts on the nodes."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

from ..devices import Devices
from ..errors import GroupError
from ..plan import Plan
from .nodes import NAMESPACE, connect

PACKAGE = Path(__file__).resolve().parents[1]
KINDS = {"GPU": "cuda", "CPU": "cpu"}
"""The kinds of devices, by Ray's names for them."""
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


def place(role: str, plan: Plan, bundles: Any, number: int, name: str | None = None) -> Any:
    """Has Ray start an actor once its node is there, and again when it was lost. Returns its handle.

    Args:
        role: the class of :mod:`parallel_backend.executor.cluster_actor` in it.
        plan: of the whole group.
        bundles: Ray's placement group of the whole group.
        number: of the actor's bundle.
        name: by which other processes find it.
    """
    ray = connect()
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    own = bundles.bundle_specs[number]
    options = {"num_gpus": own.get("GPU", 0), "num_cpus": own.get("CPU", 0), "name": name, "namespace": NAMESPACE}
    options |= {"max_restarts": -1, "max_concurrency": CALLS}
    strategy = PlacementGroupSchedulingStrategy(bundles, number)
    return ray.remote(actor_class()).options(**options, scheduling_strategy=strategy).remote(role, str(plan))


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


def devices_here() -> Devices:
    """Returns the devices that Ray has given to this actor. The others of its node share the node's cores with them."""
    ray = connect()
    from ray.util import get_current_placement_group

    ((resource, own),) = get_current_placement_group().bundle_specs[0].items()
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    others = node["Resources"][resource] - own
    return Devices(KINDS[resource], tuple(range(int(own))), others=int(others))


@cache
def code_version() -> str:
    """Returns a digest of this package's code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
