"""Recovery from the loss of a group: resumes the job, decides when a group is given up, and says why it ended."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import CONFIG
from ..errors import Cancelled, GroupError, GroupFailure, GroupLost, GroupUnavailable, RequestError
from ..group import failures
from ..group.codec import Message
from ..group.exit_cause import ExitCause
from ..group.launcher import Launcher
from ..group.ownership import OwnerWatch
from ..group.preflight import group_python
from ..group.registry import GroupAddress, running
from ..jobs import Job, SampleJob
from .base import StopSignal
from .group_connection import Keepsake, error_of

logger = logging.getLogger(__name__)


def run_and_resume(
    job: Job,
    ask: Callable[[Job, Keepsake], Message],
    explain: Callable[[GroupLost], GroupLost],
    kept: Keepsake,
) -> tuple[Message, list[str]]:
    """Runs a job. If the group is lost, runs it again from the last step that was kept.

    Args:
        job: to run.
        ask: sends the job to the group, which is started first if it does not run, and returns the answer.
        explain: returns the error that says why the group was lost.
        kept: receives what the group reports.
    Returns:
        The answer, and a note for each loss.
    Raises:
        GroupError: when the group is lost twice at the same step; GroupUnavailable if it did not come up the second time.
            Each GroupFailure has the job's progress.
    """
    notes: list[str] = []
    lost_at = None
    while True:
        kept.progress = None
        try:
            return ask(job, kept), notes
        except GroupFailure as failure:
            if kept.progress:
                job = replace(job, progress=kept.progress)
            failure.progress = job.progress if isinstance(job, SampleJob) else None
            if not isinstance(failure, GroupLost):
                raise
            error = explain(failure)
            done = failure.progress.step if failure.progress else 0
            place = f"after step {done}" if done else "before a step was kept"
            if done == lost_at:
                kind = GroupError if error.came_up else GroupUnavailable
                final = kind(f"{error.summary}; twice {place}, so the job is not tried again", details=error.details)
                final.progress = failure.progress
                raise final from failure
            lost_at = done
            remedy = ("connecting", "connected") if error.is_there else ("starting the group", "the group was started")
            resume = (f"go on {place}", f"went on {place}") if done else ("begin the job again", "the job began again")
            notes.append(f"{error.summary}; {remedy[1]} again and {resume[1]}")
            logger.warning("%s; %s again, to %s", error.summary, remedy[0], resume[0])


def why_given_up(launcher: Launcher, address: GroupAddress, waited: float, *, had_answered: bool) -> ExitCause | None:
    """Returns why a running group that does not answer is given up, or None to wait longer.

    Args:
        launcher: of the group.
        address: of the group.
        waited: seconds without an answer.
        had_answered: whether it answered earlier.
    """
    if not address.folder.exists() and waited > CONFIG.removed_seconds:
        return ExitCause(f"its folder {address.folder} was removed", by_itself=False)
    if launcher.is_mute():
        what = f"{group_python()} did not run this pack within {CONFIG.hello_seconds:.0f} s; correct XDIT_PYTHON"
        return ExitCause(what, details=launcher.details())
    if had_answered and waited > CONFIG.recovery_seconds:
        return ExitCause(f"rank 0 has not listened for {CONFIG.recovery_seconds:.0f} s", by_itself=False)
    if waited > CONFIG.start_seconds:
        return ExitCause(f"no answer within {CONFIG.start_seconds:.0f} s", details=launcher.details())
    return None


def bury(launcher: Launcher, cause: ExitCause, *, came_up: bool) -> GroupFailure | RequestError:
    """Stops what is left of a group and returns the error that says why it ended.

    Args:
        launcher: of the group.
        cause: why it ended.
        came_up: whether all its ranks had met.
    Returns:
        GroupLost when the job may succeed if it is tried again; GroupUnavailable when the group never came up.
    """
    details = cause.details or launcher.details()
    launcher.lost = cause
    launcher.stop()
    if not cause.by_itself:  # what failed on the other ranks only followed from it
        return GroupLost(f"the group was lost: {cause.cause}", details=details, came_up=came_up)
    if not came_up:
        return GroupUnavailable(f"the group did not start: {cause.cause}{_reported_error(cause)}", details=details)
    if cause.failure:
        return error_of(cause.failure)
    return GroupError(f"the group's processes ended: {cause.cause}", details=details)


def _reported_error(cause: ExitCause) -> str:
    """Returns the error of the process that failed, if it reported one, and what to do about it."""
    failure = cause.failure
    if not failure:
        return ""
    remedy = ""
    if failure["error"] in ("ModuleNotFoundError", "ImportError"):
        remedy = f"; install requirements.txt for {group_python()}, or correct XDIT_PYTHON"
    elif failures.is_full(failure):
        remedy = "; free space"
    return f": {failure['error']}: {failure['message'].strip().partition(chr(10))[0]}{remedy}"


class Owner:
    """The process that owns a group which this process only uses.

    Args:
        description: from the group's folder.
    """

    def __init__(self, description: dict[str, Any]):
        self._process = description["owner"]
        self._watch = OwnerWatch(Path(description["lock"]))

    def error_of_lost(self, address: GroupAddress) -> GroupFailure:
        """Returns the error for its group: lost while the owner lives, which starts another, else gone."""
        if self._watch.is_alive():
            return GroupLost(f"the group that process {self._process} keeps was lost")
        return GroupError(f"the group at {address.folder} is gone; start it again with serve")

    def next_group(
        self, lost: GroupLost, before: GroupAddress, plan: str, devices: str, should_stop: StopSignal
    ) -> tuple[GroupAddress, GroupLost]:
        """Waits for the group that the owner starts in place of the lost one.

        Args:
            lost: the error for the lost group.
            before: the address of the lost group.
            plan, devices: of both groups.
            should_stop: called while waiting.
        Returns:
            The new group's address, and why the lost one ended.
        Raises:
            GroupError: when none comes.
            Cancelled: when ``should_stop`` returns True.
        """
        deadline = time.monotonic() + CONFIG.start_seconds
        while self._watch.is_alive() and time.monotonic() < deadline:
            if should_stop():
                raise Cancelled("stopped while the group was started again")
            for address, description in running().items():
                is_same = description["shared"] and (description["plan"], description["devices"]) == (plan, devices)
                if is_same and address != before:
                    return address, _why_restarted(description["lost"]) or lost
            time.sleep(CONFIG.poll_seconds)
        raise GroupError(f"{lost.summary}, and no other came; start it again with serve", details=lost.details) from lost


def _why_restarted(cause: dict[str, Any] | None) -> GroupLost | None:
    """Returns the error for an exit cause in a new group's folder; None when there is none."""
    if cause is None:
        return None
    return GroupLost(f"the group was lost: {cause['cause']}", details=cause["details"])
