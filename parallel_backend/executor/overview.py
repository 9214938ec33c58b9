"""What an executor's ranks are and do at the moment, for a panel. Never starts a group, and never waits for one."""

import os
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from ..devices import Devices
from ..errors import GroupFailure
from ..group import failures
from ..group.heartbeat import Board
from ..plan import Plan
from ..system.nvml import used_and_total
from .base import Executor
from .cluster import ClusterExecutor
from .group import ABSENT, FAILED, STARTING, GroupExecutor, state_of_several
from .replicas import ReplicasExecutor


def overview(executor: Executor) -> dict[str, Any]:
    """Returns plan, devices, state and ranks as plain values.

    The state is ``absent``, ``starting``, ``failed``, ``ready`` or ``busy``; ``last_error`` says why a group failed, in one line.
    ``link`` and ``latency``, in bytes per second and seconds, are known once a group has answered. Each rank has its device, its
    share of the work, what it does, and the memory in use and in all, in bytes.
    """
    if isinstance(executor, ReplicasExecutor):
        return of_replicas(executor)
    if isinstance(executor, GroupExecutor):
        return of_group(executor)
    if isinstance(executor, ClusterExecutor):
        return executor.look()
    said, (device,) = executor.status(), executor.torch_devices
    rank = {
        "rank": 0,
        "device": str(device),
        "share": "all",
        "doing": executor.stage(),
        "memory": memory_of(device, os.getpid()),
    }
    return {"plan": str(executor.plan), "devices": str(device), "state": said["state"], "ranks": [rank]}


def of_group(executor: GroupExecutor) -> dict[str, Any]:
    """Returns the overview of one group."""
    known = {"plan": str(executor.plan), "devices": executor.devices, "ranks": []}
    description = description_of(executor)
    if not description:
        error = failures.last(str(executor.plan), executor.devices)
        return {**known, "state": FAILED, "last_error": error} if error else {**known, "state": ABSENT}
    known["ranks"] = ranks_of(executor.plan, executor.devices, description)
    if not Path(executor.address.socket).exists():
        return {**known, "state": STARTING, "doing": executor.stage()}
    try:
        said = executor.status()
    except GroupFailure:
        return {**known, "state": STARTING, "doing": "starting again"}
    return {**known, **{name: said[name] for name in ("state", "jobs", "link", "latency", "last_error") if name in said}}


def of_replicas(executor: ReplicasExecutor) -> dict[str, Any]:
    """Returns the overview of several groups as one."""
    parts = [overview(replica) for replica in executor.replicas]
    ranks = [
        {**rank, "share": f"replica {place}, {rank['share']}"} for place, part in enumerate(parts, 1) for rank in part["ranks"]
    ]
    state = state_of_several(part["state"] for part in parts)
    numbered = [{**rank, "rank": number} for number, rank in enumerate(ranks)]
    known = {"plan": str(executor.plan), "devices": str(executor.devices), "state": state, "ranks": numbered}
    errors = [f"replica {place}: {part['last_error']}" for place, part in enumerate(parts, 1) if part.get("last_error")]
    return {**known, "last_error": errors[0]} if errors else known


def description_of(executor: GroupExecutor) -> dict[str, Any]:
    """Returns the description in a group's folder; empty if the group does not run."""
    address = executor.address
    try:
        return address.describe() if address and executor.is_there() else {}
    except (OSError, ValueError):
        return {}


def ranks_of(plan: Plan, devices: str, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns this host's ranks of a group."""
    first, pids = description.get("first_rank", 0), description.get("ranks", [])
    doing: list[str | None] = [None] * description["processes"]
    with suppress(OSError, KeyError), closing(Board.open(description["board"], description["processes"])) as board:
        beats = [board.heartbeat(place) for place in range(description["processes"])]
        doing = [beat.doing if beat else None for beat in beats]
    return [
        {
            "rank": first + place,
            "device": str(device),
            "share": share_of_rank(plan, first + place),
            "doing": doing[place],
            "memory": memory_of(device, pids[place] if place < len(pids) else None),
        }
        for place, device in enumerate(Devices.parse(devices).torch_devices)
    ]


def share_of_rank(plan: Plan, rank: int) -> str:
    """Describes a rank's share of a step. Ranks of a tensor degree follow each other, then those of the sequence, the stages, and cfg."""
    parts, left = [], rank
    for name, degree in (("tensor", plan.tensor), ("sequence", plan.sequence), ("stage", plan.pipefusion)):
        if degree > 1:
            parts.append(f"{name} {left % degree + 1}/{degree}")
        left //= degree
    if plan.cfg > 1:
        parts.append("cfg +" if left % plan.cfg else "cfg −")  # the first one runs the negative prompt
    return ", ".join(reversed(parts)) or "all"


def memory_of(device, pid: int | None) -> dict[str, int]:
    """Returns the bytes in use and in all: of a GPU, or of main memory by the process of a rank, which may not be there yet."""
    if device.type == "cuda":
        used, total = used_and_total(device)
        return {"used": used, "total": total}
    try:
        used = psutil.Process(pid).memory_info().rss if pid else 0
    except psutil.Error:
        used = 0
    return {"used": used, "total": psutil.virtual_memory().total}
