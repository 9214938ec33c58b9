"""What a group's owner asks a supervisor for."""

from dataclasses import dataclass

HOST = "XDIT_HOST"
"""Environment variable of the ranks: this machine's name for messages; set if the group is over several machines."""


@dataclass(frozen=True)
class StartRequest:
    """Asks for the ranks of one group on this machine. It travels as JSON."""

    folder: str
    """Of the group."""
    plan: str
    kind: str
    """Of the devices, ``cuda`` or ``cpu``."""
    environment: dict[str, str]
    """Variables of the ranks."""
    store: tuple[str, int]
    """Host and port of the store where all ranks meet. Port 0 is any free one, for a group on one machine."""
