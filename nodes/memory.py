"""The weights that an executor holds, as one model in ComfyUI's memory management.

ComfyUI frees memory by asking the models it knows. This object stands for the weights in the group's
processes, or in this one: "unload models", and a core model that needs the room, make the executor let go.
"""

import logging

import torch

from ..parallel_backend.cogvideox.checkpoint import Checkpoint
from ..parallel_backend.errors import GroupFailure
from ..parallel_backend.executor import Executor
from ..parallel_backend.jobs import Job, SampleJob

logger = logging.getLogger(__name__)


class CogVideoX:
    """Named in ComfyUI's log."""


class HeldWeights:
    """What ComfyUI's model management asks of a model patcher, and no more (ComfyUI 0.3.64 to 0.33).

    Args:
        executor: that holds the weights.
        device: ComfyUI's own, whose memory it counts against.
    """

    parent = None

    def __init__(self, executor: Executor, device: torch.device):
        self.model = CogVideoX()
        self.executor = executor
        self.load_device = device
        self.offload_device = torch.device("cpu")
        self._sizes: dict[str, int] = {}
        self._loaded = False

    def expect(self, job: Job) -> None:
        """Notes which part a job will load, so that room is made for it."""
        checkpoint = Checkpoint.open(job.model.path)
        part = "transformer" if isinstance(job, SampleJob) else "vae"
        size = checkpoint.weight_bytes(part, checkpoint.dtype(job.model.dtype, self.load_device))
        if self._sizes.get(part) != size:
            self._sizes[part] = size
            self._loaded = False

    def model_size(self) -> int:
        """Bytes when all is loaded."""
        return sum(self._sizes.values())

    def loaded_size(self) -> int:
        """Bytes that are loaded."""
        return self.model_size() if self._loaded else 0

    def current_loaded_device(self) -> torch.device:
        """Where the weights are."""
        return self.load_device if self._loaded else self.offload_device

    def partially_load(self, device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Marks all as loaded; the executor reads them when the job runs."""
        self._loaded = True
        return self.model_size()

    def partially_unload(self, device, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """Lets go of everything: weights in other processes are kept whole or not at all."""
        freed = self.loaded_size()
        self.detach()
        return freed

    def detach(self, unpatch_all: bool = True) -> CogVideoX:
        """Lets go of the weights, unless ComfyUI only sorts its list anew."""
        if unpatch_all and self._loaded:
            self._loaded = False
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
