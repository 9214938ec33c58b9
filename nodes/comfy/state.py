"""The state of the group for the front end, and what the front end may do with it."""

import re
import time
from collections.abc import Sequence
from typing import Any

import comfy.model_management as management

from ...parallel_backend.config import CONFIG
from ...parallel_backend.devices import Devices
from ...parallel_backend.errors import GroupFailure, RequestError
from ...parallel_backend.executor.base import Executor
from ...parallel_backend.executor.group import ABSENT, FAILED, STARTING, GroupExecutor
from ...parallel_backend.executor.local import LocalExecutor
from ...parallel_backend.executor.overview import overview
from ...parallel_backend.executor.replicas import ReplicasExecutor
from . import executors, lines
from .errors import sentence
from .progress import jobs

PATH = re.compile(r"(?<![\w.…/])/(?:[^/\s\"'():,;]+/)+")
"""The folders of an absolute path."""
KINDS = {"sample": "sampling", "upscale": "upscaling", "decode": "decoding", "encode": "encoding"}
LOG_LINES = 200
END_SECONDS = 20.0
"""How long to wait for a cancelled job before its group is stopped all the same."""


def without_folders(text: str | None) -> str | None:
    """Returns a text in which each path has lost its folders: they are no business of the page."""
    return text and PATH.sub("…/", text)


def shown_executor() -> Executor | None:
    """Returns the executor of the running job, else the group that is kept, else that of the last job."""
    running = jobs.current  # once: its job may end meanwhile
    return (running.executor if running else None) or executors.kept_group() or jobs.executor


def status() -> dict[str, Any]:
    """Returns all that the panel shows, as plain values without paths."""
    executor = shown_executor()
    if executor is None:
        return {"state": ABSENT, "label": ABSENT, "ranks": [], "job": None, "warnings": lines.kept.warnings()}
    found, running = overview(executor), jobs.current
    job = running.plain() if running else None
    state, doing = state_of(found, running)
    idle = CONFIG.idle_minutes - (time.time() - jobs.ended) / 60 if jobs.ended and CONFIG.idle_minutes else None
    return {
        **found,
        "state": state,
        "label": label_of(state, job, doing),
        "is_group": not isinstance(executor, LocalExecutor),
        "has_logs": any(isinstance(group, GroupExecutor) for group in groups_of(executor)),
        "why": without_folders(executors.chosen.get(executor)),
        "job": job,
        "warm_minutes": idle if state == "idle" else None,
        "last_error": without_folders(found.get("last_error")),
        "warnings": [without_folders(line) for line in lines.kept.warnings()],
        "ranks": [{**rank, "doing": without_folders(rank["doing"])} for rank in found["ranks"]],
    }


def state_of(found: dict[str, Any], running) -> tuple[str, str | None]:
    """Returns the state, and what is done before the first step.

    It is ``absent``, ``starting``, ``failed``, ``loading``, ``sampling``, ``upscaling``, ``decoding``, ``encoding``,
    ``recovering`` or ``idle``.
    """
    doing = found.get("doing") or (found["ranks"][0]["doing"] if found["ranks"] else None)
    if found["state"] in (ABSENT, STARTING, FAILED):
        if running:
            return ("recovering" if running.step else STARTING), doing
        return found["state"], doing
    if not running:
        return "idle", None
    reads = running.kind == "sample" or running.kind == "upscale" and "reading" in (doing or "")  # a tile is encoded before
    if reads and not running.step:
        return "loading", doing
    return KINDS.get(running.kind, "working"), None


def label_of(state: str, job: dict[str, Any] | None, doing: str | None) -> str:
    """Returns the state in a few words, such as ``loading 43%`` or ``sampling 21 of 50``."""
    if state == "loading" and doing and (share := re.search(r"\d+%", doing)):
        return f"loading {share[0]}"
    if state in ("sampling", "upscaling", "recovering") and job:
        return f"{state} {job['step']} of {job['steps']}"
    return state


def groups_of(executor: Executor | None) -> Sequence[Executor | None]:
    """Returns the executors of the replicas, or the executor alone."""
    return executor.replicas if isinstance(executor, ReplicasExecutor) else [executor]


def log_of(rank: int) -> str:
    """Returns the last lines of a rank's logs, without folders. Those of ranks on a Ray cluster are on its nodes.

    Raises:
        RequestError: if there is no such rank.
    """
    executor = shown_executor()
    for group in groups_of(executor):
        if isinstance(group, GroupExecutor) and group.address:
            count = Devices.parse(group.devices).count
            if rank < count:
                files = sorted((group.address.logs / str(rank)).glob("std*.log"))
                kept = [line for path in files for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:]]
                return without_folders("\n".join(kept)) or f"rank {rank} has written nothing"
            rank -= count
    raise RequestError("there is no log of this rank: it is not running")


def free() -> str:
    """Frees the memory of the group, as *Unload models* does. Returns what was done.

    Raises:
        RequestError: while a job runs.
    """
    if jobs.current:
        raise RequestError("a job runs; cancel it first, or stop the group")
    executor = shown_executor()
    if executor is None:
        return "nothing is loaded"
    executors.free(executor)
    return "memory is free; the next job loads again"


def stop() -> str:
    """Ends the group; a job that runs is cancelled. Returns what was done.

    Raises:
        RequestError: if another process keeps the group.
    """
    executor = executors.kept_group()
    if executor is None:
        return "no group runs"
    if not all(group.is_owner for group in groups_of(executor)):
        raise RequestError("serve keeps this group, for other processes too; to end it, run python -m parallel_backend stop")
    if jobs.current:
        management.interrupt_current_processing()
        deadline = time.monotonic() + END_SECONDS
        while jobs.current and time.monotonic() < deadline:
            time.sleep(0.1)
    executors.close_group()
    return "the group has ended; the next job starts it"


def restart() -> str:
    """Ends the group and starts it again. Returns what was done.

    Raises:
        RequestError: if no group was started yet, it cannot start, or another process keeps it.
    """
    executor = executors.kept_group()
    if executor is None:
        raise RequestError("no group was started yet; a job on an xDiT Backend starts one")
    plan, devices = executor.plan, Devices.parse(str(executor.devices))
    stop()
    try:
        executors.start_group(plan, devices)
    except GroupFailure as error:
        raise RequestError(f"no group: {sentence(error)}") from error
    return "the group starts"
