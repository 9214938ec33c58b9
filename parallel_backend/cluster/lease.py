"""Devices of the cluster that this process has leased for one group, and the actor that holds the group there."""

import logging
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ..errors import GroupUnavailable, reason_of
from ..group.codec import Message, decode, encode
from ..group.connection import Broken
from ..plan import Plan
from .actor import RESOURCES, start_actor
from .nodes import NAMESPACE, connect, devices_of, layout, nodes

logger = logging.getLogger(__name__)


def leased() -> list[str]:
    """Returns the names of all actors: the whole plan, ``#``, the replica's number, and ``@`` and a word unless ``serve`` keeps it."""
    connect()
    from ray.util import list_named_actors

    return sorted(each["name"] for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE)


@dataclass
class Lease:
    """An actor with its devices, until :meth:`close`, or until this process ends."""

    actor: Any
    group: Any
    """Ray's placement group; None if another process owns the actor."""

    @classmethod
    def take(cls, plan: Plan, name: str) -> "Lease":
        """Leases devices without waiting for them.

        Args:
            plan: of the group.
            name: by which other processes find the actor.
        Raises:
            RequestError: when the cluster is too small.
        """
        connect()
        from ray.util.placement_group import placement_group

        kind, sizes = devices_of(nodes())
        count, each = layout(plan.world_size, sizes)
        group = placement_group([{RESOURCES[kind]: each}] * count, strategy="STRICT_PACK" if count == 1 else "PACK")
        return cls(start_actor("Group", (str(plan), kind, count), (group, 0), (kind, each), name), group)

    @classmethod
    def of(cls, name: str) -> "Lease":
        """Returns the actor that another process has leased.

        Raises:
            GroupUnavailable: when it is gone.
        """
        try:
            return cls(connect().get_actor(name, NAMESPACE), None)
        except ValueError as error:
            raise GroupUnavailable(f"no process keeps the group '{name}' on Ray any more") from error

    def close(self) -> None:
        """Ends the actor, and the group with it, unless another process owns it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if self.group is None or not ray.is_initialized():  # Ray ends it with the connection
            return
        try:
            ray.kill(self.actor, no_restart=True)
            remove_placement_group(self.group)
        except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
            logger.warning("the group on Ray could not be ended: %s; Ray ends it when its cluster is gone", reason_of(error))


class RayChannel:
    """A request to the actor of a lease; see :class:`parallel_backend.executor.group_connection.Channel`.

    Args:
        lease: with the actor.
        message: the request, which is sent.
    """

    def __init__(self, lease: Lease, message: Message):
        self._ray, self._actor, self._number = connect(), lease.actor, uuid4().hex
        self._answers = self._actor.stream.options(num_returns="streaming").remote("ask", self._number, encode(message))

    def receive(self, seconds: float) -> Message | None:
        """Returns the next answer; None if none comes within ``seconds``.

        Raises:
            Broken: when the actor is lost.
        """
        try:
            if not self._ray.wait([self._answers], timeout=seconds)[0]:
                return None
            return decode(self._ray.get(next(self._answers)))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            raise Broken(reason_of(error)) from error

    def cancel(self) -> None:
        """Asks the group to stop the job."""
        self._actor.call.remote("cancel", self._number)
