"""``auto``: chooses the plan that is predicted to be the fastest, and gives the reason. Importable without torch."""

import math
from collections.abc import Iterator
from dataclasses import replace

from ..plan import Plan
from .cost_model import Prediction, predict
from .machine import Machine
from .work import Work

TIE = 0.02
"""Plans within this share of the fastest count as equally fast, as predictions are no better than that."""
DOUBT = 1.5
"""Over a link that was not measured, fewer devices are used only if they are this many times as fast. A group on all devices measures
the link; a group on fewer devices never would."""
GIB = 2**30


def choose(
    work: Work,
    machine: Machine,
    world_size: int,
    *,
    jobs: int = 1,
    can_share: bool = True,
    unit: str = "videos",
) -> tuple[Plan, str]:
    """Chooses the plan that is predicted to be the fastest of those that fit.

    Args:
        work: one step; see :func:`assumed` if it is unknown.
        machine: the devices.
        world_size: number of devices. Fewer are used if all of them are not faster.
        jobs: jobs that run one after the other, such as a list of prompts, or the windows of a long video.
        can_share: whether replicas may share the jobs and the videos of their batches.
        unit: what ``jobs`` counts, for the user.
    Returns:
        The plan, and the reason in one sentence.
    """
    found = predictions(work, machine, world_size, jobs=jobs, can_share=can_share)
    best = pick(found)
    return best.plan, reason_for(best, found, machine, world_size, what_is_timed(jobs * work.videos, unit))


def what_is_timed(count: int, unit: str) -> str:
    """Returns what a prediction's seconds are of, for the user. A tile takes one step, and a video several."""
    if unit == "tiles":
        return f"for all {count} tiles" if count > 1 else "a tile"
    return f"a step of all {count} {unit}" if count > 1 else "a step"


def assumed(heads: int, guided: bool) -> Work:
    """Returns a step of the published model with this number of heads, at 49 x 480 x 720."""
    layers, features = (42 if heads == 48 else 30), heads * 64
    matrices = layers * (12 * features**2 + 12 * 512 * features) * 2
    vectors, rest = layers * 40 * features * 2, (4096 + 700) * features * 2
    return Work(layers, heads, 64, 17776, 2 if guided else 1, 2, matrices, vectors, rest, guided)


def predictions(work: Work, machine: Machine, world_size: int, *, jobs: int = 1, can_share: bool = True) -> list[Prediction]:
    """Predicts every exact plan on all devices, the best plan on each smaller number of devices, and replicas. Fastest first.

    If the machine's seconds are unknown, only plans on all devices are returned, replicas included: plans of different sizes cannot be
    compared.
    """
    found = [replace(each, rounds=jobs) for each in of_size(work, machine.first(world_size), world_size)]
    if machine.knows_seconds:
        fitting = [each.total for each in found if each.fits]
        most = min(fitting) / DOUBT if fitting and not machine.knows_link else math.inf
        for size in range(1, world_size):
            smaller = [replace(each, rounds=jobs) for each in best_of_size(work, machine.first(size), size)]
            found += [each for each in smaller if each.total <= most]
    if can_share:
        shared = in_replicas(work, machine, world_size, jobs * work.videos)
        found += [each for each in shared if machine.knows_seconds or each.plan.world_size == world_size]
    return sorted(found, key=lambda each: each.total)


def of_size(work: Work, machine: Machine, size: int) -> list[Prediction]:
    """Predicts every exact plan of ``size`` devices. Plans that split weights are included only if no other plan fits."""
    found = []
    for whole in (True, False):
        plans = candidates(heads=work.heads, world_size=size, whole_fits=whole)
        found += [predict(plan, work, machine) for plan in plans if can_run(plan, work, machine)]
        if any(each.fits for each in found):
            break
    return found


def best_of_size(work: Work, machine: Machine, size: int) -> list[Prediction]:
    """Returns the fastest plan of ``size`` devices that fits, in a list; an empty list if none fits."""
    fitting = [each for each in of_size(work, machine, size) if each.fits]
    return [pick(fitting)] if fitting else []


def in_replicas(work: Work, machine: Machine, world_size: int, videos: int) -> list[Prediction]:
    """Predicts replicas: for each size of a replica its fastest plan, with as many replicas as stay busy until the end."""
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
    """Predicts the plans that are not exact, fastest first. Only the user can choose them: ``auto`` keeps the video of ``single``."""
    plans = pipelines(heads=work.heads, layers=work.layers, world_size=world_size)
    found = [predict(plan, work, machine) for plan in plans if can_run(plan, work, machine)]
    return sorted(found, key=lambda each: each.seconds)


def can_run(plan: Plan, work: Work, machine: Machine) -> bool:
    """Whether a plan can run this step.

    ``cfg2`` needs guidance, a ring an attention function that works in it, and offload by parts excludes ``fsdp`` and
    ``pipefusion``.
    """
    return (
        (work.guided or plan.cfg == 1)
        and (work.can_ring or plan.ring == 1)
        and (machine.can_shard or plan.can_offload("group"))
    )


