"""What a node shows before the first step of its job."""

import re
import threading

import comfy.utils

from ...parallel_backend.executor.base import Executor
from . import lines

STAGE_SECONDS = 0.5
"""Interval at which a node shows what is done before its first step."""
SHARE = re.compile(r"(\d+)%$")
"""The end of a stage that says how much of it is done."""


class StageWatch:
    """Shows in a node what its executor does before the first step, such as reading weights. A context manager.

    Args:
        executor: runs the job.
        node_id: the node; None shows nothing.
    """

    def __init__(self, executor: Executor, node_id: str | None):
        self._executor = executor
        self._node_id = node_id
        self._percent = self._percent_shown = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stage", daemon=True)

    def __enter__(self) -> "StageWatch":
        if self._node_id is not None:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops showing stages. More calls do nothing."""
        self._stopped.set()

    def show_share(self) -> None:
        """Shows in the node's progress bar how much of a stage is done, if it says so; an empty bar once the stage is over.

        Call it in the thread that executes the node: ComfyUI may raise its interruption from it.
        """
        percent = self._percent
        if percent != self._percent_shown and not self._stopped.is_set():
            self._percent_shown = percent
            comfy.utils.ProgressBar(100, self._node_id).update_absolute(
                percent
            )  # the bar of the steps would take it for a step

    def _watch(self) -> None:
        shown = None
        while not self._stopped.wait(STAGE_SECONDS):
            stage = self._executor.stage()
            if stage and stage != shown and not self._stopped.is_set():
                shown = stage
                share = SHARE.search(stage)
                self._percent = int(share[1]) if share else 0
                lines.show_for_now(stage, self._node_id)
