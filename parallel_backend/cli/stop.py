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
