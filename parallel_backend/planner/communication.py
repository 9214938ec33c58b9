"""Predicts the bytes that a rank sends in a step, and the seconds that it waits for others. Importable without torch.

A constant that was not measured is marked as assumed.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ..plan import Plan
from .computation import ATTENTION_SHARE, computation
from .machine import Link, Machine
from .work import Work, bubble_factor, plan_patches, stage_layers, states_bytes

ULYSSES_EXPOSED, COPIED = 0.5, 60e9
"""Share of Ulysses' transfers that attention cannot hide where ranks write into each other's memory: the first of two parts, and the
results of the last. And the bandwidth from which links are assumed to allow such writes."""
RING_EXPOSED = 0.5
"""Share of a ring's messages that attention cannot hide: a step of 5b by xDiT's own pipeline took 0.986 s with Ring 2 and 0.983 with Ulysses 2
on two H200s."""
FSDP_EXPOSED = 0.2
"""Share of gathered weights that the previous block cannot hide: assumed."""
OUTPUT_FEATURES = 64
"""Features of an output token: 16 channels of 2 x 2."""


class Transfer(NamedTuple):
    """What a rank sends in one step for one purpose."""

    seconds: float
    """Seconds that the rank waits."""
    size: float
    """Bytes that the rank sends."""


def communication(plan: Plan, work: Work, machine: Machine) -> tuple[float, float]:
    """Returns the seconds that a rank waits for others in a step, and the bytes that it sends."""
    seconds, sent = 0.0, 0.0
    for each in transfers(plan, work, machine):
        seconds += each.seconds
        sent += each.size
    return seconds, sent


def transfers(plan: Plan, work: Work, machine: Machine) -> Iterator[Transfer]:
    """Yields the transfers of every kind of parallelism that a plan uses."""
    if plan.ulysses > 1:
        yield ulysses(plan, work, machine)
    if plan.pipefusion > 1:
        yield from pipefusion(plan, work, machine)
    if plan.ring > 1:
        yield ring(plan, work, machine)
    if plan.tensor > 1:
        yield tensor(plan, work, machine)
    if plan.fsdp > 1:
        yield fsdp(plan, work, machine)
    yield from outputs(plan, work, machine)


def transfer(
    size: float, link: Link, times: int = 1, *, exchanges: int = 1, exposed: float = 1.0, behind: float = 0.0
) -> Transfer:
    """Returns a transfer that runs several times in a step.

    Args:
        size: bytes that a rank sends each time.
        link: what it sends them over.
        times: how often it does so in a step.
        exchanges: messages that ``size`` is split into; each adds the link's latency.
        exposed: share of the transfer that computation cannot hide.
        behind: seconds of computation that hide the rest.
    """
    lasts = size / link.bandwidth
    return Transfer(times * (max(lasts - behind, exposed * lasts) + exchanges * link.latency), times * size)


def ulysses(plan: Plan, work: Work, machine: Machine) -> Transfer:
    """All-to-all in every block: queries, keys and values before attention, results after it."""
    qk_size = 1 / work.itemsize if work.attention_fp8 and machine.attention_fp8 > 1 else 1.0  # sent in FP8
    tensors = (2 * qk_size if plan.ring == 1 else 2) + 2
    link = slowest_link(machine, plan, plan.tensor, plan.ulysses)
    away = (plan.ulysses - 1) / plan.ulysses
    exposed, behind = 1.0, 0.0
    if plan.ring == plan.pipefusion == 1 and link == machine.link and link.bandwidth >= COPIED:
        exposed, behind = ULYSSES_EXPOSED, attention_seconds(plan, work, machine) / 2
    found = transfer(
        tensors * states_bytes(plan, work) / plan.tensor * away,
        link,
        stage_layers(plan, work.layers),
        exchanges=2 * plan_patches(plan, work),
        exposed=exposed,
        behind=behind,
    )
    return Transfer(found.seconds * bubble_factor(plan, work), found.size)


def pipefusion(plan: Plan, work: Work, machine: Machine) -> Iterator[Transfer]:
    """Each patch once to the next stage, which computes the previous patch meanwhile; the first patch is not hidden."""
    states, count = states_bytes(plan, work), plan_patches(plan, work)
    link = slowest_link(machine, plan, plan.tensor * plan.sequence, plan.pipefusion)
    patch_seconds = computation(plan, work, machine) / (bubble_factor(plan, work) * count)
    yield transfer(states / count, link, count, exposed=0, behind=patch_seconds)
    yield Transfer((plan.pipefusion - 1) * states / count / link.bandwidth, 0.0)


def ring(plan: Plan, work: Work, machine: Machine) -> Transfer:
    """Keys and values of all other ranks in every block, while a rank attends to the previous ones."""
    link = slowest_link(machine, plan, plan.tensor * plan.ulysses, plan.ring)
    size = 2 * states_bytes(plan, work) / plan.tensor * (plan.ring - 1)
    behind = attention_seconds(plan, work, machine) * (plan.ring - 1) / plan.ring
    return transfer(size, link, work.layers, exchanges=plan.ring - 1, exposed=RING_EXPOSED, behind=behind)


def tensor(plan: Plan, work: Work, machine: Machine) -> Transfer:
    """All-reduce in every block: results of attention and of the feed-forward."""
    size = 2 * 2 * states_bytes(plan, work) * (plan.tensor - 1) / plan.tensor
    return transfer(size, slowest_link(machine, plan, 1, plan.tensor), work.layers, exchanges=2)


def fsdp(plan: Plan, work: Work, machine: Machine) -> Transfer:
    """All-gather in every block: the next block's weights, while this one runs."""
    block = (work.vectors + work.matrices // plan.tensor) / work.layers
    behind = computation(plan, work, machine) / work.layers
    away = (plan.fsdp - 1) / plan.fsdp
    link = slowest_link(machine, plan, plan.tensor, plan.fsdp)
    return transfer(block * away, link, work.layers, exposed=FSDP_EXPOSED, behind=behind)


def outputs(plan: Plan, work: Work, machine: Machine) -> Iterator[Transfer]:
    """The prediction once a step: to the ranks of the sequence, from the last stage to all others, and to the other half of guidance."""
    size = OUTPUT_FEATURES / work.features * states_bytes(plan, work)
    if plan.sequence > 1:
        yield transfer(size * (plan.sequence - 1), slowest_link(machine, plan, plan.tensor, plan.sequence))
    if plan.pipefusion > 1:
        yield transfer(size, slowest_link(machine, plan, plan.tensor * plan.sequence, plan.pipefusion))
    if plan.cfg > 1:
        stride = plan.tensor * plan.sequence * plan.pipefusion
        yield transfer(size * plan.sequence, slowest_link(machine, plan, stride, plan.cfg))


def attention_seconds(plan: Plan, work: Work, machine: Machine) -> float:
    """Returns the seconds of a rank's attention in one block."""
    return work.attention / plan.world_size / (machine.attention * ATTENTION_SHARE) / work.layers


def slowest_link(machine: Machine, plan: Plan, stride: int, degree: int) -> Link:
    """Returns the slowest link between the ranks of a group.

    Args:
        machine, plan: where the ranks are. From the innermost, ranks are ordered by tensor, ulysses, ring, pipefusion, cfg.
        stride: distance between neighbours in the group, in ranks.
        degree: ranks in the group.
    """
    if plan.world_size <= machine.per_machine or machine.per_machine % (stride * degree) == 0:
        return machine.link
    return machine.network
