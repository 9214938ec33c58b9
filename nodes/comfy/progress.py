"""The job that runs at the moment, and how far it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...parallel_backend.executor.base import Executor, steps_of
from ...parallel_backend.jobs import Job
from . import lines
from .events import send_event

EVENT_SECONDS = 0.3
"""Shortest interval between two events of one job."""


@dataclass
class JobProgress:
    """How far a job is."""

    executor: Executor
    kind: str
    node_id: str | None
    prompt_id: str | None = None
    step: int = 0
    steps: int = 0
    _first: tuple[int, float] | None = field(default=None, repr=False)
    """The first step that was reported, and when: it includes loading, so later ones are timed from there."""
    _now: float = field(default=0.0, repr=False)
    _last_event: float = field(default=0.0, repr=False)

    def on_step(self, step: int, steps: int) -> None:
        """Records a finished step."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        self.step, self.steps, self._now = step, steps, now
        if now - self._last_event >= EVENT_SECONDS or step == steps:
            self._last_event = now
            send_event("progress", self.plain())

    def plain(self) -> dict[str, Any]:
        """Returns kind, node, steps, seconds a step and seconds left; times are None before the second step."""
        seconds = None
        if self._first and self.step > self._first[0]:
            seconds = (self._now - self._first[1]) / (self.step - self._first[0])
        left = None if seconds is None else seconds * (self.steps - self.step)
        return {
            "kind": self.kind,
            "node": self.node_id,
            "prompt_id": self.prompt_id,
            "step": self.step,
            "steps": self.steps,
            "step_seconds": seconds,
            "seconds_left": left,
        }


def shown_steps(job: Job) -> int:
    """Returns the number of steps that a job's progress counts: of the schedule, or tiles; 0 for a job without steps."""
    return getattr(job, "steps", steps_of([job]))


class Jobs:
    """The job that runs, and what is known of the last one."""

    def __init__(self):
        self.current: JobProgress | None = None
        self.executor: Executor | None = None
        """Of the last job."""
        self.ended: float | None = None
        """When the last job ended, as ``time.time`` counts."""

    @contextmanager
    def running(self, executor: Executor, job: Job, node_id: str | None) -> Iterator[JobProgress]:
        """Within, the job runs."""
        prompt_id = lines.executing().prompt_id
        progress = JobProgress(executor, job.kind, node_id, prompt_id, steps=shown_steps(job))
        self.current, self.executor = progress, executor
        send_event("progress", progress.plain())
        try:
            yield progress
        finally:
            self.current, self.ended = None, time.time()
            send_event("progress", {"kind": None, "prompt_id": prompt_id})


jobs = Jobs()
