"""Starts the processes of a group, and ends them."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from ..devices import Devices
from ..errors import GroupUnavailable, RequestError
from ..plans import Plan
from .address import GroupAddress
from .death import KILLED, Death, how_it_ended
from .muster import Meeting, Muster

logger = logging.getLogger(__name__)

PACK = Path(__file__).resolve().parents[2]
"""The folder that holds ``parallel_backend``."""
STOP_SECONDS = 10.0
ENDED_RANK = re.compile(r"^ *rank *: (\d+) .*\n *exitcode *: (-?\d+)", re.MULTILINE)
"""A rank that failed, in the report that ``torch.distributed.run`` ends with."""
MEET_SECONDS = 300
"""At most this long for the launchers of several hosts to find each other."""


def group_python() -> str:
    """The interpreter that a group runs under: ``XDIT_PYTHON``, else this one."""
    return os.environ.get("XDIT_PYTHON") or sys.executable


def check_possible(plan: Plan | None, devices: Devices, nodes: int = 1) -> None:
    """Says why no group can start here, if none can.

    Args:
        plan: None on a host that is told it by another.
        devices: of each host.
        nodes: hosts.
    Raises:
        RequestError: when plan and devices do not fit.
        GroupUnavailable: one line with the reason and what to do.
    """
    if plan:
        plan.check_world(devices.count, nodes)
        if plan.replicas > 1:
            raise RequestError(f"plan '{plan}': replicas are groups of their own; a single group takes plan '{plan.replica}'")
    if not sys.platform.startswith("linux"):
        raise GroupUnavailable(f"xDiT groups need Linux (this is {sys.platform}); on Windows use WSL2")
    if not os.environ.get("XDIT_PYTHON") and find_spec("xfuser") is None:
        raise GroupUnavailable("xfuser is not installed: pip install xfuser, or set XDIT_PYTHON to a Python that has it")


class Launcher:
    """The processes of one group on this host, from :meth:`start` to :meth:`stop`.

    ``torch.distributed.run`` starts one worker a device, inside :mod:`.agent`. That holds the read end of a pipe whose
    write end is this process's alone, so it sees it end in whatever way it ends, and leaves with its workers.

    Args:
        plan: None on a host that is told it by node 0.
        devices: this host's.
        muster: where the group has other hosts, the way to them; it is closed with :meth:`leave`.
    """

    def __init__(self, plan: Plan | None, devices: Devices, muster: Muster | None = None):
        self.plan = plan
        self.devices = devices
        self.muster = muster
        self.is_shared = False
        """Whether the person's other processes may use the group too; ``serve`` sets it."""
        self.address: GroupAddress | None = None
        self.process: subprocess.Popen | None = None
        self.lost: Death | None = None
        """How the life before ended, until there is another."""

    @property
    def nodes(self) -> int:
        """Hosts of the group."""
        return self.muster.place.nodes if self.muster else 1

    def start(self) -> GroupAddress:
        """Starts the processes and returns at once, or when all hosts have met; they answer some seconds later.

        Raises:
            RequestError, GroupUnavailable: see :func:`check_possible` and :meth:`.muster.Muster.meet`.
        """
        check_possible(self.plan, self.devices, self.nodes)
        node = self.muster.place.node if self.muster else 0
        known = {
            "plan": str(self.plan),
            "devices": str(self.devices),
            "shared": self.is_shared,
            "processes": self.devices.count,
        }
        known |= {"nodes": self.nodes, "node": node, "first_rank": node * self.devices.count}
        self.address = GroupAddress.create({**known, "lost": self.lost and asdict(self.lost)})
        try:
            meeting = self._meet() if self.muster else None
            self.process = self._spawn(meeting)
        except BaseException:
            self.address.remove()
            raise
        if self.muster and not self.muster.watch(self.process.kill):
            self.process.kill()
        self.lost = None
        logger.info("starting %d processes for plan '%s' on %s", self.devices.count, self.plan, self.devices)
        return self.address

    def _meet(self) -> Meeting:
        """Meets the other hosts, after leave of them for the life before."""
        self.muster.part(again=True, death=self.lost)
        meeting = self.muster.meet()
        self.plan = Plan.parse(meeting.plan)
        self.address.add(plan=meeting.plan, hosts=[{**asdict(host), "ranks": host.ranks} for host in meeting.hosts])
        return meeting

    def _spawn(self, meeting: Meeting | None) -> subprocess.Popen:
        try:
            with (self.address.folder / "launcher.log").open("wb") as log:
                return subprocess.Popen(
                    self._command(meeting),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(meeting),
                    start_new_session=True,  # Ctrl-C is for the caller, who then stops the group
                )
        except OSError as error:
            raise GroupUnavailable(f"{group_python()} cannot be started: {error.strerror}; correct XDIT_PYTHON") from error

    def _command(self, meeting: Meeting | None) -> list[str]:
        where = ["--standalone"]
        if meeting:
            where = [f"--nnodes={self.nodes}", f"--node-rank={self.muster.place.node}", "--rdzv-backend=static"]
            where += [f"--rdzv-endpoint={meeting.endpoint}", f"--rdzv-conf=timeout={MEET_SECONDS}"]
        return [
            group_python(), "-m", "parallel_backend.group.agent", str(self.address.folder), *where, "--max-restarts=0",
            f"--nproc-per-node={self.devices.count}", f"--log-dir={self.address.logs}", "--redirects=3",
            "-m", "parallel_backend.group.worker", str(self.address.folder), str(self.plan), self.devices.kind,
        ]  # fmt: skip

    def _environment(self, meeting: Meeting | None) -> dict[str, str]:
        kept = dict(os.environ)
        paths = [str(PACK)]
        if os.environ.get("XDIT_PYTHON"):
            kept.pop("PYTHONHOME", None)  # it belongs to another interpreter, as its packages do
        elif os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        hosts = {}
        if meeting:
            hosts["XDIT_HOST"] = str(meeting.hosts[self.muster.place.node])
            if meeting.interface:  # by a host's name gloo often finds an address that the others cannot reach
                chosen = {"GLOO_SOCKET_IFNAME": meeting.interface, "NCCL_SOCKET_IFNAME": f"={meeting.interface}"}
                hosts |= {name: value for name, value in chosen.items() if name not in kept}
        return {
            **kept,
            **self.devices.environment(),
            **hosts,
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "XDIT_LOGGING_LEVEL": "WARNING",
        }

    def is_running(self) -> bool:
        """Whether the processes are there."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ends this host's processes, gently and then not, and removes the folder. Further calls do nothing."""
        if self.process is None:
            return
        self.process.stdin.close()  # the agent leaves when the pipe ends
        for ask in (lambda: None, self.process.terminate, self._kill):
            ask()
            try:
                self.process.wait(STOP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        self._kill()
        self.process = None
        self.address.remove()

    def leave(self) -> None:
        """Takes leave of the other hosts for good."""
        if self.muster:
            self.muster.part(again=False, death=self.lost)

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def cause_of_death(self) -> Death:
        """How the group ended: which rank first and how, where the agent or ``torch.distributed.run`` says so; on which host."""
        own = self._own_death()
        self.lost = self.muster.verdict(own) if self.muster else own
        return self.lost

    def _own_death(self) -> Death | None:
        """How this host's part ended; None when it was told to, or ended because another's had."""
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return Death("the launcher is still there; see the logs", details=self.last_words())
        details = self.last_words()
        if self.address.cause_file.exists():
            return Death(**json.loads(self.address.cause_file.read_text()), by_itself=False, details=details)
        if self.muster and (status == 0 or self.muster.has_trouble):
            return None
        log = (self.address.folder / "launcher.log").read_text(errors="replace")
        # The one that ended first comes last. Of those that ended within a second any may, and a killed one takes the others
        # with it.
        ends = [(f"rank {rank}", int(code)) for rank, code in reversed(ENDED_RANK.findall(log))]
        death = how_it_ended(*min(ends or [("the launcher", status)], key=lambda end: end[1] not in KILLED))
        return replace(death, failure=self._failure(), details=details)

    def _failure(self) -> dict | None:
        """The last words of the rank that failed first: the one that waited longest for the others to fail too."""
        paths = [(rank, self.address.error_file(rank)) for rank in range(self.plan.world_size)]
        failures = [{**json.loads(path.read_text()), "rank": rank} for rank, path in paths if path.exists()]
        return max(failures, key=lambda failure: failure["waited"], default=None)

    def last_words(self) -> str:
        """What this host's processes wrote last."""
        launcher = (self.address.folder / "launcher.log").read_text(errors="replace").splitlines()[-20:]
        return "\n".join([self.address.last_lines(), "--- launcher", *launcher]).strip()
