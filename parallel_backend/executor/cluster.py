"""The executor that runs jobs in a group on a Ray cluster."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from ..cluster.actor import check_version
from ..cluster.lease import Lease, RayChannel, leased, plan_of
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..config import CONFIG
from ..devices import RAY
from ..errors import Cancelled, GroupLost, GroupUnavailable, RequestError
from ..group.codec import Message
from ..group.connection import Broken
from .base import StopSignal
from .group import ABSENT, FAILED, STARTING
from .group_connection import answers
from .remote import RemoteExecutor

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""Time for another process's actor to answer for the first time, if Ray has placed it."""


class ClusterExecutor(RemoteExecutor):
    """Runs jobs in a group that an actor holds.

    Ray starts the actor with the first job, starts it again when it is lost, and ends it with :meth:`close` or with this process.

    Args:
        name: of the actor; see :func:`parallel_backend.cluster.lease.leased`.
        is_owner: whether this process leases the devices. If not, it uses the actor of that name.
    """

    is_replaced = True

    def __init__(self, name: str, *, is_owner: bool = True):
        whole = plan_of(name)
        self.plan = whole.replica
        self.devices = f"{RAY}:{self.plan.world_size}"
        self.name = name
        self._is_replica = whole.replicas > 1
        """Whether other groups do the work while Ray replaces this one. If not, a lost job waits for that."""
        self.is_owner = is_owner
        self._lease: Lease | None = None
        self._failure: str | None = None
        """Why Ray could not start the actor, until it is tried again."""
        self._lock = threading.RLock()

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """See :attr:`Executor.torch_devices`: none of this machine's GPUs holds weights."""
        return (torch.device("cpu"),)

    def start(self, expected: Checkpoint | None = None) -> None:
        """See :meth:`Executor.start`. It leases the devices; nothing is read here, as the weights are the nodes'.

        Raises:
            RequestError: when the cluster is too small, or is gone.
            GroupUnavailable: when the actor cannot run on its node, or the group that ``serve`` kept is gone.
        """
        self._taken()

    def _taken(self) -> Lease:
        """Returns the lease, which is taken if there is none; raises as :meth:`start` does."""
        with self._lock:
            if self._lease and (reason := self._lease.dead):
                was_lost = self._lease.was_lost
                self.close()
                error = GroupUnavailable(f"plan '{self.plan}' does not run on Ray: {reason}")
                self._failure = None if was_lost else error.summary
                raise error
            if self._lease is None:
                self._lease = Lease.take(self.plan, self.name) if self.is_owner else Lease.of(self.name)
                self._failure = None
            return self._lease

    def is_ready(self, seconds: float = 0) -> bool:
        """See :meth:`Executor.is_ready`. It waits for at most ``seconds``."""
        try:
            return self._taken().is_up(seconds)
        except (GroupUnavailable, RequestError) as error:
            logger.warning("%s", error)
            return False

    def is_usable(self) -> bool:
        """See :meth:`Executor.is_usable`."""
        return self.is_owner or self.name in leased()

    @property
    def known(self) -> dict[str, Any]:
        """What the actor says of itself; empty while it is not up."""
        lease = self._lease
        return lease.known if lease else {}

    def is_there(self) -> bool:
        """See :meth:`Executor.is_there`."""
        return bool(self.known)

    def answers(self, message: Message, should_stop: StopSignal, seconds: float | None = None) -> Iterator[Message]:
        """See :meth:`RemoteExecutor.answers`. Waits until Ray has placed the actor."""
        lease = self._wait(should_stop)
        try:
            with closing(RayChannel(lease, message)) as channel:
                yield from answers(channel, should_stop, seconds)
        except Broken as error:
            node = lease.known.get("node")
            lease.lose()
            raise GroupLost(f"the group on node {node} was lost: {error}") from error

    def _explain(self, lost: GroupLost, should_stop: StopSignal) -> GroupLost:
        if self._is_replica and not self.is_there():
            raise lost  # the other replicas go on with the job
        return lost

    def _wait(self, should_stop: StopSignal) -> Lease:
        """Waits until Ray has placed the actor.

        Raises:
            GroupUnavailable: see :meth:`start`; also after ``wait_seconds``.
            GroupError: when the node has another version of the pack.
            Cancelled: when ``should_stop`` returns True.
        """
        deadline = time.monotonic() + CONFIG.wait_seconds
        while not (lease := self._taken()).is_up(CONFIG.poll_seconds):
            if should_stop():
                raise Cancelled("stopped while waiting for a node of the Ray cluster")
            if time.monotonic() > deadline:
                raise GroupUnavailable(
                    f"the Ray cluster has had no room for plan '{self.plan}' for {CONFIG.wait_seconds:.0f} s; add nodes, "
                    "or end what uses them (`ray status` shows it)"
                )
        check_version(lease.known)
        return lease

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`. It has the overview too. A group that Ray has not placed yet is ``starting``."""
        if not self.is_owner:
            self.is_ready(ANSWER_SECONDS)
        found = self.look()
        if not self._has_group(found):
            return found
        return {**found, **self._ask(Message("status"), seconds=CONFIG.status_seconds).plain}

    def _has_group(self, found: dict[str, Any]) -> bool:
        """Whether the actor is up and has a group, or can make one, by its overview."""
        return self.is_there() and found["state"] != FAILED

    def look(self) -> dict[str, Any]:
        """Returns the overview of the group; see :func:`.overview.overview`."""
        known = {"plan": str(self.plan), "devices": self.devices, "node": None, "ranks": []}
        is_ready = self._lease is not None and self.is_ready()
        if (lease := self._lease) is None:  # or it has just been given up
            return {**known, "state": FAILED, "last_error": self._failure} if self._failure else {**known, "state": ABSENT}
        if not is_ready:
            return {**known, "state": STARTING, "doing": "waiting for a node of the Ray cluster"}
        node = known["node"] = self.known.get("node")
        if not (found := lease.look()):
            return {**known, "state": STARTING, "doing": "starting again"}
        return {**found, **known, "ranks": [{**rank, "device": f"{node} {rank['device']}"} for rank in found["ranks"]]}

    def stage(self) -> str | None:
        """See :meth:`Executor.stage`."""
        found = self.look()
        return found.get("stage") or found.get("doing")

    def free(self) -> None:
        """See :meth:`Executor.free`."""
        if self._has_group(self.look()):
            self._ask(Message("free"))

    def stop(self) -> None:
        """Ends the group after the jobs in its queue, whoever owns it."""
        lease = self._taken()
        try:
            if lease.is_up(ANSWER_SECONDS) and self._has_group(self.look()):
                self._ask(Message("stop"))
        finally:
            lease.end()

    def close(self) -> None:
        """See :meth:`Executor.close`. A group that another process owns keeps running."""
        with self._lock:
            if self._lease and self.is_owner:
                self._lease.end()
            self._lease = None
