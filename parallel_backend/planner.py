"""``auto``: the plan for a model and a number of devices, and why."""

from collections.abc import Iterator
from dataclasses import replace

from .plans import Plan


def choose(*, heads: int, world_size: int, guided: bool = True) -> tuple[Plan, str]:
    """The plan that communicates least.

    Splitting the two halves of guidance costs one small exchange a step, Ulysses four all-to-alls a
    block, ring one pass of keys and values a rank; so they are used up in that order.

    Args:
        heads: attention heads of the model.
        world_size: devices to use, all of them.
        guided: whether cfg is above 1, so that there are two halves to share.
    Returns:
        The plan, and the reason in one sentence.
    """
    if world_size == 1:
        return Plan(), "one device: nothing to split"
    cfg = 2 if guided and world_size % 2 == 0 else 1
    rest = world_size // cfg
    ulysses = max(n for n in range(1, rest + 1) if rest % n == 0 and heads % n == 0)
    plan = Plan(cfg=cfg, ulysses=ulysses, ring=rest // ulysses)
    reasons = []
    if cfg == 2:
        reasons.append("cfg2 halves the work for one small exchange a step")
    elif guided:
        reasons.append(f"{world_size} devices are odd, so the halves of guidance stay together")
    else:
        reasons.append("cfg is 1, so there is no second half to share")
    if ulysses > 1:
        reasons.append(f"ulysses{ulysses} is the largest degree that divides {heads} heads")
    if plan.ring > 1:
        reasons.append(f"ring{plan.ring} takes what is left")
    return plan, "; ".join(reasons)


def candidates(*, heads: int, world_size: int, whole_fits: bool = True) -> list[Plan]:
    """Every plan of exactly ``world_size`` devices that the heads allow.

    Args:
        heads: attention heads of the model.
        world_size: devices to use, all of them.
        whole_fits: whether a device has room for all of the model. Where it has, splitting weights only costs time, so no
            such plan is listed; where it has not, only those are, with ``fsdp`` over all ranks that it can be over.
    """
    plans = [plan for plan in products(world_size) if plan.fits(heads)]
    if whole_fits:
        return [plan for plan in plans if plan.tensor == 1]
    split = [plan for plan in plans if plan.tensor > 1]
    return [replace(plan, fsdp=world_size) for plan in plans if plan.tensor == 1 and world_size > 1] + split


def products(world_size: int) -> Iterator[Plan]:
    """Plans of exactly so many devices, without ``fsdp``."""
    for cfg in (1, 2):
        for tensor in range(1, world_size + 1):
            for ulysses in range(1, world_size + 1):
                ring, left = divmod(world_size, cfg * tensor * ulysses)
                if left == 0:
                    yield Plan(cfg=cfg, tensor=tensor, ulysses=ulysses, ring=ring)
