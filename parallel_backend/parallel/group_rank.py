"""The rank context of a process group, on xDiT's groups."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ..cogvideox.checkpoint.shards import Shard
from ..cogvideox.pipeline.caches import JobCaches
from ..jobs import SampleJob
from ..notes import Information
from ..plan import Plan
from ..planner.machine import SLOW_LINK, Link
from . import symmetric_memory, xdit
from .fsdp import fsdp_mesh, shard_blocks
from .guidance import GuidanceSplit, why_not_joined
from .pipefusion import KeptOfJob, Pipe, Stage
from .rank import RankContext
from .sequence import JointSequence, SequenceSplit, heads_of
from .tensor_parallel import join_products
from .vae_rows import Strips

IDLE = timedelta(days=365)
"""How long a rank waits for the next job: collectives of the control group must not time out."""
PROBE_NUMBERS = {"cpu": 2**20, "cuda": 2**24}
"""Float32 numbers per test exchange: 4 MiB between CPU processes, 64 MiB between GPUs."""
PROBES, SHORT_PROBES = 3, 10
"""Number of test exchanges of this size, and of single numbers; the median counts."""
SLOWEST_LINK = SLOW_LINK / 10
"""Bytes per second below which even ``cfg2`` is slowed down."""


def slow_link(plan: Plan, kind: str, speed: float) -> str | None:
    """Returns a note if the link between devices will slow the plan down, else None.

    Args:
        plan: of the group.
        kind: of the devices, such as ``cuda``.
        speed: of the link, in bytes per second.
    """
    if kind == "cpu" or plan.world_size == 1 or speed >= (SLOW_LINK if plan.talks_much else SLOWEST_LINK):
        return None
    advice = "a plan of cfg2 alone exchanges least, and " if plan.talks_much else ""
    return (
        f"the GPUs exchange only {speed / 1e9:.2g} GB/s, and {plan} waits for that in every step; {advice}"
        "NCCL_P2P_DISABLE=1 helps where peer-to-peer is broken"
    )


class GroupRankContext(RankContext):
    """The rank context of a plan with several ranks.

    Args:
        plan: its degrees multiply to the world size.
        device: of this rank.
        rank: global rank.
    """

    def __init__(self, plan: Plan, *, device: torch.device, rank: int):
        super().__init__(device)
        self.plan = plan
        self.rank = rank
        xdit.initialise(plan, rank=rank, device=device)
        self.notes: list[str] = []
        """Notes for the user on the communication, a line each."""
        self.control = dist.new_group(backend="gloo", timeout=IDLE)
        self._store = dist.distributed_c10d._get_default_store()
        self._messages = 0
        """Number of messages that rank 0 has broadcast; the last one is the current job."""
        self.copies = False
        self.guidance = GuidanceSplit(plan.cfg, xdit.cfg_group())
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._gpus: list[tuple[int, str]] = self.collect((self.guidance.half, gpu))
        """The half of guidance and the GPU of each rank."""
        self._joined: Any = None
        """xDiT's group of the ranks that share one prompt's tokens in steps that spare the other, once there was one."""
        self.mesh = fsdp_mesh(plan, device) if plan.fsdp > 1 else None
        self.pipe = Pipe(xdit.pipeline_group()) if plan.pipefusion > 1 else None
        tensor_rank = xdit.tensor_group().rank_in_group
        self.shard = Shard(plan.tensor, tensor_rank, plan.fsdp, self.mesh.get_local_rank() if self.mesh else 0)

    def probe(self) -> Link:
        """Exchanges data once over every kind of group that a job uses, so that a broken link hangs here and not in a job.

        Returns:
            Bandwidth of an all-reduce on the slowest rank, per direction, and its latency.
        """
        tensor = torch.zeros(PROBE_NUMBERS[self.device.type], device=self.device)
        dist.all_reduce(tensor)
        self.copies = self._can_copy()
        if self.plan.cfg > 1:
            self.guidance.group.all_gather(tensor)
        if self.plan.sequence > 1:
            xdit.sequence_group().all_gather(tensor)
        if self.plan.tensor > 1:
            xdit.tensor_group().all_reduce(tensor)
        if self.mesh:
            dist.all_reduce(tensor, group=self.mesh.get_group())
        if self.pipe:
            self.pipe.probe(tensor)
        ranks = self.plan.world_size
        lasts = self._median_seconds(lambda: dist.all_reduce(tensor), PROBES)
        latency = self._median_seconds(lambda: dist.all_reduce(tensor[:1]), SHORT_PROBES)
        return Link(2 * (ranks - 1) / ranks * tensor.nbytes / lasts, latency)

    def _median_seconds(self, exchange: Callable[[], Any], times: int) -> float:
        """Returns the median duration of an exchange, on the slowest rank."""
        seconds = []
        for _ in range(times):
            self.synchronize()
            began = time.perf_counter()
            exchange()
            self.synchronize()
            seconds.append(time.perf_counter() - began)
        return max(self.collect(median(seconds)))

    def _can_copy(self) -> bool:
        """Returns whether tokens are exchanged by copies between GPUs; if not, adds a note with the reason."""
        if self.device.type == "cpu" or self.plan.ulysses == 1 or self.plan.ring > 1 or self.plan.pipefusion > 1:
            return False
        reason = symmetric_memory.why_not(xdit.sequence_group().device_group, self.device, self.collect)
        if reason:
            self.notes.append(
                f"NCCL transfers the tokens, which is slower: the GPUs cannot write to each other's memory: {reason}"
            )
        return reason is None

    @property
    def outside_bytes(self) -> int:
        return symmetric_memory.held_bytes()

    def attach(self, transformer) -> None:
        self.shard.cut(transformer)
        if self.plan.tensor > 1:
            join_products(transformer, xdit.tensor_group().device_group)
        group = xdit.sequence_group() if self.plan.sequence > 1 else None
        if self.pipe:
            Stage(transformer, self.pipe, group)
            return
        heads, degrees = heads_of(transformer), {"ulysses": self.plan.ulysses, "ring": self.plan.ring}
        split = SequenceSplit(heads, group=group, **degrees, device=self.device if self.copies else None)
        JointSequence(transformer, split, join=self._joining(heads))
        if self.mesh:
            shard_blocks(transformer, self.mesh)

    def _joining(self, heads: int) -> Callable[[], SequenceSplit] | None:
        """Returns what makes the split of steps that spare a half of guidance, so that its ranks are free; None if they stay so."""
        if self.plan.cfg == 1:
            return None
        if reason := why_not_joined(self.plan, heads, self._gpus):
            self.about_spared = f"in them both halves of plan '{self.plan}' did the same, so they were not shorter: {reason}"
            return None
        return partial(self._join, heads)

    def _join(self, heads: int) -> SequenceSplit:
        """Makes the split of one prompt's tokens over the ranks of both halves: Ulysses. A collective of all ranks."""
        self._joined = self._joined or xdit.joined_group(self.plan, self.device)
        group, reason = self._joined, "" if self.device.type == "cpu" else None
        if reason is None:
            reason = symmetric_memory.why_not(group.device_group, self.device, self.collect)
        shared = f"in them the {group.world_size} ranks of both halves shared its tokens"
        slower = f"{shared}, which NCCL transferred: the GPUs cannot write to each other's memory: {reason}"
        self.about_spared = slower if reason else Information(shared)
        return SequenceSplit(heads, group=group, ulysses=group.world_size, device=self.device if reason is None else None)

    def caches(self, job: SampleJob) -> JobCaches | KeptOfJob:
        return KeptOfJob(job.pipefusion_warmup) if self.pipe else super().caches(job)

    @property
    def is_in_step(self) -> bool:
        return self.pipe is None or not self.pipe.is_under_way

    def share(self, prompts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self.guidance.share(prompts)

    def gather(self, mine: Sequence[torch.Tensor], *, of: int) -> Sequence[torch.Tensor]:
        return self.guidance.gather(mine, of=of)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def strips(self, rows: int) -> Strips | None:
        size = self.plan.world_size
        return Strips(self.rank, size, rows) if rows >= size > 1 else None

    def agree(self, *said: bool) -> tuple[bool, ...]:
        """See :meth:`RankContext.agree`. Uses gloo, so that no GPU waits."""
        answer = torch.tensor(said, dtype=torch.uint8)
        dist.broadcast(answer, src=0, group=self.control)
        return tuple(map(bool, answer))

    def heard(self, go_on: bool) -> bool:
        key = f"stop message {self._messages}"
        if self.rank > 0:
            return not self._store.check([key])
        if not go_on:
            self._store.set(key, "")
        return go_on

    def collect(self, value: Any) -> list[Any]:
        values = [None] * self.plan.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def alike(self, values: list[Any]) -> list[Any]:
        """See :meth:`RankContext.alike`. The halves of guidance may differ, and do if their GPUs do."""
        gpus = {number: sorted(gpu for of, gpu in self._gpus if of == number) for number, _ in self._gpus}
        if len(set(map(tuple, gpus.values()))) == 1:
            return values
        return [value for value, (of, _) in zip(values, self._gpus) if of == self.guidance.half]

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Broadcasts rank 0's bytes. The other ranks pass None and wait without a timeout."""
        self._messages += 1
        length = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(length, src=0, group=self.control)
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self.control)
        return buffer.numpy().tobytes()

    def meet(self, seconds: float) -> None:
        """Waits for all ranks.

        Args:
            seconds: timeout.
        Raises:
            RuntimeError: naming the ranks that are missing.
        """
        dist.monitored_barrier(group=self.control, timeout=timedelta(seconds=seconds))
