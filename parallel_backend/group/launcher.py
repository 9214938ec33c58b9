"""Starts and stops the processes of a group."""

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from dataclasses import asdict, replace
from typing import Any

from ..config import CONFIG
from ..devices import Devices
from ..errors import GroupUnavailable
from ..plan import Plan
from .exit_cause import ExitCause, how_it_ended
from .muster import Meeting, Muster
from .preflight import check_possible, environment, group_python, loopback
from .registry import GroupAddress, Home, remove_stale
from .supervisor import HOST

logger = logging.getLogger(__name__)


class Launcher:
    """The processes of one group on this host, from :meth:`start` to :meth:`stop`.

    ``torch.distributed.run`` starts one worker per device, inside :mod:`.supervisor`, which ends when this process does.

    Args:
        plan: None on a host that gets it from node 0.
        devices: of this host.
        muster: meets the group's other hosts, if there are any; :meth:`leave` closes it.
    """

    def __init__(self, plan: Plan | None, devices: Devices, muster: Muster | None = None):
        self.plan = plan
        self.devices = devices
        self.muster = muster
        self.is_shared = False
        """Whether the user's other processes may use the group; ``serve`` sets it."""
        self.address: GroupAddress | None = None
        self.process: subprocess.Popen | None = None
        self.lost: ExitCause | None = None
        """Why the group ended last time, until it is started again."""
        self._home: Home | None = None
        self._reports: dict[str, Any] = {}
        self._printed: deque[str] = deque()
        self._reader: threading.Thread | None = None
        self._started = 0.0

    @property
    def nodes(self) -> int:
        """Number of the group's hosts."""
        return self.muster.place.nodes if self.muster else 1

    @property
    def note(self) -> str | None:
        """A line for the user if the group's files are not in the preferred folder."""
        return self._home and self._home.note

    def start(self) -> GroupAddress:
        """Starts the processes. Returns at once, or once all hosts have met; the processes answer some seconds later.

        Raises:
            RequestError, GroupUnavailable: see :func:`.preflight.check_possible` and :meth:`.muster.Muster.meet`.
        """
        check_possible(self.plan, self.devices, self.nodes)
        node = self.muster.place.node if self.muster else 0
        remove_stale()
        known = {
            "plan": str(self.plan),
            "devices": str(self.devices),
            "shared": self.is_shared,
            "processes": self.devices.count,
            "nodes": self.nodes,
            "node": node,
            "first_rank": node * self.devices.count,
            "lost": self.lost and asdict(self.lost),
        }
        self.address = self._create(known)
        try:
            meeting = self._meet() if self.muster else None
            self.process = self._spawn(meeting)
        except BaseException:
            self.address.remove()
            raise
        self._listen()
        if self.muster and not self.muster.watch(self.process.kill):
            self.process.kill()
        self.lost = None
        logger.info("starting %d processes for plan '%s' on %s", self.devices.count, self.plan, self.devices)
        return self.address

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

    def _meet(self) -> Meeting:
        """Meets the other hosts, after closing the connections of the group's last start."""
        self.muster.part(again=True, cause=self.lost)
        meeting = self.muster.meet()
        self.plan = Plan.parse(meeting.plan)
        self.address.add(plan=meeting.plan, hosts=[{**asdict(host), "ranks": host.ranks} for host in meeting.hosts])
        return meeting

    def _spawn(self, meeting: Meeting | None) -> subprocess.Popen:
        if meeting:
            where = [f"--nnodes={self.nodes}", f"--node-rank={self.muster.place.node}", "--rdzv-backend=static"]
            where += [f"--rdzv-endpoint={meeting.endpoint}", f"--rdzv-conf=timeout={CONFIG.rendezvous_seconds:.0f}"]
            variables = environment(self.devices, meeting.interface, is_forced=False)
            variables[HOST] = str(meeting.hosts[self.muster.place.node])
        else:  # loopback by number, which needs no name resolution, network or variables
            address, interface = loopback()
            endpoint = f"[{address}]:0" if ":" in address else f"{address}:0"
            where = [
                "--nnodes=1",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={endpoint}",
                f"--rdzv-id={self.address.folder.name}",
            ]
            where += [f"--local-addr={address}"]
            variables = environment(self.devices, interface, is_forced=True)
        try:
            with (self.address.folder / "launcher.log").open("wb") as log:
                self._started = time.monotonic()
                return subprocess.Popen(
                    self._command(where),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=variables,
                    start_new_session=True,  # Ctrl-C must reach only the caller, which then stops the group
                )
        except OSError as error:
            raise GroupUnavailable(f"{group_python()} cannot be started: {error.strerror}; correct XDIT_PYTHON") from error

    def _command(self, where: list[str]) -> list[str]:
        return [
            group_python(), "-m", "parallel_backend.group.supervisor", str(self.address.folder), *where, "--max-restarts=0",
            f"--nproc-per-node={self.devices.count}", f"--log-dir={self.address.logs}", "--redirects=3",
            "-m", "parallel_backend.group.worker", str(self.address.folder), str(self.plan), self.devices.kind,
        ]  # fmt: skip

    def _listen(self) -> None:
        """Reads the supervisor's reports in a thread until it ends."""
        process, self._reports, self._printed = self.process, {}, deque(maxlen=20)
        reports, printed = self._reports, self._printed

        def read() -> None:
            with process.stdout:
                for line in process.stdout:
                    try:
                        reports.update(json.loads(line))
                    except (ValueError, TypeError):  # printed by an interpreter that is not Python
                        printed.append(line.decode(errors="replace").rstrip())

        self._reader = threading.Thread(target=read, name="group reports", daemon=True)
        self._reader.start()

    def is_running(self) -> bool:
        """Whether the processes are running."""
        return self.process is not None and self.process.poll() is None

    def is_mute(self) -> bool:
        """Whether the interpreter runs but has not reported within ``hello_seconds``, so it cannot run the pack."""
        return self.is_running() and not self._reports and time.monotonic() - self._started > CONFIG.hello_seconds

    def stop(self) -> None:
        """Stops this host's processes, by request, SIGTERM and SIGKILL in turn, and removes the folder. Idempotent."""
        if self.process is None:
            return
        for ask in (self._ask_to_leave, self.process.terminate, self._kill):
            ask()
            try:
                self.process.wait(CONFIG.stop_seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        self._kill()
        self.process = None
        self.address.remove()

    def _ask_to_leave(self) -> None:
        """Asks the supervisor to end. Closing the pipe is not enough: a forked child of this process may hold it open."""
        try:
            self.process.stdin.write(b"leave\n")
            self.process.stdin.close()
        except OSError:  # it has ended
            return

    def leave(self) -> None:
        """Closes the connections to the other hosts and releases the lock. The launcher cannot be started again."""
        if self.muster:
            self.muster.part(again=False, cause=self.lost)
        self._give_home_up()

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def exit_cause(self) -> ExitCause:
        """Returns why the group ended: which rank ended first, how, and on which host."""
        if self.lost is None:
            own = self._own_cause()
            self.lost = self.muster.verdict(own) if self.muster else own
        return self.lost

    def _own_cause(self) -> ExitCause | None:
        """Returns why this host's part ended; None if it was asked to end, or ended because another host's part had."""
        try:
            status = self.process.wait(CONFIG.stop_seconds)
        except subprocess.TimeoutExpired:
            return ExitCause("the launcher does not end; see the logs", details=self.details())
        self._reader.join(CONFIG.stop_seconds)
        details = self.details()
        if found := self._reports.get("exit"):
            cause = replace(ExitCause(**found), details=details)
            if not (self.muster and cause.by_itself and self.muster.has_trouble):
                return cause
        if self.muster and (status == 0 or self.muster.has_trouble):
            return None
        return replace(how_it_ended("the launcher", status), details=details)

    def details(self) -> str:
        """Returns the last lines of the processes' logs."""
        return "\n".join([self.address.last_lines(), *self._printed]).strip()
