"""The weights that an executor holds, as one model in ComfyUI's memory management.

ComfyUI frees memory by asking the models it knows. This object stands for the weights in the group's
processes, or in this one: "unload models", and a core model that needs the room, make the executor let go.
"""

import logging

import torch

from ...parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ...parallel_backend.cogvideox.offload import transformer_bytes
from ...parallel_backend.errors import GroupFailure
from ...parallel_backend.executor.base import Executor
from ...parallel_backend.jobs import Job, SampleJob

logger = logging.getLogger(__name__)


class CogVideoX:
    """Named in ComfyUI's log."""


class HeldWeights:
    """What ComfyUI's model management asks of a model patcher, and no more (ComfyUI 0.3.64 to 0.33).

    Args:
        executor: that holds the weights.
        device: whose memory they count against.
    """

    parent = None

    def __init__(self, executor: Executor, device: torch.device):
        self.model = CogVideoX()
        self.executor = executor
        self.load_device = device
        self.offload_device = torch.device("cpu")
        self._wanted: dict[str, int] = {}
        """Bytes of the part that the job at hand needs."""
        self._loaded: dict[str, int] = {}
        """Bytes of each part, transformer or vae, that is loaded."""

    def expect(self, job: Job) -> None:
        """Notes which part a job will load, so that room is made for it."""
        checkpoint = Checkpoint.open(job.model.path)
        part = "transformer" if isinstance(job, SampleJob) else "vae"
        dtype = checkpoint.dtype(job.model.dtype, self.load_device)
        if part == "transformer":
            self._wanted = {part: transformer_bytes(checkpoint, self.executor.plan, dtype, fp8=job.model.fp8 != "off")}
        else:
            self._wanted = {part: checkpoint.weight_bytes(part, dtype)}
        if self._loaded.get(part) != self._wanted[part]:
            self._loaded.pop(part, None)

    def recount(self) -> None:
        """Counts no longer what has left the device: with offload after a job, or when a group had nothing to do for long."""
        if not self._loaded:
            return
        try:
            said = self.executor.status()
        except (GroupFailure, OSError, EOFError):
            self.forget()
            return
        there = {} if said["state"] == "absent" else said.get("weights")
        if there is not None:  # replicas have each its own
            self._loaded = {part: size for part, size in self._loaded.items() if there.get(part, 0) > size / 2}

    def forget(self) -> None:
        """Counts nothing: after a job that failed its part may not be loaded, and a group may be gone with all of them.

        Counted too little only makes ComfyUI make room again; counted too much would keep it from doing so.
        """
        self._wanted, self._loaded = {}, {}

    def model_size(self) -> int:
        """Bytes once the job at hand is loaded."""
        return sum({**self._loaded, **self._wanted}.values())

    def loaded_size(self) -> int:
        """Bytes that are loaded."""
        return sum(self._loaded.values())

    def current_loaded_device(self) -> torch.device:
        """Where the weights are."""
        return self.load_device if self._loaded else self.offload_device

    def partially_load(self, device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Marks the wanted part as loaded; the executor reads it when the job runs."""
        self._loaded |= self._wanted
        return self.loaded_size()

    def partially_unload(self, device, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """Lets go of everything: weights in other processes are kept whole or not at all."""
        freed = self.loaded_size()
        self.detach()
        return freed

    def detach(self, unpatch_all: bool = True) -> CogVideoX:
        """Lets go of the weights, unless ComfyUI only sorts its list anew."""
        if unpatch_all:
            self.forget()
            try:
                self.executor.free()
            except (GroupFailure, OSError, EOFError) as error:  # a lost group holds nothing; ComfyUI must not trip over it
                logger.warning("the group is gone, and its memory with it: %s", error)
        return self.model

    def is_dynamic(self) -> bool:
        """No part of it is loaded on demand."""
        return False

    def is_clone(self, other) -> bool:
        """It has no clones."""
        return other is self

    def model_dtype(self) -> None:
        """Nothing that ComfyUI could cast."""

    def model_patches_models(self) -> list:
        """It brings no other models."""
        return []

    def model_patches_to(self, device) -> None:
        """It has no patches."""

    def lowvram_patch_counter(self) -> int:
        """It has no patches."""
        return 0
