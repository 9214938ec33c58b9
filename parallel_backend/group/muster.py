"""The hosts of a group meet at node 0, watch each other while the group runs, and agree on why it ended.

Each start of a group opens new connections between node 0 and the other hosts. The ``serve`` processes hold them: however one
ends, the others notice.
"""

import logging
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from ..config import CONFIG
from ..errors import GroupUnavailable, RequestError
from .exit_cause import ExitCause, first_of
from .hosts import Common, Host, Place, family_of, free_port, numbered, shown
from .link import HostLink, LinkLost
from .preflight import interface_of

logger = logging.getLogger(__name__)

MAX_DETAILS = 8000
"""Longest excerpt of logs sent to another host, in characters."""


@dataclass(frozen=True)
class Meeting:
    """What every host knows when all have come."""

    hosts: tuple[Host, ...]
    plan: str
    store: tuple[str, int]
    """Host and port of the store where the ranks meet, on node 0."""
    interface: str | None
    """This host's network interface to the others."""


class Muster(ABC):
    """This host's part in a group of several hosts.

    Args:
        place: this host's number, and the rendezvous.
        common: what all hosts must have in common.
        devices: of this host, for messages.
    """

    def __init__(self, place: Place, common: Common, devices: str):
        self.place = place
        self.common = common
        self.devices = devices
        self.meeting: Meeting | None = None
        self._links: dict[int, HostLink] = {}
        self._readers: list[threading.Thread] = []
        self._on_trouble: Callable[[], None] = lambda: None
        self._state = threading.Condition()
        self._ends: dict[int, ExitCause | None] = {}
        """How other hosts' parts ended; None is without a failure."""
        self._has_trouble = False

    @property
    def name(self) -> str:
        """This host's name."""
        return socket.gethostname()

    @abstractmethod
    def meet(self) -> Meeting:
        """Waits for the other hosts.

        Raises:
            GroupUnavailable: after the timeout of ``place``, naming the missing hosts.
            RequestError: when this host differs from node 0.
        """

    @abstractmethod
    def verdict(self, own: ExitCause | None) -> ExitCause:
        """Ends the group on all hosts and returns why it ended.

        Args:
            own: how this host's part ended; None if another's ended first.
        """

    @abstractmethod
    def part(self, *, again: bool, cause: ExitCause | None = None) -> None:
        """Closes the connections.

        Args:
            again: whether this host will meet the others for another start of the group.
            cause: why the group ended.
        """

    def watch(self, on_trouble: Callable[[], None]) -> bool:
        """Has ``on_trouble`` called in a thread when the group ends on another host. Returns False if it already has."""
        with self._state:
            self._on_trouble = on_trouble
            return not self._has_trouble

    @property
    def has_trouble(self) -> bool:
        """Whether the group ended on another host, so that this host's part was ended too."""
        return self._has_trouble

    def _begin(self, meeting: Meeting, links: dict[int, HostLink]) -> Meeting:
        with self._state:
            self.meeting, self._links, self._ends, self._has_trouble = meeting, links, {}, False
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in links.items()]
        for reader in self._readers:
            reader.start()
        return meeting

    def _read(self, node: int, link: HostLink) -> None:
        """Receives messages of one host until its connection closes."""
        try:
            while True:
                self._hear(node, link.receive())
        except (LinkLost, KeyError, TypeError, ValueError) as error:
            lost = error if isinstance(error, LinkLost) else "it sends what is no message"
            if self._links.get(node) is link:  # else it is from an earlier start
                self._ended(node, ExitCause(f"is gone: {lost}", by_itself=False, gone=True))
        finally:
            link.close()

    @abstractmethod
    def _hear(self, node: int, message: dict) -> None:
        """Handles a message of another host."""

    def _ended(self, node: int, cause: ExitCause | None) -> None:
        """Stores how another host's part ended, unless it is already known, and ends this host's."""
        with self._state:
            if node in self._ends:
                return
            self._ends[node] = cause and self._at(node, cause)
            self._state.notify_all()
        if cause:
            self._trouble()

    def _at(self, node: int, cause: ExitCause) -> ExitCause:
        """Adds the host to an exit cause."""
        return replace(cause, cause=f"{self.meeting.hosts[node]}{' ' if cause.gone else ': '}{cause.cause}")

    def _trouble(self) -> None:
        with self._state:
            first, self._has_trouble = not self._has_trouble, True
            on_trouble = self._on_trouble
        if first:
            on_trouble()

    def _hang_up(self) -> None:
        links, self._links = self._links, {}
        for link in links.values():
            link.finish()
        for reader in self._readers:
            reader.join(CONFIG.part_seconds)
        for link in links.values():
            link.close()


def plain(cause: ExitCause | None) -> dict | None:
    """Converts an exit cause to plain values, short enough for a message."""
    return cause and asdict(replace(cause, details=cause.details[-MAX_DETAILS:]))


