"""The command ``serve``: keeps a group that outlives a command."""

import os
import signal
from argparse import ArgumentParser, Namespace

import psutil

from ..cogvideox.checkpoint import bundled
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..config import CONFIG
from ..devices import Devices
from ..errors import GroupUnavailable, RequestError
from ..executor.feasible import check_cores
from ..executor.group import GroupExecutor
from ..executor.resolve import resolve, share_of
from ..group.hosts import Common, Place
from ..group.launcher import Launcher
from ..group.lending import lend
from ..group.muster import Leader, Member
from ..group.preflight import check_possible
from ..group.registry import running
from ..plan import AUTO, Plan
from ..workload import Workload
from .console import show
from .options import add_run_options


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``serve``."""
    add_run_options(parser)
    parser.add_argument("--model", default="demo", help="the model that plan auto is chosen for")
    parser.add_argument(
        "--nnodes",
        type=int,
        default=1,
        metavar="N",
        help="hosts that form one group, each with these devices",
    )
    parser.add_argument(
        "--node-rank",
        type=int,
        default=0,
        metavar="NUMBER",
        help="number of this host: 0 on the host where jobs are sent, 1, 2, … on the others; node 0 chooses the plan for auto",
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="address of node 0 on a private network, where the hosts meet"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=CONFIG.wait_seconds,
        metavar="SECONDS",
        help="timeout for the hosts to meet",
    )
    parser.set_defaults(run=serve)


def serve(args: Namespace) -> int:
    """Keeps a group until it is stopped: on this host, as node 0 of several hosts, or as a host that lends devices to node 0."""
    place = Place.asked(args.nnodes, args.node_rank, args.rendezvous, args.wait)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if place and place.node:
        return lend_devices(args, place)
    checkpoint = Checkpoint.open(bundled.find(args.model))
    nodes = place.nodes if place else 1
    chosen, devices, reason = resolve(args.plan, args.devices, Workload.of(checkpoint), nodes=nodes)
    check_cores(devices)
    muster = None
    if place is None:
        check_unserved(devices)
    else:
        common = Common.here(nodes=nodes, plan=str(chosen), kind=devices.kind, processes=devices.count)
        muster = Leader(place, common, str(devices))
    executor = GroupExecutor(chosen, devices, muster)
    try:
        executor.share()
        come_up(executor)
        where = " and ".join(map(str, muster.meeting.hosts)) if muster else str(devices)
        show(f"serving plan {chosen} on {where} ({reason}) at {executor.address.folder}; end it with stop or Ctrl-C")
        while executor.wait() != 0:
            come_up(executor)
            show(f"the group was lost; serving again at {executor.address.folder}")
    except KeyboardInterrupt:
        show("ending")
    finally:
        executor.close()
    return 0


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
    """Starts a group and waits until it answers. A group that is lost while it starts is started once more, or again each time a host left.

    Raises:
        GroupFailure: when it does not start.
    """
    tried = 0
    while True:
        executor.start()
        if executor.status()["state"] != "absent":
            return
        cause, tried = executor.lost, tried + 1
        if tried > 1 and not cause.gone:
            raise GroupUnavailable(
                f"the group did not start: {cause.cause}; twice, so it is not tried again", details=cause.details
            )
        show(f"the group was lost while it started: {cause.cause}")


def lend_devices(args: Namespace, place: Place) -> int:
    """Runs ``serve`` on a host that is not node 0."""
    chosen = None if args.plan == AUTO else Plan.parse(args.plan)
    devices = Devices.parse(args.devices)
    if chosen and args.devices == AUTO:
        devices = share_of(chosen, devices, place.nodes)
    check_possible(chosen, devices, place.nodes)
    common = Common.here(nodes=place.nodes, plan=str(chosen or AUTO), kind=devices.kind, processes=devices.count)
    muster = Member(place, common, str(devices))
    try:
        lend(Launcher(chosen, devices, muster), muster, show)
    except KeyboardInterrupt:
        show("ending")
    return 0
