"""Starts the processes of a group, and ends them."""

import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..devices import Devices
from ..errors import GroupUnavailable, RequestError
from ..plans import Plan
from .address import GroupAddress

logger = logging.getLogger(__name__)

PACK = Path(__file__).resolve().parents[2]
"""The folder that holds ``parallel_backend``."""
STOP_SECONDS = 10.0
ENDED_RANK = re.compile(r"^ *rank *: (\d+) .*\n *exitcode *: (-?\d+)", re.MULTILINE)
"""A rank that failed, in the report that ``torch.distributed.run`` ends with."""
KILLED = [-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)]
"""Exit codes of a process that another, the kernel or a fault of its own has ended; SIGTERM is the launcher's own."""


@dataclass(frozen=True)
class Death:
    """How a group ended."""

    cause: str
    by_itself: bool = True
    """False when it was killed, or hung: the job may succeed when it is tried again."""


def how_it_ended(who: str, code: int) -> Death:
    """Says an exit code in words."""
    if code < 0:
        return Death(f"{who} was killed by {signal.Signals(-code).name}", by_itself=code not in KILLED)
    return Death(f"{who} ended with status {code}")


def group_python() -> str:
    """The interpreter that a group runs under: ``XDIT_PYTHON``, else this one."""
    return os.environ.get("XDIT_PYTHON") or sys.executable


def check_possible(plan: Plan, devices: Devices) -> None:
    """Says why no group can start here, if none can.

    Raises:
        RequestError: when plan and devices do not fit.
        GroupUnavailable: one line with the reason and what to do.
    """
    plan.check_world(devices.count)
    if plan.replicas > 1:
        raise RequestError(f"plan '{plan}': replicas are groups of their own; a single group takes plan '{plan.replica}'")
    if not sys.platform.startswith("linux"):
        raise GroupUnavailable(f"xDiT groups need Linux (this is {sys.platform}); on Windows use WSL2")
    if not os.environ.get("XDIT_PYTHON") and find_spec("xfuser") is None:
        raise GroupUnavailable("xfuser is not installed: pip install xfuser, or set XDIT_PYTHON to a Python that has it")


class Launcher:
    """The processes of one group, from :meth:`start` to :meth:`stop`.

    ``torch.distributed.run`` starts one worker a device, inside :mod:`.agent`. That holds the read end of a pipe whose
    write end is this process's alone, so it sees it end in whatever way it ends, and leaves with its workers.
    """

    def __init__(self, plan: Plan, devices: Devices):
        self.plan = plan
        self.devices = devices
        self.is_shared = False
        """Whether the person's other processes may use the group too; ``serve`` sets it."""
        self.address: GroupAddress | None = None
        self.process: subprocess.Popen | None = None

    def start(self) -> GroupAddress:
        """Starts the processes and returns at once; they answer some seconds later.

        Raises:
            RequestError, GroupUnavailable: see :func:`check_possible`.
        """
        check_possible(self.plan, self.devices)
        self.address = GroupAddress.create({"plan": str(self.plan), "devices": str(self.devices), "shared": self.is_shared})
        command = [
            group_python(), "-m", "parallel_backend.group.agent", str(self.address.folder), "--standalone", "--max-restarts=0",
            f"--nproc-per-node={self.devices.count}", f"--log-dir={self.address.logs}", "--redirects=3",
            "-m", "parallel_backend.group.worker", str(self.address.folder), str(self.plan), self.devices.kind,
        ]  # fmt: skip
        try:
            with (self.address.folder / "launcher.log").open("wb") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for the caller, who then stops the group
                )
        except OSError as error:
            self.address.remove()
            raise GroupUnavailable(f"{group_python()} cannot be started: {error.strerror}; correct XDIT_PYTHON") from error
        logger.info("starting %d processes for plan '%s' on %s", self.devices.count, self.plan, self.devices)
        return self.address

    def _environment(self) -> dict[str, str]:
        kept = dict(os.environ)
        paths = [str(PACK)]
        if os.environ.get("XDIT_PYTHON"):
            kept.pop("PYTHONHOME", None)  # it belongs to another interpreter, as its packages do
        elif os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        return {
            **kept,
            **self.devices.environment(),
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "XDIT_LOGGING_LEVEL": "WARNING",
        }

    def is_running(self) -> bool:
        """Whether the processes are there."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ends the processes, gently and then not, and removes the folder. Further calls do nothing."""
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

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def cause_of_death(self) -> Death:
        """Which rank ended first and how, where the agent or ``torch.distributed.run`` says so."""
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return Death("the launcher is still there; see the logs")
        if self.address.cause_file.exists():
            return Death(self.address.cause_file.read_text(), by_itself=False)
        log = (self.address.folder / "launcher.log").read_text(errors="replace")
        # The one that ended first comes last. Of those that ended within a second any may, and a killed one takes the others
        # with it.
        ends = [(f"rank {rank}", int(code)) for rank, code in reversed(ENDED_RANK.findall(log))]
        return how_it_ended(*min(ends or [("the launcher", status)], key=lambda end: end[1] not in KILLED))

    def last_words(self) -> str:
        """What the processes wrote last."""
        launcher = (self.address.folder / "launcher.log").read_text(errors="replace").splitlines()[-20:]
        return "\n".join([self.address.last_lines(), "--- launcher", *launcher]).strip()
