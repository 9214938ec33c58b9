"""The executor that runs jobs in this process, on one device."""

import threading
from typing import Any

import torch

from ..engine.engine import Engine
from ..jobs import Progress, Result
from ..parallel.rank import RankContext
from ..planner import hardware
from .base import Executor


class LocalExecutor(Executor):
    """Runs jobs in the caller's thread, one at a time.

    Args:
        device: the CPU or one GPU.
        owns_process: whether nothing else uses GPUs in this process, so that the user's limit of memory can be enforced.
    Raises:
        RequestError: when that limit has an unusable value.
    """

    def __init__(self, device: torch.device, *, owns_process: bool = True):
        hardware.limit_memory(device, enforced=owns_process)
        self.engine = Engine(RankContext(device))
        self._lock = threading.Lock()

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        return (self.engine.device,)

    def _run(self, job, on_step, should_stop, on_picture=None, on_frames=None) -> Result:
        def after_step(progress: Progress, steps: int) -> bool:
            on_step(progress.step, steps)
            return not should_stop()

        with self._lock:
            return self.engine.run(job, after_step, lambda: not should_stop(), on_picture, on_frames)

    def status(self) -> dict[str, Any]:
        state = "busy" if self._lock.locked() else "ready"
        return {"state": state, "plan": str(self.plan), "devices": str(self.engine.device), **self.engine.status()}

    def stage(self) -> str | None:
        return self.engine.stage

    def free(self) -> None:
        with self._lock:
            self.engine.free()

    def close(self) -> None:
        self.free()
