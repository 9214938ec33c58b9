"""The user's settings: every ``XDIT_`` variable and every timeout, parsed once."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import get_args

logger = logging.getLogger(__name__)

OLDER_NAMES = {"XDIT_MEMORY_GIB": "XDIT_MEMORY_GB"}
MAY_BE_ZERO = ("idle_minutes", "preload")
"""Numbers where 0 turns something off; all others must be greater."""


@dataclass(frozen=True)
class Config:
    """Each field is set by the variable ``XDIT_`` and the field's name in capitals, such as ``XDIT_IDLE_MINUTES``."""

    python: str | None = None
    """Interpreter that runs the group; without it the one that runs ComfyUI or the command."""
    memory_gib: float | None = field(default=None, metadata={"wanted": "GiB of each GPU, such as 24"})
    """GiB of each GPU that the tensors of a process may use; without it all that is free."""
    idle_minutes: float = 30.0
    """After this long without a job a group ends, or frees its weights if ``serve`` keeps it; 0 turns this off."""
    keep_seconds: float = 1.0
    """Interval at which a group sends a sampling job's state to its caller, who resumes from it when the group is lost."""
    preload: float = 0.0
    """1 starts the imports of a group when ComfyUI starts, and not when a workflow first needs them. They take main memory."""
    runtime_dir: str | None = None
    """The only folder that holds the user's groups, and is searched for them; without it see :func:`.group.registry.roots`."""
    preview_seconds: float = 1.0
    """Shortest interval between two previews."""

    hello_seconds: float = 20.0
    """After this long an interpreter that has not run the supervisor is reported as unable to run the pack."""
    join_seconds: float = 300.0
    """After this long a rank that has not joined the others is killed."""
    start_seconds: float = 300.0
    """After this long a new group that does not answer is given up; a loaded machine imports torch slowly."""
    failed_start_seconds: float = 600.0
    """After this long a failed start is tried again even if nothing has changed, as not every cause can be seen."""
    wait_seconds: float = 300.0
    """After this long without a node of a Ray cluster that has room, a job is given up."""
    loopback_seconds: float = 2.0
    """After this long the loopback network counts as broken."""

    exchange_seconds: float = 60.0
    """After this long in their first data exchange, or at the end of a job, ranks are killed as hung."""
    load_seconds: float = 1800.0
    """After this long in reading weights and the first step, or in a whole decode, a rank is killed as hung."""
    step_seconds: float = 8.0
    """After this long in a later step a rank is killed as hung, or later where ``step_factor`` allows more."""
    step_factor: float = 5.0
    """A later step may take this many times the longest before it; the first, which includes loading, counts for the second."""
    stopped_seconds: float = 5.0
    """After this long a rank that was stopped with SIGSTOP is killed."""
    settle_seconds: float = 1.0
    """After this long a failed rank counts as the cause, unless another was found that was killed; the others are killed."""
    failure_seconds: float = 15.0
    """After this long a failed rank stops waiting for the others to fail too, and its exit ends the group."""

    poll_seconds: float = 0.05
    """Interval at which a waiting thread checks whether it should stop."""
    handshake_seconds: float = 30.0
    """After this long a connection whose other side has not proved that it knows the key is closed."""
    stall_seconds: float = 30.0
    """After this long without the next bytes of a message, a client closes its connection to the group."""
    write_seconds: float = 5.0
    """After this long a client that reads nothing is disconnected: rank 0 must go on, as the other ranks wait for it."""
    status_seconds: float = 30.0
    """After this long a group that does not answer a status request is an error; no rank needs to be idle for the answer."""
    cancel_seconds: float = 600.0
    """After this long a cancelled job that has not finished its step is an error."""
    leave_seconds: float = 30.0
    """After this long a cancelled batch stops waiting for its replicas; they go on stopping in the background."""
    recovery_seconds: float = 60.0
    """After this long a group whose connection broke is given up, if it neither ended nor answers again."""
    removed_seconds: float = 3.0
    """After this long a group whose folder is gone is given up; processes that are ending remove it themselves."""
    stop_seconds: float = 10.0
    """After this long processes that were asked to end get SIGTERM, and after as long again SIGKILL."""

    retry_seconds: float = 0.5
    """Pause before a failed connection is tried again."""
    verdict_seconds: float = 30.0
    """After this long a node that has not ended its part of a lost group, and that Ray has not found lost, counts as lost."""

    rejected: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The message for each field whose variable has an unusable value."""

    @classmethod
    def settings(cls) -> Iterator[tuple[Field, str]]:
        """Yields each field that a variable sets, with the variable's name."""
        for item in fields(cls):
            if item.name != "rejected":
                yield item, f"XDIT_{item.name.upper()}"

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Config":
        """Parses the variables. An unusable value is logged in one line and replaced by the default."""
        found, rejected = {}, {}
        for item, variable in cls.settings():
            if not environment.get(variable):
                variable = OLDER_NAMES.get(variable, variable)
            text = environment.get(variable)
            if not text:
                continue
            value = text if str in (item.type, *get_args(item.type)) else number(text, may_be_zero=item.name in MAY_BE_ZERO)
            if value is not None:
                found[item.name] = value
                continue
            wanted = item.metadata.get("wanted") or f"a number such as {item.default:g}, which is used now"
            rejected[item.name] = f"{variable} is '{text}'; give {wanted}"
            logger.warning(rejected[item.name])
        return cls(**found, rejected=rejected)


def number(text: str, *, may_be_zero: bool) -> float | None:
    """Parses a positive, finite number; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf or (value == 0 and may_be_zero) else None


CONFIG = Config.read(os.environ)
