"""The share of one rank in a process group, on xDiT's groups."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..plans import Plan
from . import xdit
from .split import Split
from .transformer import SequenceShare

IDLE = timedelta(days=365)
"""How long a rank may wait for the next job: collectives of the control group must not time out."""


class GroupSplit(Split):
    """One rank's share under a plan.

    Args:
        plan: whose degrees multiply to the world size.
        device: the rank's own.
        rank, local_rank: as ``torch.distributed.run`` numbers them.
    """

    def __init__(self, plan: Plan, *, device: torch.device, rank: int, local_rank: int):
        super().__init__(device)
        self.plan = plan
        self.rank = rank
        xdit.initialise(plan, rank=rank, local_rank=local_rank, device=device)
        self.control = dist.new_group(backend="gloo", timeout=IDLE)
        self.cfg_group = xdit.cfg_group()

    def probe(self) -> None:
        """Exchanges data over every kind of group once, as a job will, so that a broken link hangs here and not there."""
        tensor = torch.ones(2**20, device=self.device)
        dist.all_reduce(tensor)
        if self.plan.cfg > 1:
            self.cfg_group.all_gather(tensor)
        if self.plan.sequence > 1:
            xdit.sequence_group().all_gather(tensor)
        self.synchronize()
        self.collect(None)

    def attach(self, transformer) -> None:
        """See :meth:`Split.attach`. A plan without ulysses or ring leaves the transformer as it is."""
        if self.plan.sequence > 1:
            SequenceShare(transformer, group=xdit.sequence_group(), ulysses=self.plan.ulysses, ring=self.plan.ring)

    def share(self, prompts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """See :meth:`Split.share`. With one prompt both halves of ``cfg2`` compute it."""
        if self.plan.cfg == len(prompts):
            return prompts[self.cfg_group.rank_in_group :][:1]
        return prompts

    def gather(self, mine: Sequence[torch.Tensor], *, of: int) -> Sequence[torch.Tensor]:
        """See :meth:`Split.gather`."""
        if len(mine) == of:
            return mine
        (own,) = mine
        return self.cfg_group.all_gather(own.contiguous(), separate_tensors=True)

    def agree(self, go_on: bool) -> bool:
        """See :meth:`Split.agree`. Over gloo, so that no GPU waits for it."""
        answer = torch.tensor([go_on], dtype=torch.uint8)
        dist.broadcast(answer, src=0, group=self.control)
        return bool(answer)

    def collect(self, value: Any) -> list[Any]:
        """See :meth:`Split.collect`."""
        values = [None] * self.plan.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others give None and wait as long as it takes."""
        length = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(length, src=0, group=self.control)
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self.control)
        return buffer.numpy().tobytes()

    def meet(self, seconds: float) -> None:
        """Waits for every rank, at most so long.

        Raises:
            RuntimeError: naming the ranks that did not come.
        """
        dist.monitored_barrier(group=self.control, timeout=timedelta(seconds=seconds))
