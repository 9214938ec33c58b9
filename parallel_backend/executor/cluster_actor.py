"""What an actor holds on its node: a group, or a part of one that is over several nodes.

Requests and answers are the bytes of :mod:`parallel_backend.group.codec`, as on a group's socket, so nothing of a caller is unpickled here.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from ..cluster.actor import about_here, devices_here
from ..cluster.members import Members
from ..errors import Cancelled, GroupFailure
from ..group import protocol
from ..group.codec import LAST, Message, decode, encode, read_head
from ..group.launcher import Launcher
from ..group.part import Part
from ..group.server import refusal
from ..plan import Plan
from .group import GroupExecutor
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
            found = self.group.answers(decode(data), lambda: number in self._cancelled, receive=protocol.receive_bytes)
            with closing(found):
                for answer in found:
                    yield answer
                    if read_head(answer).kind in LAST:
                        return
        except Cancelled as error:
            yield encode(Message("cancelled", {"message": str(error)}))
        except GroupFailure as error:
            known = {name: getattr(error, name) for name in ("came_up", "is_there") if hasattr(error, name)}
            plain = {"error": type(error).__name__, "message": error.summary, "details": error.details, **known}
            yield encode(Message("lost", plain))
        except Exception as error:
            yield encode(refusal(error))
        finally:
            self._cancelled.discard(number)

    def cancel(self, number: str) -> None:
        """Has a request stop."""
        self._cancelled.add(number)

    def look(self) -> dict[str, Any]:
        """Returns the overview of the group."""
        return {**overview(self.group), "stage": self.group.stage()}


class Ranks(Held):
    """This node's ranks of a group that another node leads."""

    def __init__(self, plan: str):
        super().__init__(plan)
        self._launcher: Launcher | None = None
        self._is_asked_to_end = False

    def lend(self, part: dict[str, Any]) -> dict[str, Any] | None:
        """Starts the ranks, and returns why they ended; None if they were asked to, or did so in good order.

        Args:
            part: the fields of a :class:`parallel_backend.group.part.Part`.
        Returns:
            The fields of a :class:`parallel_backend.group.exit_cause.ExitCause`.
        """
        self._is_asked_to_end = False
        self._launcher = Launcher(self.plan, self.devices, Part(**part))
        self._launcher.start()
        try:
            status = self._launcher.process.wait()
            cause = None if status == 0 or self._is_asked_to_end else self._launcher.exit_cause()
        finally:
            self._launcher.stop()
            self._launcher.leave()
        return cause and asdict(cause)

    def end(self) -> None:
        """Ends the ranks."""
        self._is_asked_to_end = True
        if self._launcher and self._launcher.process:
            self._launcher.process.kill()
