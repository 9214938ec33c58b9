"""Runs ``serve`` on a host that lends its devices to a group led by node 0."""

from collections.abc import Callable

from ..errors import GroupUnavailable
from .launcher import Launcher
from .muster import Member


def lend(launcher: Launcher, muster: Member, show: Callable[[str], None]) -> None:
    """Takes part in a group each time that node 0 starts it. Returns when node 0 ends it without a failure.

    Args:
        launcher: of this host's processes.
        muster: the launcher's.
        show: called with each line for the user.
    Raises:
        GroupUnavailable: when node 0 does not come, or ends the group because it failed.
        RequestError: when node 0 refuses this host.
    """
    try:
        while True:
            address = launcher.start()
            mine = muster.meeting.hosts[muster.place.node]
            show(
                f"lending {mine.devices} as {mine.ranks} of plan {muster.meeting.plan} to {muster.leader}; "
                f"logs {address.logs}; stops when node 0 ends the group, or with Ctrl-C"
            )
            launcher.process.wait()
            cause = launcher.exit_cause()
            launcher.stop()
            if not muster.comes_again:
                break
            show(f"the group was lost: {cause.cause}; waiting for node 0 again")
    finally:
        launcher.stop()
        launcher.leave()
    if muster.failed:
        raise GroupUnavailable(f"{muster.leader} ended the group: {cause.cause}", details=cause.details)
    show(f"{muster.leader} ended the group")
