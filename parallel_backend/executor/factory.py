"""Opens executors, and keeps one for a process that runs many jobs."""

import logging
import random
import threading
from uuid import uuid4

from ..cluster.lease import leased
from ..devices import Devices
from ..errors import GroupFailure
from ..group.registry import shared
from ..plan import Plan
from ..workload import Workload
from .base import Executor
from .cluster import ClusterExecutor
from .group import GroupExecutor
from .local import LocalExecutor
from .replicas import ReplicasExecutor

logger = logging.getLogger(__name__)


def open_executor(plan: Plan, devices: Devices) -> Executor:
    """Returns this process for one device; else the group that serve keeps, if it fits; else a group or replicas of its own."""
    if devices.on_ray:
        return cluster_executor(plan, devices)
    if plan.world_size == 1:
        return LocalExecutor(devices.first)
    if plan.replicas > 1:
        return ReplicasExecutor(plan, devices)
    return shared_group(plan, devices) or GroupExecutor(plan, devices)


def cluster_executor(plan: Plan, devices: Devices, *, is_serving: bool = False) -> Executor:
    """Returns an executor for devices of the Ray cluster: of the groups that ``serve`` keeps there for this plan, or of its own.

    Args:
        plan, devices: see :func:`open_executor`.
        is_serving: whether this process is ``serve``, so that others find its groups.
    """
    plan.check_world(devices.count)
    names = [f"{plan}#{place}" for place in range(1, plan.replicas + 1)]
    is_owner = is_serving or not set(names) <= set(leased())
    own = f"@{uuid4().hex[:8]}" if is_owner and not is_serving else ""
    found = [ClusterExecutor(name + own, is_owner=is_owner) for name in names]
    if not is_owner:
        logger.warning("using the groups that serve keeps on Ray for plan '%s'", plan)
        random.shuffle(found)  # so that several callers do not all begin with the same one
    return found[0] if plan.replicas == 1 else ReplicasExecutor(plan, devices, found)


def groups_on_cluster() -> dict[str, ClusterExecutor]:
    """Returns an executor for each group on the Ray cluster that a process of this pack keeps, by its name."""
    return {name: ClusterExecutor(name, is_owner=False) for name in leased()}


def shared_group(plan: Plan, devices: Devices) -> GroupExecutor | None:
    """Returns the group that ``serve`` keeps for this plan on these devices, or None."""
    for address in shared(str(plan), str(devices)):
        try:
            attached = GroupExecutor.attach(address)
        except GroupFailure:  # it has just ended
            continue
        logger.warning("using the group that serve keeps at %s", address.folder)
        return attached
    return None


class ExecutorCache:
    """Keeps one executor for a long-lived process, so that later jobs find it warm.

    Another plan or other devices replace it: two groups would both hold memory of the same GPUs.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._key: tuple[Plan, Devices] | None = None
        self._among: Devices | None = None
        self.executor: Executor | None = None

    def get(self, plan: Plan, devices: Devices, *, among: Devices | None = None) -> Executor:
        """Returns the executor kept for this plan and these devices, or a new one.

        Args:
            plan, devices: see :func:`open_executor`.
            among: all devices that ``auto`` chose from, if it left some unused; see :meth:`on`.
        Raises:
            RequestError, GroupUnavailable: when it cannot be opened. The executor that was kept stays.
        """
        with self._lock:
            if self._key != (plan, devices) or not self.executor.is_usable():
                opened = open_executor(plan, devices)  # starts nothing yet
                if self.executor is not None:
                    logger.warning("plan '%s' on %s takes the place of the one before", plan, devices)
                    self.executor.close()
                self.executor, self._key = opened, (plan, devices)
            self._among = among or devices
            return self.executor

    def on(self, devices: Devices, workload: Workload) -> Executor | None:
        """Returns the executor kept for these devices if its plan, whichever it is, can do the workload and gives ``single``'s video.

        None also if the workload has fewer videos than the plan has replicas: some replicas would be idle.
        """
        if self._key is None or self._among != devices or not self._key[0].is_exact:
            return None
        plan = self._key[0]
        if not plan.fits(workload.heads) or not plan.can_offload(workload.offload):
            return None
        if workload.batch is not None and plan.replicas > workload.jobs * workload.batch:
            return None
        return self.executor if self.executor.is_usable() else None

    def close(self) -> None:
        """Closes the executor that is kept."""
        with self._lock:
            if self.executor is not None:
                self.executor.close()
            self.executor, self._key = None, None
