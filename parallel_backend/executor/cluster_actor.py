"""What an actor holds on its node: a group, or a part of one that is over several nodes.

Requests and answers are the bytes of :mod:`parallel_backend.group.codec`, as on a group's socket, so nothing of a caller is unpickled here.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ..cluster.actor import about_here, devices_here
from ..cluster.members import Members
from ..config import CONFIG
from ..errors import GroupFailure, reason_of
from ..group.codec import decode, encode
from ..group.launcher import Launcher
from ..group.part import Part
from ..group.server import refusal
from ..plan import Plan
from .group import FAILED, GroupExecutor
from .overview import overview


class Held:
    """The devices that Ray has given to this process.

    Args:
        plan: of the whole group.
    """

    def __init__(self, plan: str):
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        self.plan, self.devices = Plan.parse(plan), devices_here()
        if self.devices.kind == "cuda":
            os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets 1; a group divides the cores among its ranks

    def start(self) -> dict[str, Any]:
        """Returns where it is; see :func:`.about_here`."""
        return about_here()


class Group(Held):
    """A group that this node's rank 0 leads."""

    def __init__(self, plan: str):
        super().__init__(plan)
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._group: GroupExecutor | None = None

    @property
    def group(self) -> GroupExecutor:
        """The executor of the group.

        Raises:
            GroupFailure, RequestError: when no such group can run on this node.
        """
        with self._lock:
            if self._group is None:
                members = Members(self.plan) if self.devices.count < self.plan.world_size else None
                self._group = GroupExecutor(self.plan, self.devices, members)
            return self._group

    def start(self) -> dict[str, Any]:
        """Starts the group. Returns where it is; the first request tells of a failure."""
        try:
            self.group.start()
        except Exception:
            logging.exception("the group does not start")
        return super().start()

    def ask(self, number: str, data: bytes) -> Iterator[bytes]:
        """Passes a request on to the group, and yields the answers. A lost group is started again by the next request.

        Args:
            number: of the request, for :meth:`cancel`.
            data: the request.
        """
        try:
            for answer in self.group.answers(decode(data), lambda: number in self._cancelled):
                yield encode(answer)
        except Exception as error:
            yield encode(refusal(error))
        finally:
            self._cancelled.discard(number)

    def cancel(self, number: str) -> None:
        """Has a request stop."""
        self._cancelled.add(number)

    def look(self) -> dict[str, Any]:
        """Returns the overview of the group.

        A group that cannot be made has failed. The caller would take an error for the loss of this actor; it asks again after that.
        """
        try:
            group = self.group
        except Exception as error:
            summary = error.summary if isinstance(error, GroupFailure) else reason_of(error)
            return {"state": FAILED, "last_error": summary, "ranks": []}
        return {**overview(group), "stage": group.stage()}


class Ranks(Held):
    """This node's ranks of a group that another node leads."""

    def __init__(self, plan: str):
        super().__init__(plan)
        self._launcher: Launcher | None = None
        """Of the ranks; None once they are asked to end."""

    def lend(self, part: dict[str, Any]) -> dict[str, Any] | None:
        """Starts the ranks, and returns why they ended; None if they were asked to, or did so in good order.

        Args:
            part: the fields of a :class:`parallel_backend.group.part.Part`.
        Returns:
            The fields of a :class:`parallel_backend.group.exit_cause.ExitCause`.
        """
        launcher = self._launcher = Launcher(self.plan, self.devices, Part(**part))
        launcher.start()
        if self._launcher is not launcher:  # it was asked to end meanwhile
            launcher.process.kill()
        try:
            status = launcher.process.wait()
            cause = launcher.exit_cause() if status != 0 and self._launcher is launcher else None
        finally:
            launcher.stop()
            launcher.leave()
        return cause and asdict(cause)

    def end(self) -> None:
        """Ends the ranks. If one has failed, they end by themselves, and :meth:`lend` returns why: the other node has only lost it."""
        launcher = self._launcher
        process = launcher and launcher.process
        if process:
            with suppress(TimeoutError):
                process.wait(2 * CONFIG.settle_seconds)
                return
        if self._launcher is launcher:
            self._launcher = None
        if process:
            process.kill()
