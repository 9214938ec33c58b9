"""The part of a group that is on one node."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A node's part of a group. A group on one machine has one part."""

    node: int = 0
    """This node's number among those of the group; node 0 has rank 0."""
    nodes: int = 1
    store: tuple[str, int] | None = None
    """Host and port on node 0 where the ranks of all nodes meet; None on one machine, where any free port is taken."""
    address: str | None = None
    """This node's address, on the network that the ranks use."""
    name: str | None = None
    """This node's name for messages."""
