"""The rank context: collectives of a job, and this rank's share. Here for a single rank; see :mod:`.group_rank` for several."""

from collections.abc import Sequence
from typing import Any

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint.shards import WHOLE
from ..cogvideox.pipeline.caches import JobCaches
from ..jobs import SampleJob
from ..plan import Plan
from .sequence import JointSequence
from .vae_rows import Strips


class RankContext:
    """The context of plan ``single``: one rank, so every collective returns its input.

    Args:
        device: of this rank.
    """

    plan = Plan()
    rank = 0
    shard = WHOLE
    """The part of the transformer's weights that this rank keeps."""
    about_spared: str | None = None
    """What the ranks of the unconditional half do in steps that spare it, for the user; None if all ranks run both halves."""

    def __init__(self, device: torch.device):
        self.device = device
        api = offload.api_of(device)
        if hasattr(api, "init"):
            api.init()  # memory statistics fail before initialisation

    def attach(self, transformer) -> None:
        """Makes a transformer compute this rank's share on joint text and video tokens. Call it before its weights are read."""
        JointSequence(transformer)

    def caches(self, job: SampleJob) -> JobCaches:
        """Returns new caches for the windows of a job."""
        return JobCaches(job, self)

    @property
    def is_in_step(self) -> bool:
        """Whether the next job may start after a job failed on all ranks: no communication is incomplete."""
        return True

    def share(self, prompts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Returns those prompts of a step that this rank runs."""
        return prompts

    def gather(self, mine: Sequence[torch.Tensor], *, of: int) -> Sequence[torch.Tensor]:
        """Returns the predictions for all ``of`` prompts, in order, given this rank's."""
        return mine

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over all ranks."""
        return tensor

    def strips(self, rows: int) -> Strips | None:
        """Returns how the VAE's rows are shared among ranks, or None if rank 0 runs the VAE alone.

        Args:
            rows: of the latent.
        """
        return None

    def agree(self, *said: bool) -> tuple[bool, ...]:
        """Returns rank 0's values on every rank."""
        return said

    def heard(self, go_on: bool) -> bool:
        """Returns rank 0's value as far as this rank has received it.

        It does not block, so ranks may call it at different places.
        """
        return go_on

    def collect(self, value: Any) -> list[Any]:
        """Returns a small Python value from every rank, in order, on every rank."""
        return [value]

    def alike(self, values: list[Any]) -> list[Any]:
        """Returns the values, of every rank's, of the ranks that must attend with the same function as this one."""
        return values

    @property
    def outside_bytes(self) -> int:
        """Bytes on the device that torch's memory statistics do not include."""
        return 0

    def synchronize(self) -> None:
        offload.synchronize(self.device)
