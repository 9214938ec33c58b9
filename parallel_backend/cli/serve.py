"""The commands ``serve``, ``status`` and ``stop``: groups that outlive a command."""

import signal
from argparse import Namespace

from ..cogvideox.checkpoint import bundled
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..devices import Devices
from ..errors import GroupFailure, GroupUnavailable
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
from .console import show, show_json


def serve(args: Namespace) -> int:
    """Keeps a group until it is stopped: on this host, as node 0 of several hosts, or as a host that lends devices to node 0."""
    place = Place.asked(args.nnodes, args.node_rank, args.rendezvous, args.wait)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if place and place.node:
        return lend_devices(args, place)
    checkpoint = Checkpoint.open(bundled.find(args.model))
    nodes = place.nodes if place else 1
    chosen, devices, reason = resolve(args.plan, args.devices, Workload.of(checkpoint), nodes=nodes)
    muster = None
    if place:
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


def status(args: Namespace) -> int:
    """Prints the groups that are running."""
    groups = []
    for address, description in running().items():
        try:
            said = GroupExecutor.attach(address).status()
        except GroupFailure as error:
            said = {"state": f"does not answer ({error.summary})"}
        groups.append({"folder": str(address.folder), **description, **said})
    if args.json:
        show_json({"groups": groups})
        return 0
    for group in groups:
        if "uptime" not in group:
            kept = f"kept by process {group['owner']}, logs {group['folder']}/logs"
            show(f"{group['plan']} on {group['devices']}: {group['state']}, {kept}")
            show_hosts(group)
            continue
        memory = "/".join(f"{size / 2**30:.1f}" for size in group["memory"]) or "-"
        show(
            f"{group['plan']} on {group['devices']}: {group['state']}, up {group['uptime']:.0f} s, jobs {group['jobs']}, "
            f"queue {group['queue']}, model {group['model']}, memory {memory} GiB, "
            f"link {group['link'] / 1e9:.2g} GB/s and {group['latency'] * 1e6:.0f} us, kept by process {group['owner']}, "
            f"logs {group['folder']}/logs, last error {group['last_error']}"
        )
        show_hosts(group)
    if not groups:
        show("no group is running")
    return 0


def show_hosts(group: dict) -> None:
    """Prints a line for each host of a group, with its memory if known."""
    for host in group.get("hosts") or ():
        memory = group.get("memory", [])[host["first_rank"] : host["first_rank"] + host["processes"]]
        held = f", memory {'/'.join(f'{size / 2**30:.1f}' for size in memory)} GiB" if memory else ""
        show(f"  host {host['name']} ({host['address']}, node {host['node']}): {host['ranks']} on {host['devices']}{held}")


def stop(args: Namespace) -> int:
    """Ends the group that ``serve`` keeps."""
    groups = running()
    for address, description in groups.items():
        if description["node"]:
            show(
                f"{address.folder} is a part of a group whose node 0 is elsewhere: stop it there, or end serve here with Ctrl-C"
            )
        elif args.all or description["shared"]:
            try:
                GroupExecutor.attach(address).stop()
                show(f"ended {address.folder}")
            except GroupFailure as error:
                show(f"{address.folder}: {error.summary}")
    if not groups:
        show("no group is running")
    return 0
