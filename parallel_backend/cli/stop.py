"""The command ``stop``: ends what ``serve`` keeps."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

from ..errors import GroupFailure
from ..executor.cluster import ClusterExecutor
from ..executor.factory import groups_on_cluster
from ..executor.group import GroupExecutor
from ..group.registry import running
from .console import show
from .options import add_ray_option


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``stop``."""
    parser.add_argument("--all", action="store_true", help="end groups that other programs own too")
    add_ray_option(parser, "end groups")
    parser.set_defaults(run=stop)


def stop(args: Namespace) -> int:
    """Ends what ``serve`` keeps, and says what it was."""
    groups = running()
    for address, description in groups.items():
        what = f"plan {description['plan']} on {description['devices']}"
        if description["node"]:
            show(f"{what} is a part of a group on Ray that another node leads: it ends with that")
        elif args.all or description["shared"]:
            end(what, str(address.folder), partial(GroupExecutor.attach, address))
        else:
            show(f"{what} goes on: it belongs to process {description['owner']}, which serve did not start; --all ends it too")
    on_ray = groups_on_cluster() if args.ray else {}
    for name in on_ray:
        plan, _, owner = name.partition("@")
        if args.all or not owner:
            end(f"plan {plan}", "Ray", partial(on_ray.get, name))
        else:
            show(f"plan {plan} on Ray goes on: it belongs to a process that serve did not start; --all ends it too")
    if not groups and not on_ray:
        show("no group is running")
    return 0


def end(what: str, where: str, attach: Callable[[], GroupExecutor | ClusterExecutor]) -> None:
    """Ends a group, and says what it has done."""
    try:
        group = attach()
        known = group.status()
        group.stop()
        done = f" after {known['uptime']:.0f} s and {known['jobs']} jobs" if "uptime" in known else ""
        show(f"ended {what}{done} ({where})")
    except GroupFailure as error:
        show(f"{what} at {where}: {error.summary}")
