"""The actors that Ray starts on the nodes."""

import hashlib
import json
import os
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

from ..config import CONFIG
from ..errors import reason_of
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


def start_actor(role: str, about: tuple, place: tuple[Any, int], devices: tuple[str, int], name: str | None = None) -> Any:
    """Returns an actor, which Ray starts once its node is there, and again when it is lost.

    Args:
        role: the class of :mod:`parallel_backend.executor.cluster_actor` in it.
        about: plain arguments of that class.
        place: a placement group, and the number of the bundle.
        devices: their kind, and the number.
        name: by which other processes find it.
    """
    ray = connect()
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    kind, count = devices
    needs = {"num_gpus": count, "num_cpus": 0} if kind == "cuda" else {"num_cpus": count}
    return (
        ray.remote(actor_class())
        .options(
            **needs,
            name=name,
            namespace=NAMESPACE,
            max_restarts=-1,
            max_concurrency=CALLS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(*place),
        )
        .remote(role, *about)
    )


def about_here() -> dict[str, Any]:
    """Returns what an actor says of itself when it starts."""
    ray = connect()
    address = ray.util.get_node_ip_address()
    node_id = ray.get_runtime_context().get_node_id()
    known = {"node": socket.gethostname(), "node_id": node_id, "address": address}
    return {**known, "pid": os.getpid(), "version": code_version()}


def devices_here(kind: str) -> int:
    """Returns how many devices of a kind this actor's node has. Those that are not its own share the node's cores with it."""
    ray = connect()
    here = ray.get_runtime_context().get_node_id()
    return next(int(node["Resources"].get(RESOURCES[kind], 0)) for node in ray.nodes() if node["NodeID"] == here)


class Presence:
    """Whether an actor is up. It asks the actor, and again when that was lost."""

    def __init__(self, actor: Any):
        self._actor = actor
        self.known: dict[str, Any] = {}
        """What the actor says of itself; empty while it is not up."""
        self.dead: str | None = None
        """Why Ray does not start the actor again."""
        self.lose()

    def look(self, seconds: float = 0) -> bool:
        """Returns whether the actor is up, within ``seconds``."""
        ray = connect()
        if self.known:
            return True
        if not ray.wait([self._answer], timeout=seconds)[0]:
            return False
        try:
            self.known = json.loads(ray.get(self._answer))
        except ray.exceptions.ActorUnavailableError:  # Ray starts it again
            if time.monotonic() - self._asked > CONFIG.retry_seconds:
                self.lose()
        except ray.exceptions.RayError as error:
            self.dead = reason_of(error)
        return bool(self.known)

    def lose(self) -> None:
        """Begins to wait until the actor is up again."""
        self.known = {}
        self._asked = time.monotonic()
        self._answer = self._actor.call.remote("start")


@cache
def code_version() -> str:
    """Returns a digest of this package's code. Nodes with different code would compute different things."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
