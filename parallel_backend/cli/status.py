"""The command ``status``: lists the groups that are running."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..cogvideox.checkpoint.bundled import name_of
from ..errors import GroupFailure
from ..executor.group import GroupExecutor
from ..group.registry import running
from .console import Table, show, show_json

TITLES = ("plan", "devices", "state", "up", "jobs", "queue", "model", "memory GiB", "link", "process")
"""The table's columns; the process is the one that keeps the group."""


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
    if not groups:
        show("no group is running")
        return 0
    rows = [row_of(group) for group in groups]
    table = Table.of(TITLES, rows)
    table.show_titles()
    for group, row in zip(groups, rows):
        table.show(row)
        show_hosts(group)
    for group in groups:
        error = f", last error {group['last_error']}" if group.get("last_error") else ""
        show(f"logs of {group['plan']} on {group['devices']}: {group['folder']}/logs{error}")
    return 0


def row_of(group: dict) -> list:
    """Returns a group's row of the table; what it does not say yet is a dash."""
    answers = "uptime" in group
    return [
        group["plan"],
        group["devices"],
        group["state"],
        f"{group['uptime']:.0f} s" if answers else None,
        group.get("jobs"),
        group.get("queue"),
        name_of(Path(group["model"])) if group.get("model") else None,
        gib(group["memory"]) if group.get("memory") else None,
        f"{group['link'] / 1e9:.2g} GB/s, {group['latency'] * 1e6:.0f} us" if answers else None,
        group["owner"],
    ]


def gib(sizes: list[int]) -> str:
    """Formats the memory of several ranks in GiB."""
    return "/".join(f"{size / 2**30:.1f}" for size in sizes)


def show_hosts(group: dict) -> None:
    """Prints a line for each host of a group, with its memory if known."""
    for host in group.get("hosts") or ():
        memory = group.get("memory", [])[host["first_rank"] : host["first_rank"] + host["processes"]]
        held = f", memory {gib(memory)} GiB" if memory else ""
        show(f"  host {host['name']} ({host['address']}, node {host['node']}): {host['ranks']} on {host['devices']}{held}")
