"""The caller's side: an executor that sends jobs to a group, and starts it when it is needed."""

import logging
import multiprocessing
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch

from .. import errors
from ..cogvideox.preview import PictureListener
from ..devices import Devices
from ..errors import Cancelled, GroupError, GroupFailure, GroupLost, GroupUnavailable, RequestError
from ..executor import Executor, StepListener, StopSignal, never, silent
from ..jobs import Job, Progress, Report, Result, SampleJob, split_fields
from ..plans import Plan
from . import protocol
from .address import GroupAddress, is_alive, running, shared
from .death import Death
from .launcher import Launcher, check_possible
from .muster import Muster
from .protocol import Message

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""At most this long for the processes to answer; a loaded machine imports torch slowly."""
CANCEL_SECONDS = 600.0
"""At most this long for a cancelled job to finish its step."""
POLL_SECONDS = 0.05
ABSENT, STARTING, WAITING = "absent", "starting", "waiting for the other hosts"
"""States of a group that holds nothing."""


@dataclass
class Keepsake:
    """What a group has told of its job beside its steps."""

    on_picture: PictureListener | None = None
    """Who is shown pictures of it."""
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
        self._lock = threading.Lock()

    @classmethod
    def attach(cls, address: GroupAddress) -> "GroupExecutor":
        """An executor for a group that somebody else keeps; :meth:`close` leaves it running."""
        executor = cls.__new__(cls)
        description = address.describe()
        executor.plan, executor.devices = Plan.parse(description["plan"]), description["devices"]
        executor.address, executor._launcher, executor._lock = address, None, threading.Lock()
        executor._owner = description["owner"]
        return executor

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """See :meth:`Executor.torch_devices`."""
        return Devices.parse(self.devices).torch_devices

    def start(self) -> None:
        """Starts the group if it is not there, without waiting for it."""
        with self._lock:
            if self._launcher and not self._launcher.is_running():
                if self._launcher.process is not None:
                    death = self._launcher.cause_of_death()
                    if Path(self.address.socket).exists():  # else it never came up
                        logger.warning("the group of plan '%s' was lost: %s; starting it again", self.plan, death.cause)
                    self._launcher.stop()
                self.address = self._launcher.start()

    def status(self) -> dict[str, Any]:
        """See :meth:`Executor.status`; a group that is not there is ``absent``."""
        known = {"plan": str(self.plan), "devices": self.devices, **self._about_hosts()}
        if self.address is None or (self._launcher and not self._launcher.is_running()):
            return {"state": ABSENT, **known}
        if self._launcher is None and not Path(self.address.socket).exists():
            return {"state": self._what_it_waits_for(), **known}
        try:
            return {**known, **self._ask(Message("status")).plain}
        except GroupLost:
            return {"state": ABSENT, **known}

    def _about_hosts(self) -> dict[str, Any]:
        """The hosts of the group, where there are several."""
        try:
            description = self.address.describe() if self.address else {}
        except FileNotFoundError:  # it has just ended
            return {}
        return {"hosts": description["hosts"]} if description.get("hosts") else {}

    def _what_it_waits_for(self) -> str:
        """The state of a group that does not listen yet."""
        description = self.address.describe()
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
        """See :meth:`Executor.close`. A group that somebody else keeps goes on."""
        with self._lock:
            if self._launcher:
                self._launcher.stop()
                self._launcher.leave()
                self.address = None

    def share(self) -> None:
        """Starts the group for all of the person's processes."""
        self._launcher.is_shared = True
        self.start()

    def wait(self) -> int:
        """Waits until the group's processes end. Returns their exit status."""
        return self._launcher.process.wait()

    @property
    def lost(self) -> Death | None:
        """How the processes ended that were lost last, until they are started again; None when somebody else keeps them."""
        return self._launcher and self._launcher.lost

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
        """Runs a job, and goes on from where it was when the group is lost; what is lost twice there is not tried again."""
        notes: list[str] = []
        lost_at = None
        while True:
            kept = Keepsake(on_picture)
            try:
                answer = self._ask(Message(job.kind, *split_fields(job)), on_step, should_stop, kept)
                break
            except GroupLost as lost:
                error = lost if self._launcher else self._find_again(lost)
                if kept.progress:
                    job = replace(job, progress=kept.progress)
                done = job.progress.step if isinstance(job, SampleJob) and job.progress else 0
                if done == lost_at:
                    kind = GroupError if error.came_up else GroupUnavailable
                    raise kind(f"{error.summary}; twice there, so it is not tried again", details=error.details) from lost
                lost_at = done
                notes.append(f"{error.summary}; the group was started again and went on after step {done}")
                logger.warning("%s; starting the group again, to go on after step %d", error.summary, done)
        report = {key: tuple(value) if isinstance(value, list) else value for key, value in answer.plain["report"].items()}
        report["notes"] = (*notes, *report["notes"])
        return Result(answer.tensors["tensor"], Report(**report))

    def _ask(
        self,
        message: Message,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        kept: "Keepsake | None" = None,
    ) -> Message:
        """Sends a request and waits for its last answer."""
        self.start()
        address = self.address
        try:
            with self._connect(address, should_stop) as connection:
                protocol.send(connection, message)
                return self._listen(connection, on_step, should_stop, kept or Keepsake())
        except (EOFError, ConnectionError) as error:
            raise self._lost(address) from error

    def _connect(self, address: GroupAddress, should_stop: StopSignal) -> Connection:
        """A connection, once the group answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return Client(address.socket, family="AF_UNIX", authkey=address.key)
            except multiprocessing.AuthenticationError as error:
                raise GroupError(f"the group at {address.folder} does not know this key") from error
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if not self._may_come_up(address, error):
                    raise self._lost(address) from error
                if should_stop():
                    raise Cancelled("stopped while the group was starting") from None
                if time.monotonic() > deadline:
                    raise self._lost(address, Death(f"no answer within {START_SECONDS:.0f} s")) from error
                time.sleep(POLL_SECONDS)

    def _may_come_up(self, address: GroupAddress, error: OSError) -> bool:
        """Whether a group that does not answer may be starting still: its own by its processes, another's by having no
        socket yet and an owner that lives."""
        if self._launcher is not None:
            return self._launcher.is_running()
        return isinstance(error, FileNotFoundError) and address in running()

    def _listen(self, connection: Connection, on_step: StepListener, should_stop: StopSignal, kept: "Keepsake") -> Message:
        """Passes steps on until the request ends; asks the group to stop when the caller wants to."""
        deadline = None
        while True:
            if deadline is None and should_stop():
                connection.send_bytes(b"cancel")
                deadline = time.monotonic() + CANCEL_SECONDS
            if deadline and time.monotonic() > deadline:
                raise GroupError(f"the group did not stop within {CANCEL_SECONDS:.0f} s of being asked")
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

    def _lost(self, address: GroupAddress, death: Death | None = None) -> GroupFailure:
        """The error of a group that does not answer, with the last words of the rank that went first."""
        if self._launcher is None:
            if is_alive(self._owner):
                return GroupLost(f"the group that process {self._owner} keeps was lost")
            return GroupError(f"the group at {address.folder} is gone; start it again with serve")
        with self._lock:
            if self.address != address or self._launcher.process is None:  # another thread has seen to it
                return GroupLost("the group was lost in another job")
            return self._bury(death or self._launcher.cause_of_death())

    def _find_again(self, error: GroupLost) -> GroupLost:
        """Waits for the group that the owner starts in the place of the one that was lost. Returns why that was.

        Raises:
            GroupError: where none comes, or only when somebody starts a host again.
        """
        deadline = time.monotonic() + START_SECONDS
        while is_alive(self._owner) and time.monotonic() < deadline:
            for address in shared(str(self.plan), self.devices):
                if address != self.address and address.describe()["owner"] == self._owner:
                    self.address = address
                    lost = address.describe()["lost"]
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

    def _bury(self, death: Death) -> GroupFailure:
        came_up = Path(self.address.socket).exists()  # rank 0 listens once all ranks have met
        details = death.details or self._launcher.last_words()
        self._launcher.stop()
        if not death.by_itself:  # what the other ranks met with only followed
            return GroupLost(f"the group was lost: {death.cause}", details=details, came_up=came_up)
        if not came_up:
            self.address = None  # it was never there, so the next start is no restart
            return GroupUnavailable(f"the group did not start: {death.cause}", details=details)
        if death.failure:
            return self._failure(death.failure)
        return GroupError(f"the group's processes ended: {death.cause}", details=details)
