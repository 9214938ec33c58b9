"""``auto``: the plan for a model and devices that is predicted to be the fastest, and why. Importable without torch."""

import math
from collections.abc import Iterator
from dataclasses import replace

from ..plan import Plan
from .cost_model import Prediction, Work, predict
from .machine import CPU, Machine

TIE = 0.02
"""Share by which a plan must be faster than one that sends less: predictions are not better than that."""
DOUBT = 1.5
"""Times as long as all devices must take before fewer are used over a link that nobody measured: a group on all of them measures
it, and then it is known; a group on fewer never would."""
GIB = 2**30


def choose(
    *,
    heads: int,
    world_size: int,
    guided: bool = True,
    work: Work | None = None,
    machine: Machine | None = None,
    jobs: int = 1,
    can_share: bool = True,
    unit: str = "videos",
) -> tuple[Plan, str]:
    """The plan that is predicted to be the fastest of those that fit.

    Args:
        heads: attention heads of the model.
        world_size: devices to use, or fewer where more would not be faster.
        guided: whether cfg is above 1, so that there are two halves to share.
        work: of one step; a 5b or 2b at its own size where it is not known.
        machine: the devices; processes on a CPU where they are not known.
        jobs: that are to be run one after the other, such as a list of prompts, or a long video's windows.
        can_share: whether replicas may share them and the videos of their batches.
        unit: what ``jobs`` counts, for the user.
    Returns:
        The plan, and the reason in one sentence.
    """
    work, machine = work or assumed(heads, guided), machine or CPU
    found = predictions(work, machine, world_size, jobs=jobs, can_share=can_share)
    best = pick(found)
    many = jobs * work.videos
    return best.plan, why(best, found, machine, world_size, f"all {many} {unit}" if many > 1 else "")


def assumed(heads: int, guided: bool) -> Work:
    """A step of a published model with so many heads, at 49 x 480 x 720."""
    layers, features = (42 if heads == 48 else 30), heads * 64
    matrices = layers * (12 * features**2 + 12 * 512 * features) * 2
    vectors, rest = layers * 40 * features * 2, (4096 + 700) * features * 2
    return Work(layers, heads, 64, 17776, 2 if guided else 1, 2, matrices, vectors, rest, guided)


def predictions(work: Work, machine: Machine, world_size: int, *, jobs: int = 1, can_share: bool = True) -> list[Prediction]:
    """What every exact plan of all devices costs, the best of each smaller number of them, and that in replicas. Fastest first.

    Where seconds are not known only the order of plans of one size is to be believed, so these are all there is.
    """
    found = [replace(each, rounds=jobs) for each in of_size(work, machine.first(world_size), world_size)]
    if machine.knows_seconds:
        fitting = [each.total for each in found if each.fits]
        most = min(fitting) / DOUBT if fitting and not machine.knows_link else math.inf
        for size in range(1, world_size):
            smaller = [replace(each, rounds=jobs) for each in best_of_size(work, machine.first(size), size)]
            found += [each for each in smaller if each.total <= most]
        if can_share:
            found += in_replicas(work, machine, world_size, jobs * work.videos)
    return sorted(found, key=lambda each: each.total)


def of_size(work: Work, machine: Machine, size: int) -> list[Prediction]:
    """What every exact plan of exactly so many devices costs; those that split weights only where none of the others fits."""
    found = []
    for whole in (True, False):
        plans = candidates(heads=work.heads, world_size=size, whole_fits=whole)
        found += [predict(plan, work, machine) for plan in plans if may(plan, work, machine)]
        if any(each.fits for each in found):
            break
    return found


def best_of_size(work: Work, machine: Machine, size: int) -> list[Prediction]:
    """The fastest plan of so many devices that fits; nothing where none does."""
    fitting = [each for each in of_size(work, machine, size) if each.fits]
    return [pick(fitting)] if fitting else []


