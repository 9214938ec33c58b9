"""The part of a job that one rank does. This one does all of it; :mod:`.group_rank` has the one that shares."""

from collections.abc import Sequence
from typing import Any

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint.shards import WHOLE
from ..cogvideox.transformer.step_cache import StepCaches
from ..jobs import SampleJob
from ..plan import Plan
from .sequence import JointSequence
from .vae_rows import Strips


class RankContext:
    """A plan of ``single``: one rank, and every collective vanishes.

    Args:
        device: the rank's own.
    """

    plan = Plan()
    rank = 0
    shard = WHOLE
    """What this rank keeps of the transformer's weights."""

    def __init__(self, device: torch.device):
        self.device = device
        api = offload.api_of(device)
        if hasattr(api, "init"):
            api.init()  # memory statistics are refused before

    def attach(self, transformer, *, fp8_attention: bool = False) -> None:
        """Makes a transformer, whose weights are not read yet, compute this rank's share, text and video tokens joined."""
        JointSequence(transformer, fp8_attention=fp8_attention)

    def caches(self, job: SampleJob) -> StepCaches:
        """What the forwards of a job's windows have in common; new for each job."""
        return StepCaches(job.model.step_cache, self.total)

    @property
    def is_in_step(self) -> bool:
        """Whether the next job can begin after one that failed on all ranks: nothing is under way between them."""
        return True

    def share(self, prompts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Of the prompts that a step runs the model on, those that are this rank's."""
        return prompts

    def gather(self, mine: Sequence[torch.Tensor], *, of: int) -> Sequence[torch.Tensor]:
        """The predictions for all ``of`` prompts, in order, from each rank's own."""
        return mine

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, the same on every rank."""
        return tensor

    def strips(self, rows: int) -> Strips | None:
        """How a latent's rows are shared while the VAE works on them, or None where rank 0 does it alone."""
        return None

    def agree(self, *said: bool) -> tuple[bool, ...]:
        """What rank 0 says, on every rank."""
        return said

    def heard(self, go_on: bool) -> bool:
        """What rank 0 says, as far as this rank has heard. No rank waits for another, so each may ask at any place."""
        return go_on

    def collect(self, value: Any) -> list[Any]:
        """A small Python value from every rank, in order, on every rank."""
        return [value]

    @property
    def outside_bytes(self) -> int:
        """Bytes on the device that torch's statistics of memory leave out."""
        return 0

    def synchronize(self) -> None:
        """Waits until the device has done what was asked of it."""
        offload.synchronize(self.device)
