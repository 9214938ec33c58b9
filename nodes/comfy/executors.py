"""The executors that ComfyUI's process keeps: one group, and this process on each device that was used."""

import atexit
from weakref import WeakKeyDictionary

import comfy.model_management as management
import torch

from ...parallel_backend.devices import Devices
from ...parallel_backend.executor.base import Executor
from ...parallel_backend.executor.factory import ExecutorCache
from ...parallel_backend.executor.local import LocalExecutor
from ...parallel_backend.group.launcher import start_no_more
from ...parallel_backend.plan import Plan
from .model_patcher import HeldWeights

groups = ExecutorCache()
held: dict[Executor, HeldWeights] = {}
"""What each executor holds, as ComfyUI counts it."""
local_executors: dict[torch.device, LocalExecutor] = {}
chosen: WeakKeyDictionary[Executor, str] = WeakKeyDictionary()
"""The line that says which plan ``auto`` chose for an executor, and why."""


@atexit.register
def end() -> None:
    """Ends the group with ComfyUI. ComfyUI's worker goes on in its thread meanwhile, and must neither start it again nor begin another job."""
    management.interrupt_current_processing()
    start_no_more()
    groups.close()


def kept_group() -> Executor | None:
    """Returns the executor of the group that is kept, or was."""
    return groups.executor


def start_group(plan: Plan, devices: Devices) -> None:
    """Starts a group in place of the one that is kept, without waiting for it.

    Raises:
        RequestError, GroupUnavailable: when no such group can run here.
    """
    groups.get(plan, devices).start()


def close_group() -> None:
    """Ends the group that is kept."""
    if weights := held.pop(groups.executor, None):
        weights.forget()
    groups.close()


def close_if_replaced(executor: Executor) -> None:
    """Ends the group of an executor that is kept no longer: the panel ended it before a job that started it again."""
    if executor is not groups.executor and executor not in local_executors.values():
        executor.close()


def free(executor: Executor) -> None:
    """Frees what an executor holds, as ComfyUI does when it unloads models."""
    if executor in held:
        held[executor].detach()
