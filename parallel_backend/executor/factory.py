"""Opens the executor for the devices and the plan that the user asks for."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..devices import Devices
from ..errors import GroupFailure, RequestError
from ..group.registry import running, shared
from ..plan import AUTO, IN_PARTS, Plan
from ..planner import hardware
from ..planner.cost_model import Work
from ..planner.machine import Machine
from ..planner.planner import choose
from .base import Executor
from .group import GroupExecutor
from .local import LocalExecutor
from .replicas import ReplicasExecutor

logger = logging.getLogger(__name__)

AS_ASKED = "as asked"
"""The reason for a plan that the user has set."""


def resolve(
    plan: str,
    devices: str,
    *,
    heads: int,
    layers: int | None = None,
    guided: bool = True,
    offload: str = "auto",
    work: Callable[[torch.device], Work] | None = None,
    nodes: int | None = None,
    jobs: int = 1,
    spread: bool = True,
    pieces: str = "videos",
) -> tuple[Plan, Devices, str]:
    """Resolves the user's plan and devices strings.

    ``auto`` devices are every GPU, or as many as a given plan needs; ``auto`` plan asks the planner, which predicts by what
    ``work`` says of a step on a device, or where it is not given by a published model's, for so many ``jobs`` one after the
    other, or ``pieces`` of one, which replicas may share where ``spread`` says so. It may leave devices unused.

    Args:
        nodes: hosts with such devices each, of a group that is to be served. None for a job, which a group that is served over
            several hosts does where its plan and its devices here fit these words.
    Returns:
        Plan, devices of this host, and the reason in one sentence.
    Raises:
        RequestError: when they do not fit each other, the model's heads or blocks, or where its weights are to wait.
    """
    found = Devices.parse(devices)
    if nodes is None and (served := served_over_hosts(plan, AUTO if devices == AUTO else str(found), heads=heads)):
        served[0].check_offload(offload)
        return served
    nodes = nodes or 1
    if plan == AUTO:
        found = hardware.fastest_first(found) if nodes == 1 else found
        machine = machine_of(found, can_shard=offload not in IN_PARTS)
        if nodes > 1:  # with an unknown network only the order of plans is predicted, and all hosts have come
            machine = replace(machine, knows_seconds=False)
        about = {"heads": heads, "guided": guided, "work": work and work(found.first), "machine": machine, "pieces": pieces}
        chosen, reason = choose(world_size=found.count * nodes, jobs=jobs, spread=spread and not is_served(found), **about)
        used = found.first_of(chosen.world_size // nodes)
        return chosen, used, "; ".join([reason, *hardware.warnings(used)])
    chosen = Plan.parse(plan)
    if devices == AUTO:
        found = share_of(chosen, found, nodes)
    chosen.check_world(found.count, nodes)
    chosen.check_heads(heads)
    if layers is not None:
        chosen.check_layers(layers)
    chosen.check_offload(offload)
    return chosen, found, AS_ASKED


def machine_of(devices: Devices, *, can_shard: bool = True) -> Machine:
    """The machine that the planner predicts for. A group of this pack on GPUs holds what the job is to have, so it counts as free."""
    machine = hardware.here(devices)
    machine = replace(
        machine, can_shard=can_shard, together=tuple(replace(some, can_shard=can_shard) for some in machine.together)
    )
    return hardware.emptied(machine, devices) if machine.free is not None and groups_on_gpus() else machine


def is_served(devices: Devices) -> bool:
    """Whether ``serve`` keeps a group on some of these devices: replicas would need their memory too."""
    return devices.kind != "cpu" and any(group["shared"] for group in groups_on_gpus())


def groups_on_gpus() -> list[dict[str, Any]]:
    """The descriptions of the user's groups on GPUs of this machine, whoever keeps them."""
    return [description for description in running().values() if not description["devices"].startswith("cpu")]


def share_of(plan: Plan, found: Devices, nodes: int = 1) -> Devices:
    """As many of the devices that were found as a plan needs on each of so many hosts.

    Raises:
        RequestError: when there are fewer GPUs.
    """
    count = plan.world_size // nodes
    if plan.world_size % nodes or count == found.count:
        return found  # what does not fit is said by who checks the plan
    if found.kind == "cpu":
        return Devices("cpu", tuple(range(count)))
    if count > found.count:
        raise RequestError(f"plan '{plan}' needs {count} GPUs here; this machine has {found.count}: use a smaller plan")
    return found.first_of(count)


def open_executor(plan: Plan, devices: Devices) -> Executor:
    """This process for one device, a shared group that fits where one is running, else a group of its own or several."""
    if plan.world_size == 1:
        return LocalExecutor(devices.first)
    if plan.replicas > 1:
        return ReplicasExecutor(plan, devices)
    return shared_group(plan, devices) or GroupExecutor(plan, devices)


def shared_group(plan: Plan, devices: Devices) -> GroupExecutor | None:
    """A group that ``serve`` keeps for this plan on these devices, if there is one."""
    for address in shared(str(plan), str(devices)):
        try:
            attached = GroupExecutor.attach(address)
        except GroupFailure:  # it has just ended
            continue
        logger.warning("using the group that serve keeps at %s", address.folder)
        return attached
    return None


def served_over_hosts(plan: str, devices: str, *, heads: int) -> tuple[Plan, Devices, str] | None:
    """The plan, devices here and reason of a group over several hosts that ``serve`` keeps and that these words and heads fit."""
    for description in running().values():
        if not description["shared"] or description["nodes"] == 1:
            continue
        kept = Plan.parse(description["plan"])
        if plan in (AUTO, str(kept)) and devices in (AUTO, description["devices"]) and kept.fits(heads):
            return kept, Devices.parse(description["devices"]), f"the group of {description['nodes']} hosts that serve keeps"
    return None


class ExecutorCache:
    """Keeps one executor for a long-lived process, so that later jobs find it warm.

    Another plan or other devices replace it: two groups would hold the same GPUs' memory twice.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._key: tuple[Plan, Devices] | None = None
        self._among: Devices | None = None
        self.executor: Executor | None = None

    def get(self, plan: Plan, devices: Devices, *, among: Devices | None = None) -> Executor:
        """The executor kept for this plan and these devices, or a new one.

        Args:
            plan, devices: see :func:`open_executor`.
            among: the devices that were there to choose from, where ``auto`` left some unused; see :meth:`on`.
        Raises:
            RequestError, GroupUnavailable: when there can be none; what is kept stays.
        """
        with self._lock:
            self._among = among or devices
            if self._key != (plan, devices) or not self.executor.is_usable():
                opened = open_executor(plan, devices)  # starts nothing yet
                if self.executor is not None:
                    logger.warning("plan '%s' on %s takes the place of the one before", plan, devices)
                    self.executor.close()
                self.executor, self._key = opened, (plan, devices)
            return self.executor

    def on(self, devices: Devices, *, heads: int, offload: str = "auto", videos: int | None = None) -> Executor | None:
        """The executor kept for these devices, whatever its exact plan, where a model of so many heads can use it, offloaded so.

        Sampling fewer ``videos`` than it has replicas would leave some of them idle, so then it is none.
        """
        if self._key is None or self._among != devices or not self._key[0].is_exact:
            return None
        plan = self._key[0]
        if not plan.fits(heads) or not plan.can_offload(offload) or plan.replicas > (videos or plan.replicas):
            return None
        return self.executor if self.executor.is_usable() else None

    def close(self) -> None:
        """Ends what is kept."""
        with self._lock:
            if self.executor is not None:
                self.executor.close()
            self.executor, self._key = None, None
