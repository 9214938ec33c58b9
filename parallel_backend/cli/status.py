"""The command ``status``: lists the groups that are running."""

from argparse import ArgumentParser, Namespace

from ..errors import GroupFailure
from ..executor.group import GroupExecutor
from ..group.registry import running
from .console import show, show_json


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``status``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=status)


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
