"""Starts and stops the processes of a group."""

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

from ..config import CONFIG
from ..devices import Devices
from ..errors import GroupUnavailable
from ..plan import Plan
from .exit_cause import ExitCause, how_it_ended
from .fork_server_client import ForkServerProcess, SupervisorProcess
from .part import Part
from .preflight import check_possible, group_python, interface_of, loopback, rank_environment
from .registry import GroupAddress, Home, remove_stale
from .start_request import HOST, StartRequest

logger = logging.getLogger(__name__)

_is_ending = threading.Event()


def start_no_more() -> None:
    """Has this process start no more groups. Call it before the last one is closed at the process's end, as other threads go on meanwhile."""
    _is_ending.set()


class Members(Protocol):
    """The other machines of a group over several, as the one that leads it sees them."""

    nodes: int
    has_trouble: bool

    def meet(self) -> Part:
        """Has the others start their ranks, and returns this machine's part."""

    def watch(self, on_trouble: Callable[[], None]) -> None:
        """Has ``on_trouble`` called when another machine's part fails."""

    def verdict(self, own: ExitCause | None) -> ExitCause:
        """Ends the group everywhere, and returns why it ended."""

    def end(self) -> object:
        """Ends the ranks of the others."""


class Launcher:
    """The processes of one group on this machine, from :meth:`start` to :meth:`stop`.

    The :mod:`.fork_server` forks a :mod:`.supervisor`, which forks one rank per device. All end when this process does.

    Args:
        plan: of the whole group.
        devices: of this machine.
        part: this machine's part of the group.
        members: on the machine that leads a group over several, the others.
    """

    def __init__(self, plan: Plan, devices: Devices, part: Part | None = None, members: Members | None = None):
        self.plan = plan
        self.devices = devices
        self.part = part or Part()
        self.members = members
        self.is_shared = False
        """Whether the user's other processes may use the group; ``serve`` sets it."""
        self.address: GroupAddress | None = None
        self.process: SupervisorProcess | None = None
        self.lost: ExitCause | None = None
        """Why the group ended last time, until it is started again."""
        self._home: Home | None = None

    @property
    def note(self) -> str | None:
        """A line for the user if the group's files are not in the preferred folder."""
        return self._home and self._home.note

    def start(self) -> GroupAddress:
        """Starts the processes. Returns at once, or once all machines are there; the processes answer some seconds later.

        Raises:
            RequestError, GroupUnavailable: see :func:`.preflight.check_possible`; the latter also when a machine does not come.
        """
        if _is_ending.is_set():
            raise GroupUnavailable("this process is ending")
        if self.members:
            self.part = self.members.meet()
        try:
            self.process = self._start_here()
        except BaseException:
            if self.members:  # their ranks would wait for this machine's
                self.members.end()
            raise
        if self.members:
            self.members.watch(self.process.kill)
        self.lost = None
        logger.info("starting %d processes for plan '%s' on %s", self.devices.count, self.plan, self.devices)
        return self.address

    def _start_here(self) -> SupervisorProcess:
        """Starts this machine's processes."""
        check_possible(self.plan, self.devices, self.part.nodes)
        remove_stale()
        known = {
            "plan": str(self.plan),
            "devices": str(self.devices),
            "shared": self.is_shared,
            "processes": self.devices.count,
            "nodes": self.part.nodes,
            "node": self.part.node,
            "first_rank": self.part.node * self.devices.count,
            "lost": self.lost and asdict(self.lost),
        }
        self.address = self._create(known)
        try:
            return self._spawn()
        except BaseException:
            self.address.remove()
            raise

    def _create(self, known: dict[str, Any]) -> GroupAddress:
        """Creates the group's folder next to this process's lock, which is created or moved if necessary."""
        if self._home and not self._home.is_usable():
            self._give_home_up()
        if self._home is None:
            self._home = Home.open()
            if self._home.note:
                logger.warning(self._home.note)
        try:
            return GroupAddress.create(self._home.root, {**known, "lock": str(self._home.lock.path)})
        except OSError as error:
            root = self._home.root
            self._give_home_up()
            raise GroupUnavailable(
                f"cannot write the group's files in {root}: {error.strerror or error}; free space"
            ) from error

    def _give_home_up(self) -> None:
        home, self._home = self._home, None
        if home:
            home.lock.close()

    def _spawn(self) -> SupervisorProcess:
        if self.part.store:
            store = self.part.store
            variables = rank_environment(self.devices, interface_of(self.part.address), is_forced=False)
            variables[HOST] = self.part.name
        else:  # loopback by number, which needs no name resolution, network or variables
            host, interface = loopback()
            store = host, 0
            variables = rank_environment(self.devices, interface, is_forced=True)
        request = StartRequest(str(self.address.folder), str(self.plan), self.devices.kind, variables, store)
        return ForkServerProcess.get(self.devices.kind).fork(request, self.address.folder / "launcher.log")

    def is_running(self) -> bool:
        """Whether the processes are running."""
        return self.process is not None and self.process.poll() is None

    def has_ended_idle(self) -> bool:
        """Whether the group has ended because it had no job for ``idle_minutes``."""
        return self.process is not None and self.process.has_ended_well()

    def is_mute(self) -> bool:
        """Whether the interpreter runs but has not reported within ``hello_seconds``, so it cannot run the pack."""
        return self.is_running() and self.process.server.is_mute()

    def stop(self) -> None:
        """Stops the processes, by request, SIGTERM and SIGKILL in turn, and removes the folder. Idempotent."""
        if self.process is None:
            return
        for ask in (self.process.ask_to_leave, self.process.terminate, self.process.kill):
            ask()
            if self.process.pid is None:  # it has not been forked yet, and ends once it is
                break
            try:
                self.process.wait(CONFIG.stop_seconds)
                break
            except TimeoutError:
                continue
        self.process = None
        self.address.remove()
        if self.members:
            self.members.end()

    def leave(self) -> None:
        """Releases the lock. The launcher cannot be started again."""
        self._give_home_up()

    def exit_cause(self) -> ExitCause:
        """Returns why the group ended: which rank ended first, how, and on which machine."""
        if self.lost is None:
            own = self._own_cause()
            self.lost = self.members.verdict(own) if self.members else own
        return self.lost

    def _own_cause(self) -> ExitCause | None:
        """Returns why this machine's part ended; None if it ended because another machine's part had."""
        try:
            status = self.process.wait(CONFIG.stop_seconds)
        except TimeoutError:
            return ExitCause("the supervisor does not end; see the logs", details=self.details())
        details, reports = self.details(), self.process.reports
        has_trouble = self.members is not None and self.members.has_trouble
        if found := reports.get("exit"):
            cause = replace(ExitCause(**found), details=details)
            if not (cause.by_itself and has_trouble):
                return cause
        if has_trouble:
            return None
        if self.process.has_ended_well():
            return ExitCause("it was idle and has ended", by_itself=False)
        if "status" in reports:
            return replace(how_it_ended("the supervisor", status), failure=reports.get("failure"), details=details)
        cause = how_it_ended("the fork server", status)
        what = f": {group_python()} cannot run this pack; correct XDIT_PYTHON" if cause.by_itself else ""
        return replace(cause, cause=f"{cause.cause}{what}", details=details)

    def details(self) -> str:
        """Returns the last lines of the processes' logs."""
        is_forked = self.process is None or self.process.pid is not None
        return "\n".join([self.address.last_lines(), "" if is_forked else self.process.server.last_lines()]).strip()
