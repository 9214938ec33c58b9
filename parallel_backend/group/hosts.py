"""The hosts of a group: their rendezvous, their ranks, and what they must have in common."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..config import CONFIG
from ..errors import RequestError
from ..plan import AUTO

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Rendezvous:
    """The address of node 0 to which the other hosts connect."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Rendezvous":
        """Parses ``HOST:PORT``.

        Raises:
            RequestError: for anything else.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise RequestError(f"rendezvous '{text}' is no HOST:PORT; give the address of node 0, such as 10.0.0.1:29500")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Place:
    """This host's number among the hosts of a group, and their rendezvous.

    Raises:
        RequestError: for a number out of range.
    """

    rendezvous: Rendezvous
    nodes: int
    node: int
    wait: float = CONFIG.wait_seconds
    """Timeout for the hosts to meet, in seconds."""

    def __post_init__(self):
        if self.nodes < 2:
            raise RequestError(f"nnodes is {self.nodes}; with a rendezvous use 2 or more")
        if not 0 <= self.node < self.nodes:
            raise RequestError(f"node-rank is {self.node}; {self.nodes} hosts are numbered 0 to {self.nodes - 1}")
        if not self.wait > 0:
            raise RequestError(f"wait is {self.wait:g}; use more than 0 seconds")

    @classmethod
    def asked(cls, nodes: int, node: int, rendezvous: str | None, wait: float) -> "Place | None":
        """Builds the place from options of the command line; None for a group of one host.

        Raises:
            RequestError: for options that contradict each other.
        """
        if rendezvous is None:
            if nodes != 1 or node != 0:
                raise RequestError(
                    f"nnodes is {nodes} and node-rank {node}; several hosts need an address of node 0: --rendezvous HOST:PORT"
                )
            return None
        return cls(Rendezvous.parse(rendezvous), nodes, node, wait)


@dataclass(frozen=True)
class Host:
    """One host of a group."""

    node: int
    name: str
    address: str
    devices: str
    first_rank: int
    processes: int

    @property
    def ranks(self) -> str:
        """Its ranks in words."""
        last = self.first_rank + self.processes - 1
        return f"rank {last}" if self.processes == 1 else f"ranks {self.first_rank}-{last}"

    def __str__(self) -> str:
        return f"host {self.name} ({self.address}, node {self.node}, {self.ranks})"


@dataclass(frozen=True)
class Common:
    """What hosts must have in common."""

    version: str
    torch: str
    nnodes: int
    plan: str
    """``auto`` on a host that uses the plan of node 0."""
    kind: str
    processes: int

    @classmethod
    def here(cls, *, nodes: int, plan: str, kind: str, processes: int) -> "Common":
        """Returns the values of this host."""
        return cls(code_version(), torch.__version__.partition("+")[0], nodes, plan, kind, processes)

    def difference(self, other: Any, *, here: str, there: str) -> str | None:
        """Returns a message that names the fields in which another host differs, or None.

        Args:
            other: the other host's values, as received.
            here, there: names of the two hosts.
        """
        other = other if isinstance(other, dict) else {}
        differ = [field.name for field in fields(self) if other.get(field.name) != getattr(self, field.name)]
        if "plan" in differ and other.get("plan") == AUTO:
            differ.remove("plan")
        if not differ:
            return None
        mine = asdict(self)
        said = [f"{WORDS[name]} is {mine[name]} on {here} and {shown(other.get(name))} on {there}" for name in differ]
        return f"{'; '.join(said)}: give all hosts the same"


WORDS = {
    "version": "the pack's version",
    "torch": "torch",
    "nnodes": "nnodes",
    "plan": "plan",
    "kind": "the kind of device",
    "processes": "the number of devices",
}


@cache
def code_version() -> str:
    """Returns a digest of this package's code. Hosts with different code would compute or wait for different things."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def shown(value: Any) -> str:
    """Formats a value from another host: shortened, without control characters."""
    return "".join(character for character in str(value)[:100] if character.isprintable())


def free_port(host: str) -> int:
    """Returns a free port of this host."""
    with socket.create_server((host, 0), family=family_of(host)) as probe:
        return probe.getsockname()[1]


def family_of(host: str) -> socket.AddressFamily:
    """Returns IPv4 or IPv6, whichever a name resolves to first."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def numbered(hellos: Sequence[tuple[str, str, str]], processes: int) -> list[Host]:
    """Numbers the hosts' nodes and ranks.

    Args:
        hellos: name, address and devices of each host, in the order of their nodes.
        processes: of each host.
    """
    return [Host(node, *about, node * processes, processes) for node, about in enumerate(hellos)]
