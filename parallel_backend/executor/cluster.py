"""The executor that runs jobs in a group on a Ray cluster."""

import json
import logging
import threading
import time
from contextlib import closing
from typing import Any

import torch

from ..cluster.actor import Presence, code_version
from ..cluster.lease import Lease, RayChannel
from ..cluster.nodes import connect
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.vae.frames import FramesListener
from ..cogvideox.vae.preview import PictureListener
from ..config import CONFIG
from ..devices import Devices
from ..errors import Cancelled, GroupError, GroupLost, GroupUnavailable, RequestError
from ..group.codec import Message
from ..group.connection import Broken
from ..group.job_fields import split_fields
from ..jobs import Job, Result
from ..plan import Plan
from . import recovery
from .base import Executor, StepListener, StopSignal, never, silent
from .group_connection import Keepsake, answers, last_answer, result_of

logger = logging.getLogger(__name__)

STARTING = "starting"
ANSWER_SECONDS = 5.0
"""Time for another process's actor to answer for the first time, if Ray has placed it."""


class ClusterExecutor(Executor):
    """Runs jobs in a group that an actor holds.

    Ray starts the actor with the first job, starts it again when it is lost, and ends it with :meth:`close` or with this process.

    Args:
        plan: of the group.
        devices: of the cluster, as many as the plan needs.
        name: of the actor.
        is_replica: whether other groups do the work while Ray replaces this one. If not, a lost job waits for that.
        is_owner: whether this process leases the devices. If not, it uses the actor of that name.
    """

    is_replaced = True

    def __init__(self, plan: Plan, devices: Devices, name: str, *, is_replica: bool = False, is_owner: bool = True):
        plan.check_world(devices.count)
        self.plan = plan
        self.devices = str(devices)
        self.name = name
        self._is_replica = is_replica
        self._is_owner = is_owner
        self._is_gone = False
        """Whether the process that owned the actor has ended it."""
        self._lease: Lease | None = None
        self._presence: Presence | None = None
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
        with self._lock:
            if self._presence and (reason := self._presence.dead):
                self._is_gone = not self._is_owner
                self.close()
                raise GroupUnavailable(f"plan '{self.plan}' does not run on Ray: {reason}")
            if self._lease is None:
                self._lease = Lease.take(self.plan, self.name) if self._is_owner else Lease.of(self.name)
                self._presence = Presence(self._lease.actor)

    def is_ready(self, seconds: float = 0) -> bool:
        """See :meth:`Executor.is_ready`. It waits for at most ``seconds``."""
        try:
            return self._up(seconds) is not None
        except (GroupUnavailable, RequestError) as error:
            logger.warning("%s", error)
            return False

    def _up(self, seconds: float = 0) -> tuple[Lease, Presence] | None:
        """Starts the actor if necessary. Returns it if it is up within ``seconds``; raises as :meth:`start` does."""
        with self._lock:
            self.start()
            return (self._lease, self._presence) if self._presence.look(seconds) else None

    def is_usable(self) -> bool:
        """See :meth:`Executor.is_usable`."""
        return not self._is_gone

    def is_there(self) -> bool:
        """See :meth:`Executor.is_there`."""
        return self._presence is not None and bool(self._presence.known)

    @property
    def node(self) -> str | None:
        """Name of the node that rank 0 is on; None while Ray has not placed it."""
        return self._presence.known.get("node") if self._presence else None

    def _run(
        self,
        job: Job,
        on_step: StepListener,
        should_stop: StopSignal,
        on_picture: PictureListener | None = None,
        on_frames: FramesListener | None = None,
    ) -> Result:
        def ask(job: Job, kept: Keepsake) -> Message:
            return self._ask(Message(job.kind, *split_fields(job)), on_step, should_stop, kept)

        def explain(lost: GroupLost) -> GroupLost:
            if self._is_replica and not self.is_there():
                raise lost  # the other replicas go on with the job
            return lost

        return result_of(*recovery.run_and_resume(job, ask, explain, Keepsake(on_picture, on_frames)))

    def _ask(
        self,
        message: Message,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        kept: Keepsake | None = None,
        seconds: float | None = None,
    ) -> Message:
        """Sends a request and returns its last answer; ``seconds`` is its timeout, if any."""
        lease, presence = self._wait(should_stop)
        channel, is_done = RayChannel(lease, message), False
        try:
            with closing(answers(channel, should_stop, seconds)) as found:
                answer = last_answer(found, on_step, kept or Keepsake())
                is_done = True
                return answer
        except Broken as error:
            is_done, node = True, presence.known.get("node")
            presence.lose()
            raise GroupLost(f"the group on node {node} was lost: {error}") from error
        finally:
            if not is_done:
                channel.cancel()

    def _wait(self, should_stop: StopSignal) -> tuple[Lease, Presence]:
        """Waits until Ray has placed the actor, and returns it.

        Raises:
            GroupUnavailable: see :meth:`start`; also after ``wait_seconds``.
            GroupError: when the node has another version of the pack.
            Cancelled: when ``should_stop`` returns True.
        """
        deadline = time.monotonic() + CONFIG.wait_seconds
        while not (up := self._up()):
            if should_stop():
                raise Cancelled("stopped while waiting for a node of the Ray cluster")
            if time.monotonic() > deadline:
                raise GroupUnavailable(
                    f"the Ray cluster has had no room for plan '{self.plan}' for {CONFIG.wait_seconds:.0f} s; add nodes, "
                    "or end what uses them (`ray status` shows it)"
                )
            time.sleep(CONFIG.poll_seconds)
        there = up[1].known
        if there["version"] != code_version():
            raise GroupError(
                f"node {there['node']} has version {there['version']} of the pack, and this machine {code_version()}; "
                "install the same on all nodes"
            )
        return up

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`. A group that Ray has not placed yet is ``starting``."""
        known = {"plan": str(self.plan), "devices": self.devices}
        if self._lease is None and self._is_owner:
            return {"state": "absent", **known}
        if not self.is_ready(0 if self._is_owner else ANSWER_SECONDS):
            return {"state": STARTING, **known, "node": None}
        return {**known, "node": self.node, **self._ask(Message("status"), seconds=CONFIG.status_seconds).plain}

    def look(self) -> dict[str, Any]:
        """Returns the overview of the group; see :func:`.overview.overview`."""
        known = {"plan": str(self.plan), "devices": self.devices, "ranks": []}
        if self._lease is None:
            return {**known, "state": "absent"}
        if not self.is_ready():
            return {**known, "state": STARTING, "doing": "waiting for a node of the Ray cluster", "stage": None}
        ray, (lease, presence) = connect(), (self._lease, self._presence)
        try:
            found = json.loads(ray.get(lease.actor.call.remote("look"), timeout=CONFIG.status_seconds))
        except ray.exceptions.RayError:
            presence.lose()
            return {**known, "state": STARTING, "doing": "starting again", "stage": None}
        node = presence.known.get("node")
        return {**found, **known, "ranks": [{**rank, "device": f"{node} {rank['device']}"} for rank in found["ranks"]]}

    def stage(self) -> str | None:
        """See :meth:`Executor.stage`."""
        found = self.look()
        return found.get("stage") or found.get("doing")

    def free(self) -> None:
        """See :meth:`Executor.free`."""
        if self.is_there():
            self._ask(Message("free"))

    def close(self) -> None:
        """See :meth:`Executor.close`. A group that another process owns keeps running."""
        with self._lock:
            if self._lease:
                self._lease.close()
            self._lease = self._presence = None