def in_replicas(work: Work, machine: Machine, world_size: int, videos: int) -> list[Prediction]:
    """For each size that two groups can have, the fastest plan in as many as keep all of them busy to the end."""
    one = replace(work, prompts=work.prompts // work.videos)
    found = []
    for size in range(1, world_size // 2 + 1):
        rounds = math.ceil(videos / min(videos, world_size // size))
        groups = math.ceil(videos / rounds)
        if groups > 1:
            for each in best_of_size(one, machine.first(groups * size), size):
                found.append(replace(each, plan=replace(each.plan, replicas=groups), rounds=rounds))
    return found


def approximations(work: Work, machine: Machine, world_size: int) -> list[Prediction]:
    """What the plans cost that are not exact, fastest first: for a person to choose, as ``auto`` gives the video of ``single``."""
    plans = pipelines(heads=work.heads, layers=work.layers, world_size=world_size)
    found = [predict(plan, work, machine) for plan in plans if may(plan, work, machine)]
    return sorted(found, key=lambda each: each.seconds)


def may(plan: Plan, work: Work, machine: Machine) -> bool:
    """Whether a plan is one for this step: guidance alone has halves to share, and some offload refuses ``fsdp`` and
    ``pipefusion``."""
    return (work.guided or plan.cfg == 1) and (machine.can_shard or plan.can_offload("group"))


def pick(found: list[Prediction]) -> Prediction:
    """The fastest that fits; of those that are as good as equal one that makes a video at a time, and sends least.

    Where none fits it is one that keeps weights whole, as those can wait on the CPU.
    """
    able = [each for each in found if each.fits] or [each for each in found if not splits_weights(each.plan)]
    fastest = min(each.total for each in able)
    equal = (each for each in able if each.total <= fastest * (1 + TIE))
    return min(equal, key=lambda each: (each.plan.replicas, each.sent, each.plan.ring))


def splits_weights(plan: Plan) -> bool:
    """Whether ranks keep only parts of the weights."""
    return plan.tensor > 1 or plan.fsdp > 1


def why(best: Prediction, found: list[Prediction], machine: Machine, world_size: int, several: str = "") -> str:
    """The reason in one sentence; ``several`` are what a step is of, where that is not one video."""
    fitting = [each for each in found if each.fits]
    others = [each for each in fitting or found if each is not best and fits_alike(each, best)]
    alike = [each for each in others if (each.plan.replicas, each.plan.world_size) == (best.plan.replicas, world_size)]
    fewer = best.plan.world_size < world_size
    if world_size == 1:
        return "one device: nothing to split" + (f", predicted at {seconds(best)} a step" if machine.knows_seconds else "")
    step = f"a step of {several}" if several else "a step"
    where = f" on {best.plan.world_size} of {world_size} devices" if fewer else ""
    if fewer:
        others = [each for each in others if each.plan.world_size == world_size]
    elif best.plan.replicas > 1:
        others = [each for each in others if each.plan.replicas == 1]
    else:
        others = alike or others
    if machine.knows_seconds:
        said = f"{best.plan}{where} is predicted at {seconds(best)} {step}"
        said += f", {others[0].plan}{' on all' if fewer else ''} at {seconds(others[0])}" if others else ""
    else:
        said = f"{best.plan} is predicted to take least"
        said += f", {others[0].plan} {others[0].total / best.total:.3g} times as long" if others else ""
    if alike and not fewer and best.sent <= min(each.sent for each in alike):
        said += "; it exchanges least"
    if fewer:
        said += "; more devices do not make it faster" if others else "; nothing fits that uses more of them"
    if not fitting:
        return f"{said}; no plan fits into {machine.free / GIB:.3g} GiB, so offload lets weights wait on the CPU"
    whole = [each for each in found if not splits_weights(each.plan)]
    if splits_weights(best.plan) and whole:
        least = min(whole, key=lambda each: each.needed)
        said += f"; whole, the model would need {least.needed / GIB:.1f} GiB and {machine.free / GIB:.1f} are free"
    return said


def fits_alike(each: Prediction, best: Prediction) -> bool:
    """Whether both keep weights whole, or both split them."""
    return splits_weights(each.plan) == splits_weights(best.plan)


def seconds(prediction: Prediction) -> str:
    """Of a step of all videos, for a person: two digits after the point, or two that say something."""
    return f"{prediction.total:.2f} s" if prediction.total >= 0.1 else f"{prediction.total:.2g} s"


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
