"""Resolves the user's plan and devices strings, ``auto`` included."""

from dataclasses import replace
from typing import Any

from ..cluster import nodes as cluster
from ..cluster.lease import plan_of, served
from ..devices import RAY, Devices
from ..errors import RequestError
from ..group.registry import running
from ..plan import AUTO, IN_PARTS, Plan
from ..planner import hardware
from ..planner.machine import Machine
from ..planner.planner import assumed, choose
from ..system.limits import usable_cores
from ..workload import Workload

SET_BY_USER = "set by the user"
"""The reason for a plan that is not ``auto``."""
MOST_A_CORE = 4
"""Processes on a core of the CPU. More only wait for each other: a start takes minutes, and ranks count as hung."""


def resolve(plan: str, devices: str, workload: Workload, *, is_serving: bool = False) -> tuple[Plan, Devices, str]:
    """Resolves the user's plan and devices strings.

    ``auto`` devices are all GPUs, or as many as the plan needs. For an ``auto`` plan the planner predicts each plan's time and
    memory, and may leave devices unused.

    Args:
        plan: such as ``cfg2``, or ``auto``.
        devices: such as ``0,1``, ``cpu:2``, ``ray`` or ``auto``.
        workload: what the plan is for.
        is_serving: whether it is for ``serve``. A job uses a group that is served if it fits; see :func:`served_group`.
    Returns:
        Plan, devices, and the reason in one sentence.
    Raises:
        RequestError: when plan, devices, model and offload do not fit each other.
    """
    found = Devices.parse(devices)
    if not is_serving and plan == AUTO and (served := served_group(None if devices == AUTO else found, workload)):
        return served
    if plan == AUTO:
        return resolve_auto(found, workload)
    chosen, found = matched(plan, devices)
    chosen.check_heads(workload.heads)
    if workload.layers is not None:
        chosen.check_layers(workload.layers)
    chosen.check_offload(workload.offload)
    return chosen, found, SET_BY_USER


def check_strings(plan: str, devices: str) -> None:
    """Checks the user's strings for a job before its model is known.

    Raises:
        RequestError: when this machine lacks the devices, or plan and devices do not fit each other.
    """
    check_cores(Devices.parse(devices) if plan == AUTO else matched(plan, devices)[1])


def check_cores(devices: Devices) -> None:
    """Raises RequestError if the CPU has far too few cores for the processes."""
    cores = usable_cores()
    if devices.kind == "cpu" and not devices.on_ray and devices.count > MOST_A_CORE * cores:
        raise RequestError(
            f"devices '{devices}' are {devices.count} processes, and this machine has {cores} cores; use cpu:{cores}, and at most "
            f"cpu:{MOST_A_CORE * cores}"
        )


def matched(plan: str, devices: str) -> tuple[Plan, Devices]:
    """Returns a plan that is not ``auto`` and its devices, from the user's strings.

    Raises:
        RequestError: when they do not fit each other.
    """
    chosen, found = Plan.parse(plan), Devices.parse(devices)
    if devices in (AUTO, RAY):
        found = share_of(chosen, found)
    chosen.check_world(found.count)
    return chosen, found


def resolve_auto(found: Devices, workload: Workload) -> tuple[Plan, Devices, str]:
    """Returns the plan that is predicted to be the fastest, the devices that it uses, and the reason."""
    found = hardware.fastest_first(found)
    machine = machine_of(found, can_shard=workload.offload not in IN_PARTS)
    chosen, reason = choose(
        workload.work(found.first) if workload.work else assumed(workload.heads, workload.guided),
        machine,
        found.count,
        jobs=workload.jobs,
        can_share=workload.can_share and not is_served(found),
        unit=workload.unit,
    )
    used = found.first_of(chosen.world_size)
    return chosen, used, "; ".join([reason, *([] if used.on_ray else hardware.warnings(used))])


def machine_of(devices: Devices, *, can_shard: bool = True) -> Machine:
    """Returns the machine that the planner predicts for. Memory that a group of this pack holds counts as free: the job gets it."""
    if devices.on_ray:
        return replace(cluster.machine(), can_shard=can_shard)
    machine = hardware.here(devices)
    machine = replace(
        machine, can_shard=can_shard, together=tuple(replace(some, can_shard=can_shard) for some in machine.together)
    )
    return hardware.emptied(machine, devices) if machine.free is not None and groups_on_gpus() else machine


def is_served(devices: Devices) -> bool:
    """Whether ``serve`` keeps a group on GPUs of this machine. Replicas would need its memory."""
    return devices.kind != "cpu" and not devices.on_ray and any(group["shared"] for group in groups_on_gpus())


def groups_on_gpus() -> list[dict[str, Any]]:
    """Returns the descriptions of the user's groups on GPUs of this machine, whichever process owns them."""
    return [description for description in running().values() if not description["devices"].startswith("cpu")]


def share_of(plan: Plan, found: Devices) -> Devices:
    """Returns as many of the devices as a plan needs. On a Ray cluster it may wait for more than there are now.

    Raises:
        RequestError: when this machine has fewer GPUs.
    """
    count = plan.world_size
    if found.on_ray:
        return replace(found, indices=tuple(range(count)))
    if count == found.count:
        return found
    if found.kind == "cpu":
        return Devices("cpu", tuple(range(count)))
    if count > found.count:
        raise RequestError(f"plan '{plan}' needs {count} GPUs here; this machine has {found.count}: use a smaller plan")
    return found.first_of(count)


def served_group(devices: Devices | None, workload: Workload) -> tuple[Plan, Devices, str] | None:
    """Returns plan, devices and reason of a group that ``serve`` keeps, for a plan that is ``auto``, if the workload fits it.

    Args:
        devices: the user's; None for ``auto``, which a group on devices of the kind that is here fits.
        workload: what the group is for.
    """
    if devices and devices.on_ray:
        for kept in map(plan_of, served()):
            if can_do(kept, workload):
                return kept, share_of(kept, devices), "the groups that serve keeps on Ray"
        return None
    for description in running().values():
        if not description["shared"]:
            continue
        kept = Plan.parse(description["plan"])
        try:
            where = Devices.parse(description["devices"])
        except RequestError:  # GPUs that this process does not see
            continue
        same_kind = where.kind == Devices.parse(AUTO).kind if devices is None else where == devices
        if same_kind and can_do(kept, workload):
            return kept, where, "the group that serve keeps"
    return None


def can_do(plan: Plan, workload: Workload) -> bool:
    """Whether several ranks with a plan do a workload, and give ``single``'s video."""
    is_used = plan.world_size > 1 and plan.is_exact and (plan.cfg == 1 or workload.guided)
    return is_used and plan.fits(workload.heads) and plan.can_offload(workload.offload)
