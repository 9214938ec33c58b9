"""What commands do where no group can start."""

import sys
from collections.abc import Callable
from typing import TypeVar

from ..devices import Devices
from ..errors import GroupUnavailable
from ..executor.prepare import PreparedJob
from ..plan import AUTO, Plan

Made = TypeVar("Made")


def in_group_or_here(produce: Callable[[Plan, Devices], Made], prepared: PreparedJob, plan: str) -> Made:
    """Returns what ``produce`` makes with the prepared plan and devices; in this process if no group can start and the plan is ``auto``.

    Args:
        produce: makes the command's results.
        prepared: the job, with plan and devices.
        plan: as the user asked for it.
    Raises:
        GroupUnavailable: if no group can start for a plan that the user has named.
    """
    try:
        return produce(prepared.plan, prepared.devices)
    except GroupUnavailable as error:
        if plan != AUTO:
            raise
        print(f"no group: {error.summary}; working in this process", file=sys.stderr)
    return produce(Plan(), Devices.parse(AUTO) if prepared.devices.on_ray else prepared.devices)
