"""The command ``serve``: keeps a group that outlives a command."""

import os
import signal
import time
from argparse import ArgumentParser, Namespace
from typing import Any

import psutil

from ..cluster.lease import plan_of, served
from ..cogvideox.checkpoint import bundled
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..devices import Devices
from ..errors import GroupUnavailable, RequestError
from ..executor.factory import cluster_executor
from ..executor.group import ABSENT, FAILED, GroupExecutor
from ..executor.replicas import ReplicasExecutor
from ..executor.resolve import check_cores, resolve
from ..group.registry import running
from ..plan import Plan
from ..workload import Workload
from .console import show
from .options import add_former_options, add_run_options
from .status import dashboard_line


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``serve``."""
    add_run_options(parser)
    parser.add_argument("--model", default="demo", help="the model that plan auto is chosen for")
    add_former_options(parser, "--nnodes", "--node-rank", "--rendezvous", "--wait")
    parser.set_defaults(run=serve)


def serve(args: Namespace) -> int:
    """Keeps a group until it is stopped, on this machine or on a Ray cluster."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    checkpoint = Checkpoint.open(bundled.find(args.model))
    chosen, devices, reason = resolve(args.plan, args.devices, Workload.of(checkpoint), is_serving=True)
    if devices.on_ray:
        return serve_on_ray(chosen, devices, reason)
    check_cores(devices)
    check_unserved(devices)
    executor = GroupExecutor(chosen, devices)
    try:
        executor.share()
        come_up(executor)
        show(f"serving plan {chosen} on {devices} ({reason}) at {executor.address.folder}; end it with stop or Ctrl-C")
        while executor.wait() != 0:
            come_up(executor)
            show(f"the group was lost; serving again at {executor.address.folder}")
    except KeyboardInterrupt:
        show("ending")
    finally:
        executor.close()
    return 0


def serve_on_ray(chosen: Plan, devices: Devices, reason: str) -> int:
    """Keeps groups on the Ray cluster, and says which are up."""
    if names := served():
        raise RequestError(f"serve keeps plan {plan_of(names[0])} on the Ray cluster already; end it with stop --ray")
    executor = cluster_executor(chosen, devices, is_serving=True)
    groups = executor.replicas if isinstance(executor, ReplicasExecutor) else [executor]
    show(f"serving plan {chosen} on the Ray cluster ({reason}); {dashboard_line()}; end it with stop --ray or Ctrl-C")
    shown = None
    try:
        executor.start()
        while is_any_left(found := [group.look() for group in groups]):
            if (line := line_of(found)) != shown:
                show(line)
            shown = line
            time.sleep(1)
        if errors := errors_of(found):
            raise GroupUnavailable(f"no group is left: {errors[0]}")
        show("no group is left")
    except KeyboardInterrupt:
        show("ending")
    finally:
        executor.close()
    return 0


def is_any_left(found: list[dict[str, Any]]) -> bool:
    """Whether some group is up or may come up, from their overviews."""
    return any(each["state"] not in (ABSENT, FAILED) for each in found)


def line_of(found: list[dict[str, Any]]) -> str:
    """Returns how many groups are up and on which nodes, and why others are not, from their overviews."""
    up, errors = [each["node"] or "?" for each in found if each["state"] in ("ready", "busy")], errors_of(found)
    where, failed = f": on {', '.join(up)}" if up else "", f"; {len(errors)} failed: {errors[0]}" if errors else ""
    return f"{len(up)} of {len(found)} groups are up{where}{failed}"


def errors_of(found: list[dict[str, Any]]) -> list[str]:
    """Returns why groups failed, from their overviews."""
    return [each["last_error"] for each in found if each["state"] == FAILED]


def check_unserved(devices: Devices) -> None:
    """Raises RequestError if ``serve`` keeps a group on some of the devices already, as both would hold memory there."""
    for address, description in running().items():
        others, own = description["devices"], str(devices)
        is_same = others == own or (devices.kind == "cuda" and bool({*others.split(",")} & {*own.split(",")}))
        if is_same and description["shared"] and sees_the_same_gpus(description["owner"]):
            raise RequestError(
                f"serve keeps plan {description['plan']} on {others} already (process {description['owner']}, {address.folder}); "
                "end it with stop, or use other devices"
            )


def sees_the_same_gpus(pid: int) -> bool:
    """Whether a process numbers the GPUs as this one does."""
    try:
        return psutil.Process(pid).environ().get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    except psutil.Error:
        return True


def come_up(executor: GroupExecutor) -> None:
    """Starts a group and waits until it answers. A group that is lost while it starts is started once more.

    Raises:
        GroupFailure: when it does not start.
    """
    tried = 0
    while True:
        executor.start()
        if executor.status()["state"] != ABSENT:
            return
        cause, tried = executor.lost, tried + 1
        if tried > 1:
            raise GroupUnavailable(
                f"the group did not start: {cause.cause}; twice, so it is not tried again", details=cause.details
            )
        show(f"the group was lost while it started: {cause.cause}")
