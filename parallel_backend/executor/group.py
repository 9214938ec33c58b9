"""The caller's side: an executor that sends jobs to a group, and starts it when it is needed."""

import logging
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .. import errors
from ..cogvideox.vae.preview import PictureListener
from ..devices import Devices
from ..errors import Cancelled, GroupError, GroupFailure, GroupLost, GroupUnavailable, RequestError
from ..group import failures, protocol
from ..group.codec import split_fields
from ..group.connection import POLL_SECONDS, Broken, Stalled, connect, talking
from ..group.exit_cause import ExitCause
from ..group.launcher import HELLO_SECONDS, Launcher
from ..group.muster import Muster
from ..group.ownership import OwnerWatch
from ..group.preflight import check_possible, group_python
from ..group.protocol import Message
from ..group.registry import GroupAddress, running
from ..jobs import Job, Progress, Report, Result, SampleJob
from ..plan import Plan
from .base import Executor, StepListener, StopSignal, never, silent

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""At most this long for the processes to answer; a loaded machine imports torch slowly."""
CANCEL_SECONDS = 600.0
"""At most this long for a cancelled job to finish its step."""
STATUS_SECONDS = 30.0
"""At most this long for a group to say what it does, which needs no rank to be idle."""
RECOVERY_SECONDS = 60.0
"""At most this long from a broken connection until the group's end is known, or it answers again."""
SWEPT_SECONDS = 3.0
"""At least this long until a group whose folder is gone is given up."""
ABSENT, STARTING, WAITING = "absent", "starting", "waiting for the other hosts"
"""States of a group that holds nothing."""


@dataclass
class Keepsake:
    """What a group reports of a job, its steps aside."""

    on_picture: PictureListener | None = None
    """Gets its previews."""
    progress: Progress | None = None
    """What to go on from when the group is lost."""


