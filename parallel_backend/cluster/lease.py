"""Devices of the cluster that a process has leased for one group, and the actor that holds the group there."""

import logging
from concurrent.futures import Future, wait
from typing import Any
from uuid import uuid4

from ..config import CONFIG
from ..errors import GroupUnavailable, reason_of
from ..group.codec import LAST, Message, decode, encode
from ..group.connection import Broken
from ..plan import Plan
from .actor import greet, place
from .nodes import NAMESPACE, connect, devices_of, layout, nodes

logger = logging.getLogger(__name__)


def leased() -> list[str]:
    """Returns the names of all actors: the whole plan, ``#``, the replica's number, and ``@`` and a word unless ``serve`` keeps it."""
    connect()
    from ray.util import list_named_actors

    return sorted(each["name"] for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE)


def served() -> list[str]:
    """Returns the names of the actors that ``serve`` keeps."""
    return [name for name in leased() if "@" not in name]


def plan_of(name: str) -> Plan:
    """Returns the whole plan of a name."""
    return Plan.parse(name.partition("#")[0])


class Lease:
    """An actor with its devices, until :meth:`end`, or until the process that leased them ends.

    Args:
        handle: Ray's.
        bundles: Ray's placement group; None if another process owns the actor.
    """

    def __init__(self, handle: Any, bundles: Any = None):
        self.handle = handle
        self._bundles = bundles
        self._greeting: Future = greet(handle).future()
        self.was_lost = False
        """Whether the actor was up and then lost. If it is dead after that, it was ended: otherwise Ray starts it again."""

    def lose(self) -> None:
        """Begins to wait until the actor is up again."""
        before, self._greeting = self._greeting, greet(self.handle).future()
        self.was_lost = self.was_lost or (before.done() and not before.exception())

    def is_up(self, seconds: float = 0) -> bool:
        """Returns whether the actor is up, within ``seconds``."""
        wait([self._greeting], seconds)
        return bool(self.known)

    @property
    def known(self) -> dict[str, Any]:
        """What the actor says of itself; empty while it is not up."""
        greeting = self._greeting  # a later one, if another thread loses the actor meanwhile, would be waited for
        return greeting.result() if greeting.done() and not greeting.exception() else {}

    @property
    def dead(self) -> str | None:
        """Why Ray does not start the actor again; None if it does."""
        greeting = self._greeting  # see above
        error = greeting.exception() if greeting.done() else None
        return error and reason_of(error)

    @classmethod
    def take(cls, plan: Plan, name: str) -> "Lease":
        """Leases devices without waiting for them.

        Args:
            plan: of the group.
            name: by which other processes find the actor.
        Raises:
            RequestError: when the cluster is too small.
        """
        kind, sizes = devices_of(nodes())
        from ray.util.placement_group import placement_group

        count, each = layout(plan.world_size, sizes)
        bundles = placement_group([{"GPU" if kind == "cuda" else "CPU": each}] * count, strategy="PACK")
        return cls(place("Group", plan, bundles, 0, name), bundles)

    @classmethod
    def of(cls, name: str) -> "Lease":
        """Returns the actor that another process has leased.

        Raises:
            GroupUnavailable: when it is gone.
        """
        try:
            return cls(connect().get_actor(name, NAMESPACE))
        except ValueError as error:
            raise GroupUnavailable(f"no process keeps the group '{name}' on Ray any more") from error

    def look(self) -> dict[str, Any]:
        """Returns the overview of its group; empty if it does not answer, and is waited for."""
        ray = connect()
        try:
            return ray.get(self.handle.call.remote("look"), timeout=CONFIG.status_seconds)
        except ray.exceptions.RayError:
            self.lose()
            return {}

    def end(self) -> None:
        """Ends the actor, and the group with it, whoever owns it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():  # Ray ends it with the connection
            return
        try:
            ray.kill(self.handle, no_restart=True)
            if self._bundles:
                remove_placement_group(self._bundles)
        except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
            logger.warning("the group on Ray could not be ended: %s; Ray ends it when its cluster is gone", reason_of(error))


class RayChannel:
    """A request to the actor of a lease; see :class:`parallel_backend.executor.group_connection.Channel`.

    Args:
        lease: with the actor.
        message: the request, which is sent.
    """

    def __init__(self, lease: Lease, message: Message):
        self._ray, self._actor, self._number, self._is_done = connect(), lease.handle, uuid4().hex, False
        self._answers = self._actor.stream.options(num_returns="streaming").remote("ask", self._number, encode(message))

    def receive(self, seconds: float) -> Message | None:
        """Returns the next answer; None if none comes within ``seconds``.

        Raises:
            Broken: when the actor is lost.
        """
        try:
            if not self._ray.wait([self._answers], timeout=seconds)[0]:
                return None
            answer = decode(self._ray.get(next(self._answers)))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            self._is_done = True
            raise Broken(reason_of(error)) from error
        self._is_done = answer.kind in LAST
        return answer

    def cancel(self) -> None:
        """Asks the group to stop the job."""
        self._actor.call.remote("cancel", self._number)

    def close(self) -> None:
        """Asks the group to stop the job unless it is done."""
        if not self._is_done:
            self.cancel()