def pick(found: list[Prediction]) -> Prediction:
    """Returns the fastest plan that fits. Among equally fast plans, fewer replicas and then fewer sent bytes are preferred.

    If none fits, it is a plan that keeps weights whole, as these can be offloaded to the CPU.
    """
    able = [each for each in found if each.fits] or [each for each in found if not splits_weights(each.plan)]
    fastest = min(each.total for each in able)
    equal = (each for each in able if each.total <= fastest * (1 + TIE))
    return min(equal, key=lambda each: (each.plan.replicas, each.sent, each.plan.ring))


def splits_weights(plan: Plan) -> bool:
    """Whether ranks keep only parts of the weights."""
    return plan.tensor > 1 or plan.fsdp > 1


def reason_for(best: Prediction, found: list[Prediction], machine: Machine, world_size: int, step: str = "a step") -> str:
    """Returns the reason for the best plan in one sentence.

    Args:
        best: the plan.
        found: all predictions, fastest first.
        machine: the devices.
        world_size: number of devices.
        step: what the seconds are of, such as ``a step of all 3 videos``.
    """
    fitting = [each for each in found if each.fits]
    others = [each for each in fitting or found if each is not best and fits_alike(each, best)]
    alike = [each for each in others if (each.plan.replicas, each.plan.world_size) == (best.plan.replicas, world_size)]
    fewer = best.plan.world_size < world_size
    if world_size == 1:
        return "one device: nothing to split" + (f", predicted at {seconds(best)} {step}" if machine.knows_seconds else "")
    where = f" on {best.plan.world_size} of {world_size} devices" if fewer else ""
    if fewer:
        others = [each for each in others if each.plan.world_size == world_size]
    elif best.plan.replicas > 1:
        others = [each for each in others if each.plan.replicas == 1]
    else:
        others = alike or others
    if machine.knows_seconds:
        reason = f"{best.plan}{where} is predicted at {seconds(best)} {step}"
        reason += f", {others[0].plan}{' on all' if fewer else ''} at {seconds(others[0])}" if others else ""
    else:
        reason = f"{best.plan} is predicted to be the fastest"
        reason += f", {others[0].plan} takes {others[0].total / best.total:.3g} times as long" if others else ""
    if alike and not fewer and best.sent <= min(each.sent for each in alike):
        reason += f"; {best.plan} sends the least"
    if fewer:
        reason += "; more devices do not make it faster" if others else "; no similar plan fits on all devices"
    if not fitting:
        return f"{reason}; no plan fits into {machine.free / GIB:.3g} GiB, so weights are offloaded to the CPU"
    whole = [each for each in found if not splits_weights(each.plan)]
    if splits_weights(best.plan) and whole:
        least = min(whole, key=lambda each: each.needed)
        reason += f"; unsplit weights would need {least.needed / GIB:.1f} GiB, {machine.free / GIB:.1f} GiB are free"
    return reason


def fits_alike(each: Prediction, best: Prediction) -> bool:
    """Whether both keep weights whole, or both split them."""
    return splits_weights(each.plan) == splits_weights(best.plan)


def seconds(prediction: Prediction) -> str:
    """Formats the seconds of a step of all videos, for the user: two decimals, or two significant digits if it is short."""
    return f"{prediction.total:.2f} s" if prediction.total >= 0.1 else f"{prediction.total:.2g} s"


def candidates(*, heads: int, world_size: int, whole_fits: bool = True) -> list[Plan]:
    """Returns every exact plan of ``world_size`` devices that the heads allow.

    Args:
        heads: attention heads of the model.
        world_size: number of devices.
        whole_fits: whether the whole model fits on a device. If it does, plans that split weights are left out, as they are
            slower. If not, only these are returned, with ``fsdp`` over all ranks where it is possible.
    """
    plans = [plan for plan in products(world_size) if plan.fits(heads)]
    if whole_fits:
        return [plan for plan in plans if plan.tensor == 1]
    split = [plan for plan in plans if plan.tensor > 1]
    return [replace(plan, fsdp=world_size) for plan in plans if plan.tensor == 1 and world_size > 1] + split


def pipelines(*, heads: int, layers: int, world_size: int) -> list[Plan]:
    """Returns every plan of ``world_size`` devices with ``pipefusion`` that the heads and layers allow."""
    found = []
    for cfg in (1, 2):
        for stages in range(2, min(layers, world_size) + 1):
            ulysses, left = divmod(world_size, cfg * stages)
            if left == 0 and heads % ulysses == 0:
                found.append(Plan(cfg=cfg, ulysses=ulysses, pipefusion=stages))
    return found


def products(world_size: int) -> Iterator[Plan]:
    """Yields every exact plan of ``world_size`` devices without ``fsdp``."""
    for cfg in (1, 2):
        for tensor in range(1, world_size + 1):
            for ulysses in range(1, world_size + 1):
                ring, left = divmod(world_size, cfg * tensor * ulysses)
                if left == 0:
                    yield Plan(cfg=cfg, tensor=tensor, ulysses=ulysses, ring=ring)