def verdict_timeout() -> float:
    """Returns how long another host may take to end its part of a group and report how; a silent one is lost before."""
    return CONFIG.silent_seconds + CONFIG.verdict_seconds


class Leader(Muster):
    """Node 0, to which the other hosts connect.

    Raises:
        RequestError: when this machine cannot listen at the rendezvous.
    """

    def __init__(self, place: Place, common: Common, devices: str):
        super().__init__(place, common, devices)
        where = place.rendezvous
        try:
            self._listener = socket.create_server((where.host, where.port), family=family_of(where.host))
        except OSError as error:
            raise RequestError(
                f"rendezvous {where}: cannot listen there ({error.strerror}); "
                "node-rank 0 is the host that has this address, and the port must be free"
            ) from error
        self._listener.settimeout(CONFIG.poll_seconds)
        if interface_of(self._listener.getsockname()[0]) == "lo":
            logger.warning(
                "rendezvous %s is %s here, which no other machine can reach; give this machine's address on the network",
                where, self._listener.getsockname()[0],
            )  # fmt: skip

    def meet(self) -> Meeting:
        """See :meth:`Muster.meet`. A refused host may try again while the others wait."""
        place, began = self.place, time.monotonic()
        others = ", ".join(map(str, range(1, place.nodes)))
        logger.info("waiting %.0f s at %s for node%s %s", place.wait, place.rendezvous, "s"[: place.nodes - 2], others)
        arrivals: queue.Queue[tuple[HostLink, dict]] = queue.Queue()
        came: dict[int, tuple[HostLink, dict]] = {}
        try:
            while len(came) < place.nodes - 1:
                if time.monotonic() - began > place.wait:
                    raise GroupUnavailable(self._missing(came))
                self._accept(arrivals)
                while not arrivals.empty():
                    self._admit(*arrivals.get(), came)
        except BaseException as error:  # Ctrl-C too: the hosts that have come must not wait in vain
            for link, _ in came.values():
                link.part("over", again=False, cause=plain(ExitCause(str(error) or "its serve was ended there")))
            raise
        return self._open(came)

    def _accept(self, arrivals: queue.Queue) -> None:
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return

        def greet() -> None:  # in a thread, so that a silent host does not block the others
            link = HostLink(connection)
            try:
                hello = link.receive()
                link.send("welcome")
                link.receive()  # a host that gave up before it was accepted does not answer
                arrivals.put((link, hello))
            except LinkLost:
                link.close()

        threading.Thread(target=greet, daemon=True).start()

    def _admit(self, link: HostLink, hello: dict, came: dict[int, tuple[HostLink, dict]]) -> None:
        """Admits a host, or refuses it with the reason."""
        node, name = hello.get("node"), shown(hello.get("name"))
        there, here = f"host {name} ({link.there})", f"host {self.name} ({self.place.rendezvous.host})"
        taken = came.get(node) if isinstance(node, int) else None
        reason = self.common.difference(hello.get("common"), here=here, there=there)
        if not reason and (not isinstance(node, int) or not 0 < node < self.place.nodes):
            reason = f"node-rank is {node} on {there}; use 1 to {self.place.nodes - 1}"
        if not reason and taken and taken[0].there != link.there:
            reason = f"node-rank is {node} on {there}, which host {taken[1]['name']} ({taken[0].there}) has taken"
        if reason:
            logger.warning("refused a host: %s", reason)
            threading.Thread(target=link.part, args=("refused",), kwargs={"reason": reason}, daemon=True).start()
            return
        if taken:  # the same host again
            taken[0].close()
        came[node] = link, {**hello, "name": name}
        link.start_beating()
        logger.info("%s came as node %d", there, node)

    def _missing(self, came: dict[int, tuple[HostLink, dict]]) -> str:
        """Returns the message about missing hosts."""
        missing = [str(node) for node in range(1, self.place.nodes) if node not in came]
        return (
            f"no host came as node {' and '.join(missing)} to {self.place.rendezvous} within {self.place.wait:.0f} s; "
            f"start serve there with --nnodes {self.place.nodes} --node-rank {missing[0]} --rendezvous {self.place.rendezvous}"
        )

    def _open(self, came: dict[int, tuple[HostLink, dict]]) -> Meeting:
        where, links = self.place.rendezvous, {node: link for node, (link, _) in came.items()}
        others = [(came[node][1]["name"], came[node][0].there, shown(came[node][1].get("devices"))) for node in sorted(came)]
        hosts = numbered([(self.name, where.host, self.devices), *others], self.common.processes)
        port = free_port(where.host)
        for link in links.values():
            link.send("begin", hosts=[asdict(host) for host in hosts], plan=self.common.plan, port=port)
        interface = interface_of(next(iter(links.values())).here)
        return self._begin(Meeting(tuple(hosts), self.common.plan, (where.host, port), interface), links)

    def _hear(self, node: int, message: dict) -> None:
        if message["kind"] == "ended":
            self._ended(node, message["cause"] and ExitCause.read(message["cause"]))

    def verdict(self, own: ExitCause | None) -> ExitCause:
        """See :meth:`Muster.verdict`."""
        deadline = time.monotonic() + verdict_timeout()
        for link in self._links.values():
            link.send("end")
        with self._state:
            while len(self._ends) < len(self._links) and time.monotonic() < deadline:
                self._state.wait(CONFIG.poll_seconds)
            causes = [cause for cause in self._ends.values() if cause]
            silent = [self.meeting.hosts[node] for node in self._links if node not in self._ends]
        causes += [ExitCause(f"{host} does not end its part of the group", by_itself=False, gone=True) for host in silent]
        if own:
            causes.append(self._at(0, own))
        return first_of(causes) if causes else ExitCause("no host reported why")

    def part(self, *, again: bool, cause: ExitCause | None = None) -> None:
        """See :meth:`Muster.part`."""
        for link in self._links.values():
            link.send("over", again=again, cause=plain(cause))
        self._hang_up()
        if not again:
            self._listener.close()


