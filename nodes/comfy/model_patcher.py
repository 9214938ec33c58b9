"""The weights that an executor holds, as one model in ComfyUI's memory management.

ComfyUI frees memory by unloading models that it knows. This object stands for the weights in the group's processes or in this
one. The executor frees them on "Unload models", or if a model of the core needs the memory.
"""

import logging

import torch

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.offload import job_weight_bytes
from ...parallel_backend.executor.base import UNREACHABLE, Executor
from ...parallel_backend.executor.group import ABSENT, FAILED
from ...parallel_backend.jobs import Job, SampleJob, UpscaleJob

logger = logging.getLogger(__name__)


class CogVideoX:
    """The name that ComfyUI's log shows."""


class HeldWeights:
    """The part of a model patcher's interface that ComfyUI's model management uses (ComfyUI 0.3.64 to 0.33).

    Args:
        executor: holds the weights.
        device: the weights count against its memory.
    """

    parent = None

    def __init__(self, executor: Executor, device: torch.device):
        self.model = CogVideoX()
        self.executor = executor
        self.load_device = device
        self.offload_device = torch.device("cpu")
        self._wanted: dict[str, int] = {}
        """Bytes of each part that the current job needs."""
        self._loaded: dict[str, int] = {}
        """Bytes of each loaded part, transformer or vae."""

    def expect(self, job: Job) -> None:
        """Records which parts a job will load, so that ComfyUI frees memory for them."""
        checkpoint, self._wanted = Checkpoint.of(job.model), {}
        dtype = checkpoint.dtype(job.model.dtype, self.load_device)
        if isinstance(job, SampleJob | UpscaleJob):
            self._wanted["transformer"] = job_weight_bytes(job, checkpoint, self.executor.plan, dtype)
        if not isinstance(job, SampleJob):
            self._wanted["vae"] = checkpoint.weight_bytes("vae", dtype)
        self._loaded = {part: size for part, size in self._loaded.items() if self._wanted.get(part, size) == size}

    def recount(self) -> None:
        """Stops counting parts that have left the device: by offload after a job, or because an idle group freed them."""
        if not self._loaded:
            return
        try:
            said = self.executor.status()
        except UNREACHABLE:
            self.forget()
            return
        there = {} if said["state"] in (ABSENT, FAILED) else said.get("weights")
        if there is not None:  # the status of replicas has no weights
            self._loaded = {part: size for part, size in self._loaded.items() if there.get(part, 0) > size / 2}

    def forget(self) -> None:
        """Counts nothing as loaded: after a failed job its part may be missing, and a lost group holds nothing.

        If too little is counted, ComfyUI only frees memory again. If too much is counted, ComfyUI does not free what is needed.
        """
        self._wanted, self._loaded = {}, {}

    def model_size(self) -> int:
        """Returns the bytes in use once the current job's part is loaded."""
        return sum({**self._loaded, **self._wanted}.values())

    def loaded_size(self) -> int:
        """Returns the bytes in use now."""
        return sum(self._loaded.values())

    def current_loaded_device(self) -> torch.device:
        """Returns the device of the weights."""
        return self.load_device if self._loaded else self.offload_device

    def partially_load(self, device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Marks the wanted part as loaded. The executor reads it when the job runs."""
        self._loaded |= self._wanted
        return self.loaded_size()

    def partially_unload(self, device, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """Frees everything: weights in other processes cannot be freed in part."""
        freed = self.loaded_size()
        self.detach()
        return freed

    def detach(self, unpatch_all: bool = True) -> CogVideoX:
        """Frees the weights, unless ComfyUI only reorders its list of models."""
        if unpatch_all:
            self.forget()
            try:
                self.executor.free()
            except UNREACHABLE as error:  # a lost group holds nothing, and ComfyUI must go on
                logger.warning("the group is lost, so its memory is free: %s", error)
        return self.model

    def is_dynamic(self) -> bool:
        """Returns False: no part is loaded on demand."""
        return False

    def is_clone(self, other) -> bool:
        """Returns whether it is the same object: there are no clones."""
        return other is self

    def model_dtype(self) -> None:
        """Returns None: there is no model for ComfyUI to cast."""

    def model_patches_models(self) -> list:
        """Returns an empty list: no patch brings a model."""
        return []

    def model_patches_to(self, device) -> None:
        """Does nothing: there are no patches."""

    def lowvram_patch_counter(self) -> int:
        """Returns 0: there are no patches."""
        return 0
