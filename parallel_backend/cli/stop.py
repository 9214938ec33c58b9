"""The command ``stop``: ends the group that ``serve`` keeps."""

from argparse import ArgumentParser, Namespace

from ..errors import GroupFailure
from ..executor.group import GroupExecutor
from ..group.registry import running
from .console import show


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``stop``."""
    parser.add_argument("--all", action="store_true", help="end groups that other programs own too")
    parser.set_defaults(run=stop)


def stop(args: Namespace) -> int:
    """Ends the group that ``serve`` keeps, and says what it was."""
    groups = running()
    for address, description in groups.items():
        what = f"plan {description['plan']} on {description['devices']}"
        if description["node"]:
            show(f"{what} is a part of a group on Ray that another node leads: it ends with that")
        elif args.all or description["shared"]:
            try:
                show(f"ended {what}{ended(GroupExecutor.attach(address))} ({address.folder})")
            except GroupFailure as error:
                show(f"{what} at {address.folder}: {error.summary}")
        else:
            show(f"{what} goes on: it belongs to process {description['owner']}, which serve did not start; --all ends it too")
    if not groups:
        show("no group is running")
    return 0


def ended(group: GroupExecutor) -> str:
    """Ends a group. Returns what it has done."""
    known = group.status()
    group.stop()
    return f" after {known['uptime']:.0f} s and {known['jobs']} jobs" if "uptime" in known else ""