class Member(Muster):
    """Any other host, which connects to node 0."""

    def __init__(self, place: Place, common: Common, devices: str):
        super().__init__(place, common, devices)
        self._over: dict | None = None

    @property
    def leader(self) -> str:
        """Name of node 0 for messages; its address before they have met."""
        return str(self.meeting.hosts[0]) if self.meeting else f"node 0 at {self.place.rendezvous}"

    def meet(self) -> Meeting:
        """See :meth:`Muster.meet`."""
        place, deadline = self.place, time.monotonic() + self.place.wait
        logger.info("waiting %.0f s for node 0 at %s", place.wait, place.rendezvous)
        while True:
            try:
                connection = socket.create_connection(
                    (place.rendezvous.host, place.rendezvous.port), timeout=CONFIG.silent_seconds
                )
            except OSError as error:
                if time.monotonic() > deadline:
                    raise GroupUnavailable(
                        f"node 0 was not at {place.rendezvous} within {place.wait:.0f} s ({error.strerror or error}); "
                        f"start serve there with --nnodes {place.nodes} --node-rank 0 --rendezvous {place.rendezvous}"
                    ) from error
                time.sleep(CONFIG.retry_seconds)
                continue
            link = HostLink(connection)
            try:
                return self._join(link)
            except LinkLost as lost:
                link.close()
                if time.monotonic() > deadline:
                    raise GroupUnavailable(
                        f"node 0 at {place.rendezvous} accepts connections but does not answer: {lost}"
                    ) from lost
                time.sleep(CONFIG.retry_seconds)
            except BaseException:
                link.close()
                raise

    def _join(self, link: HostLink) -> Meeting:
        link.send("hello", node=self.place.node, name=self.name, devices=self.devices, common=asdict(self.common))
        link.receive()  # welcome
        link.send("here")
        link.start_beating()
        answer = link.receive()
        if answer["kind"] == "refused":
            raise RequestError(f"node 0 at {self.place.rendezvous} refused: {answer['reason']}")
        if answer["kind"] == "over":
            raise GroupUnavailable(f"node 0 at {self.place.rendezvous} gave up: {answer['cause']['cause']}")
        if answer["kind"] != "begin":
            raise LinkLost(f"it says '{answer['kind']}'")
        hosts = tuple(Host(**host) for host in answer["hosts"])
        self._over = None
        store = (self.place.rendezvous.host, answer["port"])
        return self._begin(Meeting(hosts, answer["plan"], store, interface_of(link.here)), {0: link})

    def _hear(self, node: int, message: dict) -> None:
        if message["kind"] == "end":
            self._trouble()
        elif message["kind"] == "over":
            self._over = {"again": bool(message["again"]), "cause": message["cause"] and ExitCause.read(message["cause"])}
            self._ended(node, ExitCause("ended the group"))

    def verdict(self, own: ExitCause | None) -> ExitCause:
        """See :meth:`Muster.verdict`. Node 0 decides; if it was lost, that is the cause."""
        link = self._links[0]
        link.send("ended", cause=plain(own))
        with self._state:
            self._state.wait_for(lambda: self._ends, 2 * verdict_timeout())  # node 0 waits for other hosts too
            end = self._ends.get(0)
        if self._over:
            return self._over["cause"] or ExitCause(f"{self.leader} ended the group")
        return end or ExitCause(f"{self.leader} did not report why the group ended", by_itself=False)

    @property
    def comes_again(self) -> bool:
        """Whether to wait for node 0 to start the group again: yes, unless it has ended it."""
        return self._over is None or self._over["again"]

    @property
    def failed(self) -> bool:
        """Whether node 0 ended the group because of a failure, not because the user stopped it."""
        return bool(self._over and self._over["cause"])

    def part(self, *, again: bool, cause: ExitCause | None = None) -> None:
        """See :meth:`Muster.part`."""
        if not again and self._links and not self._over:
            self._links[0].send(
                "ended", cause=plain(ExitCause("is gone: its serve was ended there", by_itself=False, gone=True))
            )
        self._hang_up()
