"""The command ``status``: lists the groups that are running."""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from ..cluster import nodes as cluster
from ..cogvideox.checkpoint.bundled import name_of
from ..errors import GroupFailure, RequestError
from ..executor.factory import groups_on_cluster
from ..executor.group import GroupExecutor
from ..group.registry import running
from .console import Table, show, show_json
from .options import CLUSTER_SILENT, add_ray_option

TITLES = ("plan", "devices", "state", "up", "jobs", "queue", "model", "memory GiB", "link", "process")
"""The table's columns; the process is the one that keeps the group."""


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``status``."""
    add_ray_option(parser, "show nodes and groups")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = f"Exit status: 0; {CLUSTER_SILENT} if the Ray cluster did not answer, while the groups here are shown."
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
    nodes, code = [], 0
    try:
        nodes = cluster.nodes() if args.ray else []
        groups += on_cluster() if args.ray else []
    except RequestError as error:
        print(f"status: {error}", file=sys.stderr)
        code = CLUSTER_SILENT
    if args.json:
        show_json({"groups": groups, **({"nodes": [asdict(node) for node in nodes]} if args.ray else {})})
        return code
    show_groups(groups)
    for node in nodes:
        gpus = f"{node.gpus} GPUs" + (f" ({node.gpu})" if node.gpu else "")
        show(f"node {node.name} ({node.address}): {gpus}, {node.cpus} CPUs")
    if nodes:
        show(dashboard_line())
    return code


def on_cluster() -> list[dict]:
    """Returns the state of each group on the Ray cluster."""
    found = []
    for name, group in groups_on_cluster().items():
        plan, _, owner = name.partition("@")
        try:
            said = group.status()
        except (GroupFailure, RequestError) as error:
            said = {"state": f"does not answer ({error.summary})"}
        found.append({"folder": None, **said, "plan": plan, "devices": said.get("node"), "owner": owner or "serve"})
    return found


def dashboard_line() -> str:
    """Returns where Ray's dashboard is."""
    address = cluster.dashboard()
    return (
        f"Ray's dashboard: {address}"
        if address
        else "Ray's dashboard does not run (pip install 'ray[default]' on the head node)"
    )


def show_groups(groups: list[dict]) -> None:
    """Prints a table of groups, and where their logs are."""
    if not groups:
        show("no group is running")
        return
    rows = [row_of(group) for group in groups]
    table = Table.of(TITLES, rows)
    table.show_titles()
    for row in rows:
        table.show(row)
    for group in groups:
        error = f", last error {group['last_error']}" if group.get("last_error") else ""
        where = f"{group['folder']}/logs" if group["folder"] else "on its node, and in Ray's dashboard"
        show(f"logs of {group['plan']} on {group['devices']}: {where}{error}")


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
