"""The executor that runs jobs in a group of processes, and starts the group when it is needed."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..config import CONFIG
from ..devices import Devices
from ..errors import GroupError, GroupFailure, GroupLost, GroupUnavailable, RequestError
from ..group import failures
from ..group.codec import Message
from ..group.connection import Broken
from ..group.exit_cause import ExitCause
from ..group.heartbeat import Board
from ..group.launcher import Launcher, Members
from ..group.preflight import check_possible
from ..group.registry import GroupAddress, running
from ..plan import Plan
from . import recovery
from .base import StopSignal
from .group_connection import SocketChannel, answers, open_connection
from .remote import RemoteExecutor

logger = logging.getLogger(__name__)

ABSENT, STARTING, FAILED = "absent", "starting", "failed"
"""States of a group that holds nothing."""


def state_of_several(states: Iterable[str]) -> str:
    """Returns the state of several groups together: the first of all states, from busy to absent, that one of them is in."""
    there = set(states)
    return next((state for state in ("busy", "ready", STARTING, FAILED) if state in there), ABSENT)


class GroupExecutor(RemoteExecutor):
    """Runs jobs in a group of processes.

    The group starts with the first job, starts again when it is lost, and ends with :meth:`close`.

    Args:
        plan: how each forward is split.
        devices: as many as the plan needs; with several machines, this one's share of them.
        members: the other machines, if there are any.
    Raises:
        RequestError, GroupUnavailable: when no such group can run here. Nothing has been started.
    """

    def __init__(self, plan: Plan, devices: Devices, members: Members | None = None):
        check_possible(plan, devices, members.nodes if members else 1)
        self.plan = plan
        self.devices = str(devices)
        self.address: GroupAddress | None = None
        self._launcher: Launcher | None = Launcher(plan, devices, members=members)
        self._owner: recovery.Owner | None = None
        """The process that owns the group, when this one does not."""
        self._answered: GroupAddress | None = None
        """The last group that has answered: when it stops answering it is lost."""
        self._losses: list[str] = []
        """Notes on groups that were lost while no job ran, for the next job's report."""
        self._lock = threading.Lock()

    @classmethod
    def attach(cls, address: GroupAddress) -> "GroupExecutor":
        """Returns an executor for a group that another process owns; :meth:`close` leaves it running.

        Raises:
            GroupError: when the group has just ended.
        """
        executor = cls.__new__(cls)
        try:
            description = address.describe()
        except (OSError, ValueError) as error:
            raise GroupError(f"the group at {address.folder} is gone; start it again with serve") from error
        executor.plan, executor.devices = Plan.parse(description["plan"]), description["devices"]
        executor.address, executor._launcher, executor._lock = address, None, threading.Lock()
        executor._owner, executor._answered, executor._losses = recovery.Owner(description), None, []
        return executor

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        return Devices.parse(self.devices).torch_devices

    def start(self, expected: Checkpoint | None = None) -> None:
        """See :meth:`Executor.start`. A group that is running is left alone.

        Raises:
            GroupUnavailable: when it cannot start, or recently failed to start and nothing has changed.
        """
        self._started(expected)

    def _started(self, expected: Checkpoint | None = None) -> GroupAddress:
        """Starts the group if it does not run. Returns its address; another thread may have ended the group since."""
        with self._lock:
            if self._launcher and not self._launcher.is_running():
                if self._launcher.process is not None:
                    cause = self._launcher.exit_cause()
                    if self._answered == self.address and not self._launcher.has_ended_idle():  # else it never came up
                        self._losses.append(f"the group was lost between jobs: {cause.cause}; it was started again")
                        logger.warning("the group of plan '%s' was lost: %s; starting it again", self.plan, cause.cause)
                    self._launcher.stop()
                failures.check(str(self.plan), self.devices)
                self.address = self._launcher.start()
                super().start(expected)
            return self.address

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`. A group that is not running is ``absent``."""
        known = {"plan": str(self.plan), "devices": self.devices}
        if self.address is None or (self._launcher and not self._launcher.is_running()):
            return {"state": ABSENT, **known}
        if self._launcher is None and not Path(self.address.socket).exists():
            return {"state": self._state_unheard(), **known}
        try:
            return {**known, **self._ask(Message("status"), seconds=CONFIG.status_seconds).plain}
        except GroupLost:
            return {"state": ABSENT, **known}

    def stage(self) -> str | None:
        """See :meth:`Executor.stage`. It is rank 0's last heartbeat."""
        description = self._description()
        if not description:
            return None
        if "board" not in description:
            return f"starting {description['processes']} processes"
        try:
            with closing(Board.open(description["board"], description["processes"])) as board:
                heartbeat = board.heartbeat(0)
        except OSError:  # it has just ended
            return None
        return heartbeat and heartbeat.doing

    def _state_unheard(self) -> str:
        """Returns the state of a group that does not listen."""
        if not (description := self._description()):
            return ABSENT
        return "part of a group on Ray that another node leads" if description["node"] else STARTING

    def _description(self) -> dict[str, Any]:
        """Reads the description in the group's folder; empty if the folder is gone."""
        try:
            return self.address.describe() if self.address else {}
        except (OSError, ValueError):
            return {}

    def free(self) -> None:
        """See :meth:`Executor.free`.

        A group that only this process uses ends: even an idle one holds 2 to 3 GB of each GPU, and it is started again in seconds.
        """
        if self.status()["state"] in (ABSENT, STARTING):
            return
        if self._launcher is None or self._launcher.is_shared:
            self._ask(Message("free"))
            return
        self._ask(Message("stop"))  # after the jobs of other threads
        with self._lock:
            self._launcher.stop()
            self.address = None

    def close(self) -> None:
        """See :meth:`Executor.close`. A group that another process owns keeps running."""
        with self._lock:
            if self._launcher:
                self._launcher.stop()
                self._launcher.leave()
                self.address = None

    @property
    def is_owner(self) -> bool:
        """See :attr:`Executor.is_owner`."""
        return self._launcher is not None

    def share(self) -> None:
        """Starts the group for all of the user's processes."""
        self._launcher.is_shared = True
        self.start()

    def wait(self) -> int:
        """Waits until the group's processes end. Returns their exit status, or 1 if they were given up."""
        process = self._launcher.process
        return process.wait() if process else 1

    @property
    def lost(self) -> ExitCause | None:
        """Why the group was last lost, until it is started again; None if another process owns it."""
        if self._launcher is None:
            return None
        with self._lock:
            ended = self._launcher.process is not None and not self._launcher.is_running()
            return self._launcher.exit_cause() if ended else self._launcher.lost

    def is_usable(self) -> bool:
        """See :meth:`Executor.is_usable`. This process's own group is started again when it is lost."""
        return self._launcher is not None or self.address in running()

    def is_there(self) -> bool:
        """Whether the group's processes run, even if they do not answer yet."""
        return self._launcher.is_running() if self._launcher else self.address in running()

    def stop(self) -> None:
        """Ends the group, whoever owns it."""
        self._ask(Message("stop"))

    def _explain(self, lost: GroupLost, should_stop: StopSignal) -> GroupLost:
        return lost if self._launcher or lost.is_there else self._find_again(lost, should_stop)

    def _with_own(self, notes: list[str]) -> list[str]:
        if self._launcher and self._launcher.note:
            notes.append(self._launcher.note)
        losses, self._losses = self._losses, []
        return [*losses, *notes]

    def answers(self, message: Message, should_stop: StopSignal, seconds: float | None = None) -> Iterator[Message]:
        """See :meth:`RemoteExecutor.answers`."""
        address = self._started()
        connection = self._connect(address, should_stop)
        try:
            with connection:
                yield from answers(SocketChannel(connection, message), should_stop, seconds)
        except Broken as error:
            raise self._broken(address, should_stop) from error

    def _connect(self, address: GroupAddress, should_stop: StopSignal) -> Connection:
        """Connects to the group once it answers."""

        def give_up(error: Exception, waited: float) -> GroupFailure | RequestError | None:
            return self._give_up(address, error, waited)

        connection = open_connection(address, should_stop, give_up)
        self._answered = address
        failures.forget(str(self.plan), self.devices)
        return connection

    def _give_up(self, address: GroupAddress, error: Exception, waited: float) -> GroupFailure | RequestError | None:
        """Returns the error for a group that has not answered for ``waited`` seconds, or None to wait longer."""
        if self._owner:
            # A group without a socket may still start, as long as its owner lives.
            may_start = isinstance(error, FileNotFoundError) and address in running() and waited < CONFIG.start_seconds
            return None if may_start else self._owner.error_of_lost(address)
        cause = None
        if self._launcher.is_running():
            cause = recovery.why_given_up(self._launcher, address, waited, had_answered=self._answered == address)
            if cause is None:
                return None
        with self._lock:
            if self.address != address or self._launcher.process is None:  # another thread has handled it
                return GroupLost("the group was lost in another job")
            return self._bury(cause or self._launcher.exit_cause())

    def _bury(self, cause: ExitCause) -> GroupFailure | RequestError:
        """Stops what is left of the group and returns the error that says why it ended."""
        # The socket appears once all ranks have met.
        came_up = self._answered == self.address or Path(self.address.socket).exists()
        error = recovery.bury(self._launcher, cause, came_up=came_up)
        if isinstance(error, GroupUnavailable):
            self.address = None  # it never came up, so the next start is no restart
            failures.remember(str(self.plan), self.devices, error, cause)
        return error

    def _broken(self, address: GroupAddress, should_stop: StopSignal) -> GroupFailure:
        """Returns the error for a broken connection: the group answers again, or how it ended."""
        try:
            self._connect(address, should_stop).close()
        except GroupFailure as error:
            return error
        return GroupLost("the connection to the group broke", is_there=True)

    def _find_again(self, lost: GroupLost, should_stop: StopSignal) -> GroupLost:
        """Switches to the group that the owner starts in place of the lost one. Returns why that was lost.

        Raises:
            GroupError: when none comes.
        """
        self.address, error = self._owner.next_group(lost, self.address, str(self.plan), self.devices, should_stop)
        return error
