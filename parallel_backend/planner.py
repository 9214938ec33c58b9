"""``auto``: the plan for a model and a number of devices, and why."""

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


def candidates(*, heads: int, world_size: int) -> list[Plan]:
    """Every plan of exactly ``world_size`` devices that the heads allow."""
    found = []
    for cfg in (1, 2):
        if world_size % cfg:
            continue
        rest = world_size // cfg
        for ulysses in range(1, rest + 1):
            if rest % ulysses == 0 and heads % ulysses == 0:
                found.append(Plan(cfg=cfg, ulysses=ulysses, ring=rest // ulysses))
    return found
