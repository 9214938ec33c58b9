"""The command ``stop``: ends what ``serve`` keeps."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

from ..errors import GroupFailure, RequestError
from ..executor.cluster import ClusterExecutor
from ..executor.factory import groups_on_cluster
from ..executor.group import GroupExecutor
from ..group.registry import running
from .console import show
from .options import CLUSTER_SILENT, add_ray_option

NOT_ENDED, BOTH = 1, 4
"""Exit statuses: a group did not end; and the Ray cluster did not answer either."""


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``stop``."""
    parser.add_argument("--all", action="store_true", help="end groups that other programs own too")
    add_ray_option(parser, "end groups")
    parser.epilog = (
        f"Exit status: 0 if every group has ended; {NOT_ENDED} if one did not end; {CLUSTER_SILENT} if the Ray cluster did not answer, "
        f"while the groups here have ended; {BOTH} if one did not end and the cluster did not answer; 2 for a wrong request."
    )
    parser.set_defaults(run=stop)


def stop(args: Namespace) -> int:
    """Ends what ``serve`` keeps, first here and then on the Ray cluster, and says what it was."""
    found = stop_here(args.all)
    is_silent = False
    try:
        found += stop_on_ray(args.all) if args.ray else []
    except RequestError as error:
        print(f"stop: {error}", file=sys.stderr)
        is_silent = True
    if not found:
        show("no group is running" + (" here" if is_silent else ""))
    if is_silent:
        return CLUSTER_SILENT if all(found) else BOTH
    return 0 if all(found) else NOT_ENDED


def stop_here(owned_too: bool) -> list[bool]:
    """Ends the groups of this machine.

    Args:
        owned_too: also those that ``serve`` did not start.
    Returns:
        For each group whether it has ended, or was meant to go on.
    """
    found = []
    for address, description in running().items():
        what, done = f"plan {description['plan']} on {description['devices']}", True
        if description["node"]:
            show(f"{what} is a part of a group on Ray that another node leads: it ends with that")
        elif owned_too or description["shared"]:
            done = end(what, str(address.folder), partial(GroupExecutor.attach, address)) or address not in running()
        else:
            show(f"{what} goes on: it belongs to process {description['owner']}, which serve did not start; --all ends it too")
        found.append(done)
    return found


def stop_on_ray(owned_too: bool) -> list[bool]:
    """Ends the groups of the Ray cluster. See :func:`stop_here`.

    Raises:
        RequestError: when the cluster does not answer.
    """
    found = []
    for name, group in groups_on_cluster().items():
        plan, _, owner = name.partition("@")
        if owned_too or not owner:
            found.append(end(f"plan {plan}", "Ray", lambda group=group: group))
        else:
            show(f"plan {plan} on Ray goes on: it belongs to a process that serve did not start; --all ends it too")
            found.append(True)
    return found


def end(what: str, where: str, attach: Callable[[], GroupExecutor | ClusterExecutor]) -> bool:
    """Ends a group, and says what it has done. Returns whether it has ended."""
    try:
        group = attach()
        known = group.status()
        group.stop()
    except GroupFailure as error:
        show(f"{what} at {where}: {error.summary}")
        return False
    done = f" after {known['uptime']:.0f} s and {known['jobs']} jobs" if "uptime" in known else ""
    show(f"ended {what}{done} ({where})")
    return True
