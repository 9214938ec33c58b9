"""``auto``: the plan for a model and devices that is predicted to be the fastest, and why. Importable without torch."""

from collections.abc import Iterator
from dataclasses import replace

from .costs import CPU, HEADROOM, Machine, Prediction, Work, predict
from .plans import Plan

TIE = 0.02
"""Share by which a plan must be faster than one that sends less: predictions are not better than that."""
GIB = 2**30


def choose(
    *, heads: int, world_size: int, guided: bool = True, work: Work | None = None, machine: Machine | None = None
) -> tuple[Plan, str]:
    """The plan that is predicted to be the fastest of those that fit.

    Args:
        heads: attention heads of the model.
        world_size: devices to use, all of them.
        guided: whether cfg is above 1, so that there are two halves to share.
        work: of one step; a 5b or 2b at its own size where it is not known.
        machine: the devices; processes on a CPU where they are not known.
    Returns:
        The plan, and the reason in one sentence.
    """
    work, machine = work or assumed(heads, guided), machine or CPU
    found = predictions(work, machine, world_size)
    best = pick(found)
    return best.plan, why(best, found, machine)


def assumed(heads: int, guided: bool) -> Work:
    """A step of a published model with so many heads, at 49 x 480 x 720."""
    layers, features = (42 if heads == 48 else 30), heads * 64
    matrices = layers * (12 * features**2 + 12 * 512 * features) * 2
    vectors, rest = layers * 40 * features * 2, (4096 + 700) * features * 2
    return Work(layers, heads, 64, 17776, 2 if guided else 1, 2, matrices, vectors, rest, guided)


def predictions(work: Work, machine: Machine, world_size: int) -> list[Prediction]:
    """What every exact plan costs; those that split weights only where none of the others fits. Fastest first."""
    found = []
    for whole in (True, False):
        plans = candidates(heads=work.heads, world_size=world_size, whole_fits=whole)
        found += [predict(plan, work, machine) for plan in plans if may(plan, work, machine)]
        if any(each.fits for each in found):
            break
    return sorted(found, key=lambda each: each.seconds)


def approximations(work: Work, machine: Machine, world_size: int) -> list[Prediction]:
    """What the plans cost that are not exact, fastest first: for a person to choose, as ``auto`` gives the video of ``single``."""
    plans = pipelines(heads=work.heads, layers=work.layers, world_size=world_size)
    found = [predict(plan, work, machine) for plan in plans if may(plan, work, machine)]
    return sorted(found, key=lambda each: each.seconds)


def may(plan: Plan, work: Work, machine: Machine) -> bool:
    """Whether a plan is one for this step: guidance alone has halves to share, some offload refuses ``fsdp`` and ``pipefusion``,
    and that refuses attention in FP8."""
    if plan.pipefusion > 1 and work.fp8 == "all":
        return False
    return (work.guided or plan.cfg == 1) and (machine.can_shard or plan.can_offload("group"))


def pick(found: list[Prediction]) -> Prediction:
    """The fastest that fits; of those that are as good as equal the one that sends least.

    Where none fits it is one that keeps weights whole, as those can wait on the CPU.
    """
    able = [each for each in found if each.fits] or [each for each in found if not splits_weights(each.plan)]
    fastest = min(each.seconds for each in able)
    return min((each for each in able if each.seconds <= fastest * (1 + TIE)), key=lambda each: (each.sent, each.plan.ring))


def splits_weights(plan: Plan) -> bool:
    """Whether ranks keep only parts of the weights."""
    return plan.tensor > 1 or plan.fsdp > 1


def why(best: Prediction, found: list[Prediction], machine: Machine) -> str:
    """The reason in one sentence."""
    fitting = [each for each in found if each.fits]
    others = [each for each in fitting or found if each is not best and fits_alike(each, best)]
    if best.plan.world_size == 1:
        said = "one device: nothing to split" + (f", predicted at {seconds(best)} a step" if machine.knows_seconds else "")
    elif machine.knows_seconds:
        said = f"{best.plan} is predicted at {seconds(best)} a step"
        said += f", {others[0].plan} at {seconds(others[0])}" if others else ""
    else:
        said = f"{best.plan} is predicted to take least"
        said += f", {others[0].plan} {others[0].seconds / best.seconds:.3g} times as long" if others else ""
    if others and best.sent <= min(each.sent for each in others):
        said += "; it exchanges least"
    if not fitting:
        return f"{said}; no plan fits into {machine.free / GIB:.3g} GiB, so offload lets weights wait on the CPU"
    whole = [each for each in found if not splits_weights(each.plan)]
    if splits_weights(best.plan) and whole:
        least, usable = min(whole, key=lambda each: each.needed), machine.free * HEADROOM / GIB
        said += f"; whole, the model would need {least.needed / GIB:.1f} GiB and {usable:.1f} can be counted on"
    return said


def fits_alike(each: Prediction, best: Prediction) -> bool:
    """Whether both keep weights whole, or both split them."""
    return splits_weights(each.plan) == splits_weights(best.plan)


def seconds(prediction: Prediction) -> str:
    """For a person: two digits after the point, or two that say something."""
    return f"{prediction.seconds:.2f} s" if prediction.seconds >= 0.1 else f"{prediction.seconds:.2g} s"


def candidates(*, heads: int, world_size: int, whole_fits: bool = True) -> list[Plan]:
    """Every exact plan of exactly ``world_size`` devices that the heads allow.

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


def pipelines(*, heads: int, layers: int, world_size: int) -> list[Plan]:
    """Every plan of exactly ``world_size`` devices with ``pipefusion`` that the heads and blocks allow."""
    found = []
    for cfg in (1, 2):
        for stages in range(2, min(layers, world_size) + 1):
            ulysses, left = divmod(world_size, cfg * stages)
            if left == 0 and heads % ulysses == 0:
                found.append(Plan(cfg=cfg, ulysses=ulysses, pipefusion=stages))
    return found


def products(world_size: int) -> Iterator[Plan]:
    """Exact plans of exactly so many devices, without ``fsdp``."""
    for cfg in (1, 2):
        for tensor in range(1, world_size + 1):
            for ulysses in range(1, world_size + 1):
                ring, left = divmod(world_size, cfg * tensor * ulysses)
                if left == 0:
                    yield Plan(cfg=cfg, tensor=tensor, ulysses=ulysses, ring=ring)
