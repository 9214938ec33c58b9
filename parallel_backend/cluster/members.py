"""The other nodes of a group over several nodes, as node 0 sees them. Ray says whether they live."""

import random
import socket
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from ..config import CONFIG
from ..errors import GroupUnavailable, reason_of
from ..group.exit_cause import ExitCause, first_of
from ..group.part import Part
from ..plan import Plan
from .actor import about_here, check_version, greet, place
from .nodes import connect

PORTS = range(20_000, 32_000)
"""Above those of Ray's workers, and below those that Linux gives to connections, which could take the port before rank 0 does."""


class Members:
    """An actor on each other node, which holds that node's ranks. Ray starts one again, maybe on another node, when it is lost.

    Args:
        plan: of the group. This actor's placement group has a bundle for each node.
    """

    def __init__(self, plan: Plan):
        from ray.util import get_current_placement_group

        bundles = get_current_placement_group()
        self.nodes = bundles.bundle_count
        self._plan = plan
        self._actors = [place("Ranks", plan, bundles, number) for number in range(1, self.nodes)]
        self._parts: dict[Future, Part] = {}
        """Each node's part, by its end."""
        self.has_trouble = False
        """Whether another node's part has failed, so that this node's was ended too."""

    def meet(self) -> Part:
        """Waits for the nodes and has them start their ranks. Returns node 0's part.

        Raises:
            GroupUnavailable: after ``wait_seconds``, or when a node cannot import the pack.
            GroupError: when a node has another version of it.
        """
        ray = connect()
        try:
            known = ray.get([greet(actor) for actor in self._actors], timeout=CONFIG.wait_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise GroupUnavailable(
                f"the Ray cluster has had no room for {self.nodes} nodes for {CONFIG.wait_seconds:.0f} s"
            ) from error
        except ray.exceptions.RayError as error:
            raise GroupUnavailable(f"plan '{self._plan}' does not start on another node: {reason_of(error)}") from error
        for about in known:
            check_version(about)
        here = about_here()
        # Parts on one node have consecutive ranks, so that the inner degrees of the plan stay on it.
        others = sorted(zip(known, self._actors), key=lambda one: (one[0]["node_id"] != here["node_id"], one[0]["node_id"]))
        first = Part(0, self.nodes, (here["address"], free_port(here["address"])), here["address"], self._name(0, here))
        self._parts, self.has_trouble = {}, False
        for number, (about, actor) in enumerate(others, 1):
            part = replace(first, node=number, address=about["address"], name=self._name(number, about))
            self._parts[actor.call.remote("lend", asdict(part)).future()] = part
        return first

    def _name(self, number: int, about: dict[str, Any]) -> str:
        each = self._plan.world_size // self.nodes
        which = f"rank {number}" if each == 1 else f"ranks {number * each}-{(number + 1) * each - 1}"
        return f"node {about['node']} ({about['address']}, {which})"

    def watch(self, on_trouble: Callable[[], None]) -> None:
        """Has ``on_trouble`` called in a thread of Ray's when another node's part fails."""
        parts = self._parts

        def notice(ended: Future) -> None:
            if parts is self._parts and self._cause(ended, parts[ended]):
                self.has_trouble = True
                on_trouble()

        for end in parts:
            end.add_done_callback(notice)

    def _cause(self, ended: Future, part: Part) -> ExitCause | None:
        """Returns why a node's part has ended; None if it was asked to end."""
        try:
            cause = ended.result()
        except connect().exceptions.RayError as error:
            return ExitCause(f"{part.name} was lost: {reason_of(error)}", by_itself=False, gone=True)
        return cause and ExitCause(**{**cause, "cause": f"{part.name}: {cause['cause']}"})

    def verdict(self, own: ExitCause | None) -> ExitCause:
        """Ends the group on all nodes. Returns why it ended.

        Args:
            own: how node 0's part ended; None if another's ended first.
        """
        causes = self.end()
        return first_of([*([own] if own else []), *causes] or [ExitCause("it has ended", by_itself=False)])

    def end(self) -> list[ExitCause]:
        """Ends the ranks of all other nodes. Returns why some had failed before."""
        parts, self._parts = self._parts, {}
        if not parts:
            return []
        for actor in self._actors:
            actor.call.remote("end")
        ended, left = wait(parts, CONFIG.verdict_seconds)
        found = [cause for one in ended if (cause := self._cause(one, parts[one]))]
        return found + [ExitCause(f"{parts[one].name} does not answer", by_itself=False, gone=True) for one in left]


def free_port(address: str) -> int:
    """Returns a free port of this node.

    Raises:
        GroupUnavailable: when there is none.
    """
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    for port in random.sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server((address, port), family=family):
            return port
    raise GroupUnavailable(f"no port of {address} from {PORTS.start} to {PORTS.stop - 1} is free")