class GroupExecutor(Executor):
    """Runs jobs in a group of processes.

    The group is started at the first job, started again when it was lost, and ended with :meth:`close`.

    Args:
        plan: how each forward is split.
        devices: as many as the plan needs, or its share of them where there are other hosts.
        muster: the way to those.
    Raises:
        RequestError, GroupUnavailable: when no such group can be here; nothing has been started.
    """

    def __init__(self, plan: Plan, devices: Devices, muster: Muster | None = None):
        check_possible(plan, devices, muster.place.nodes if muster else 1)
        self.plan = plan
        self.devices = str(devices)
        self.address: GroupAddress | None = None
        self._launcher: Launcher | None = Launcher(plan, devices, muster)
        self._answered: GroupAddress | None = None
        """The life of the group that has answered, so that one which does not any more is lost."""
        self._lock = threading.Lock()

    @classmethod
    def attach(cls, address: GroupAddress) -> "GroupExecutor":
        """An executor for a group that another process keeps; :meth:`close` leaves it running.

        Raises:
            GroupError: when it has just ended.
        """
        executor = cls.__new__(cls)
        try:
            description = address.describe()
        except (OSError, ValueError) as error:
            raise GroupError(f"the group at {address.folder} is gone; start it again with serve") from error
        executor.plan, executor.devices = Plan.parse(description["plan"]), description["devices"]
        executor.address, executor._launcher, executor._lock = address, None, threading.Lock()
        executor._answered = None
        executor._owner, executor._owner_watch = description["owner"], OwnerWatch(Path(description["lock"]))
        return executor

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """See :meth:`Executor.torch_devices`."""
        return Devices.parse(self.devices).torch_devices

    def start(self) -> None:
        """Starts the group if it is not there, without waiting for it.

        Raises:
            GroupUnavailable: when it cannot start, or could not a moment ago and nothing has changed.
        """
        with self._lock:
            if self._launcher and not self._launcher.is_running():
                if self._launcher.process is not None:
                    cause = self._launcher.exit_cause()
                    if self._answered == self.address:  # else it never came up
                        logger.warning("the group of plan '%s' was lost: %s; starting it again", self.plan, cause.cause)
                    self._launcher.stop()
                failures.check(str(self.plan), self.devices)
                self.address = self._launcher.start()

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`; a group that is not there is ``absent``."""
        known = {"plan": str(self.plan), "devices": self.devices, **self._about_hosts()}
        if self.address is None or (self._launcher and not self._launcher.is_running()):
            return {"state": ABSENT, **known}
        if self._launcher is None and not Path(self.address.socket).exists():
            return {"state": self._what_it_waits_for(), **known}
        try:
            return {**known, **self._ask(Message("status"), seconds=STATUS_SECONDS).plain}
        except GroupLost:
            return {"state": ABSENT, **known}

    def _about_hosts(self) -> dict[str, Any]:
        """The hosts of the group, where there are several."""
        hosts = self._description().get("hosts")
        return {"hosts": hosts} if hosts else {}

    def _description(self) -> dict[str, Any]:
        """What the group's folder says; nothing where it has gone."""
        try:
            return self.address.describe() if self.address else {}
        except (OSError, ValueError):
            return {}

    def _what_it_waits_for(self) -> str:
        """The state of a group that does not listen yet."""
        description = self._description()
        if not description:
            return ABSENT
        if description["node"]:
            return (
                f"part of a group whose node 0 is on {description['hosts'][0]['name']}" if "hosts" in description else WAITING
            )
        return WAITING if description["nodes"] > 1 and "hosts" not in description else STARTING

    def free(self) -> None:
        """See :meth:`Executor.free`. A group that is not there holds nothing."""
        if self.status()["state"] not in (ABSENT, STARTING, WAITING):
            self._ask(Message("free"))

    def close(self) -> None:
        """See :meth:`Executor.close`. A group that another process keeps goes on."""
        with self._lock:
            if self._launcher:
                self._launcher.stop()
                self._launcher.leave()
                self.address = None

    def share(self) -> None:
        """Starts the group for all of the user's processes."""
        self._launcher.is_shared = True
        self.start()

    def wait(self) -> int:
        """Waits until the group's processes end. Returns their exit status; 1 where they have been given up."""
        process = self._launcher.process
        return process.wait() if process else 1

    @property
    def lost(self) -> ExitCause | None:
        """Why the processes ended that were lost last, until they are started again; None when another process keeps them."""
        if self._launcher is None:
            return None
        with self._lock:
            ended = self._launcher.process is not None and not self._launcher.is_running()
            return self._launcher.exit_cause() if ended else self._launcher.lost

    def is_usable(self) -> bool:
        """See :meth:`Executor.is_usable`. A group of its own is started again when it was lost."""
        return self._launcher is not None or self.address in running()

    def is_there(self) -> bool:
        """Whether its processes are there, if only to start."""
        return self._launcher.is_running() if self._launcher else self.address in running()

    def stop(self) -> None:
        """Ends the group, whoever keeps it."""
        self._ask(Message("stop"))

    def _run(
        self, job: Job, on_step: StepListener, should_stop: StopSignal, on_picture: PictureListener | None = None
    ) -> Result:
        """Runs a job. When the group is lost it resumes from the last kept step; a second loss at the same step is an error."""
        notes: list[str] = []
        lost_at = None
        while True:
            kept = Keepsake(on_picture)
            try:
                answer = self._ask(Message(job.kind, *split_fields(job)), on_step, should_stop, kept)
                break
            except GroupLost as lost:
                error = lost if self._launcher or lost.is_there else self._find_again(lost, should_stop)
                if kept.progress:
                    job = replace(job, progress=kept.progress)
                done = job.progress.step if isinstance(job, SampleJob) and job.progress else 0
                if done == lost_at:
                    kind = GroupError if error.came_up else GroupUnavailable
                    raise kind(f"{error.summary}; twice there, so it is not tried again", details=error.details) from lost
                lost_at = done
                remedy = ("connecting", "connected") if error.is_there else ("starting the group", "the group was started")
                notes.append(f"{error.summary}; {remedy[1]} again and went on after step {done}")
                logger.warning("%s; %s again, to go on after step %d", error.summary, remedy[0], done)
        report = {key: tuple(value) if isinstance(value, list) else value for key, value in answer.plain["report"].items()}
        if self._launcher and self._launcher.note:
            notes.append(self._launcher.note)
        report["notes"] = (*notes, *report["notes"])
        return Result(answer.tensors["tensor"], Report(**report))

    def _ask(
        self,
        message: Message,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        kept: "Keepsake | None" = None,
        seconds: float | None = None,
    ) -> Message:
        """Sends a request and waits for its last answer, for so many seconds at most."""
        self.start()
        address = self.address
        connection = self._connect(address, should_stop)
        try:
            with connection:
                with talking():
                    protocol.send(connection, message)
                return self._listen(connection, on_step, should_stop, kept or Keepsake(), seconds)
        except Broken as error:
            raise self._broken(address, should_stop) from error

    def _connect(self, address: GroupAddress, should_stop: StopSignal) -> Connection:
        """A connection, once the group answers."""
        began = time.monotonic()
        while True:
            try:
                connection = connect(address.socket, address.key, should_stop)
                self._answered = address
                failures.forget(str(self.plan), self.devices)
                return connection
            except AuthenticationError as error:
                raise GroupError(f"the group at {address.folder} does not know this key") from error
            except Stalled as error:
                raise GroupError(f"the group at {address.folder} does not answer; its logs are there") from error
            except (EOFError, OSError) as error:
                if should_stop():
                    raise Cancelled("stopped while the group was starting") from error
                waited = time.monotonic() - began
                if cause := self._why_not_waited_for(address, error, waited):
                    raise self._lost(address, cause) from error
            time.sleep(POLL_SECONDS)

    def _why_not_waited_for(self, address: GroupAddress, error: Exception, waited: float) -> ExitCause | bool:
        """Whether to stop waiting for a group that does not answer: a cause, or True where its exit says why."""
        if self._launcher is None:  # another's may start while it has no socket and its owner lives
            return not (isinstance(error, FileNotFoundError) and address in running() and waited < START_SECONDS)
        if not self._launcher.is_running():
            return True
        if not address.folder.exists() and waited > SWEPT_SECONDS:  # its processes may be ending, and remove it themselves
            return ExitCause(f"its folder {address.folder} was removed", by_itself=False)
        if self._launcher.is_mute():
            what = f"{group_python()} did not run this pack within {HELLO_SECONDS:.0f} s; correct XDIT_PYTHON"
            return ExitCause(what, details=self._launcher.details())
        if self._answered == address and waited > RECOVERY_SECONDS:
            return ExitCause(f"rank 0 has not listened for {RECOVERY_SECONDS:.0f} s", by_itself=False)
        if waited > START_SECONDS:
            return ExitCause(f"no answer within {START_SECONDS:.0f} s", details=self._launcher.details())
        return False

    def _listen(
        self,
        connection: Connection,
        on_step: StepListener,
        should_stop: StopSignal,
        kept: "Keepsake",
        seconds: float | None,
    ) -> Message:
        """Passes steps on until the request ends; asks the group to stop when the caller wants to."""
        deadline, late = seconds and time.monotonic() + seconds, f"did not answer within {seconds or 0:.0f} s"
        is_cancelled = False
        while True:
            if not is_cancelled and should_stop():
                with talking():
                    connection.send_bytes(b"cancel")
                is_cancelled, deadline = True, time.monotonic() + CANCEL_SECONDS
                late = f"did not stop within {CANCEL_SECONDS:.0f} s of being asked"
            if deadline and time.monotonic() > deadline:
                raise GroupError(f"the group {late}")
            with talking():
                if not connection.poll(POLL_SECONDS):
                    continue
                answer = protocol.receive(connection)
            if answer.kind == "step":
                on_step(answer.plain["step"], answer.plain["steps"])
            elif answer.kind == "kept":
                kept.progress = Progress(**answer.plain, **answer.tensors)
            elif answer.kind == "picture":
                kept.on_picture(answer.tensors["picture"])
            elif answer.kind == "cancelled":
                raise Cancelled(answer.plain["message"])
            elif answer.kind == "failed":
                raise self._failure(answer.plain)
            else:
                return answer

    def _failure(self, plain: dict[str, Any]) -> Exception:
        """The error that a ``failed`` answer stands for."""
        if plain["error"] == RequestError.__name__:
            return errors.RequestError(plain["message"])
        rank = plain.get("rank")
        where = "the group" if rank is None else f"rank {rank}" + (f" on {plain['host']}" if plain.get("host") else "")
        return GroupError(
            f"{where} failed: {plain['error']}: {plain['message']}", rank=rank, details=plain.get("traceback", "")
        )

    def _broken(self, address: GroupAddress, should_stop: StopSignal) -> GroupFailure:
        """The error of a connection that broke: the group answers again, or how it ended."""
        try:
            self._connect(address, should_stop).close()
        except GroupFailure as error:
            return error
        return GroupLost("the connection to the group broke", is_there=True)

    def _lost(self, address: GroupAddress, cause: ExitCause | bool) -> GroupFailure:
        """The error of a group that does not answer, with the last words of the rank that went first."""
        if self._launcher is None:
            if self._owner_watch.is_alive():
                return GroupLost(f"the group that process {self._owner} keeps was lost")
            return GroupError(f"the group at {address.folder} is gone; start it again with serve")
        with self._lock:
            if self.address != address or self._launcher.process is None:  # another thread has seen to it
                return GroupLost("the group was lost in another job")
            return self._bury(self._launcher.exit_cause() if cause is True else cause)

    def _find_again(self, error: GroupLost, should_stop: StopSignal) -> GroupLost:
        """Waits for the group that the owner starts in the place of the one that was lost. Returns why that was.

        Raises:
            GroupError: where none comes, or only when serve runs on another host again.
        """
        deadline = time.monotonic() + START_SECONDS
        while self._owner_watch.is_alive() and time.monotonic() < deadline:
            if should_stop():
                raise Cancelled("stopped while the group was started again")
            for address, description in running().items():
                is_same = description["shared"] and (description["plan"], description["devices"]) == (
                    str(self.plan),
                    self.devices,
                )
                if is_same and address != self.address:
                    self.address = address
                    lost = description["lost"]
                    if lost is None:
                        return error
                    known = {"details": lost["details"]}
                    if lost["gone"]:
                        raise GroupError(
                            f"the group was lost: {lost['cause']}; it goes on when serve runs there again", **known
                        )
                    return GroupLost(f"the group was lost: {lost['cause']}", **known)
            time.sleep(POLL_SECONDS)
        raise GroupError(f"{error.summary}, and no other came; start it again with serve", details=error.details) from error

    def _bury(self, cause: ExitCause) -> GroupFailure:
        came_up = self._answered == self.address or Path(self.address.socket).exists()  # once all ranks have met
        details = cause.details or self._launcher.details()
        self._launcher.stop()
        if not cause.by_itself:  # what the other ranks met with only followed
            return GroupLost(f"the group was lost: {cause.cause}", details=details, came_up=came_up)
        if not came_up:
            self.address = None  # it was never there, so the next start is no restart
            error = GroupUnavailable(f"the group did not start: {cause.cause}{words_of(cause)}", details=details)
            failures.remember(str(self.plan), self.devices, error, cause)
            return error
        if cause.failure:
            return self._failure(cause.failure)
        return GroupError(f"the group's processes ended: {cause.cause}", details=details)


def words_of(cause: ExitCause) -> str:
    """What the rank that failed said, where it said something."""
    failure = cause.failure
    return f": {failure['error']}: {failure['message'].strip().partition(chr(10))[0]}" if failure else ""
