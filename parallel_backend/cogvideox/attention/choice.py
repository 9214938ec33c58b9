"""Chooses the attention function of a job: the one that is asked for, or for ``auto`` the fastest exact one that is right.

This pack's kernels are taken without timing where they work. Elsewhere the functions of torch and of installed packages are timed
once on a GPU; see :mod:`.trial`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import RequestError
from ...notes import Information
from ...plan import AUTO
from . import hopper_fp8, registry
from .function import AttentionFunction, Kind
from .recomputed_tiles import TOO_OFTEN, pieces_on
from .timings import Timings
from .torch_attention import Attention
from .trial import length_class, measured, why_not

Collect = Callable[[Any], list[Any]]
"""Returns a value from each of several ranks; a collective."""


@dataclass(frozen=True)
class Choice:
    """The function of a job."""

    function: AttentionFunction
    notes: tuple[str, ...] = ()
    """For the user, a line each."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group, as far as they must agree. The default is one rank alone."""

    collect: Collect = lambda value: [value]
    """Returns a value from every rank, in their order."""
    mine: Callable[[list[Any]], list[Any]] = lambda values: values
    """Returns those of the ranks that must have the same function as this one: they attend to the same sequence."""


def check(name: str, kind: Kind, ranks: Ranks) -> None:
    """Checks that a function works on every rank. All ranks must call it.

    Args:
        name: of the function, or ``auto``.
        kind: of this rank's tensors.
        ranks: of the group.
    Raises:
        RequestError: on all ranks, with the functions that can be used and the reason.
    """
    if name == AUTO:
        return
    mine = why_not(kind, registry.FUNCTIONS[name])
    refused = mine and refusal(name, kind, mine, [function.name for function in registry.usable(kind)])
    if reasons := [reason for reason in ranks.collect(refused) if reason]:
        raise RequestError(reasons[0])


def check_devices(name: str, kinds: list[Kind]) -> None:
    """Checks that devices have what a function needs, as far as that is known without its package: a group may have another Python.

    Raises:
        RequestError: see :func:`check`.
    """
    for kind in kinds if name != AUTO else ():
        if reason := registry.FUNCTIONS[name].needs.unmet(kind):
            able = [function.name for function in registry.FUNCTIONS.values() if function.needs.unmet(kind) is None]
            raise RequestError(refusal(name, kind, reason, able))


def refusal(name: str, kind: Kind, reason: str, able: list[str]) -> str:
    """Returns the message for a function that cannot be used."""
    return f"attention '{name}' cannot be used for {kind}: {reason}; use one of {', '.join([AUTO, *able])}"


def prepare(kind: Kind, name: str = AUTO) -> None:
    """Compiles and tries the functions among which :func:`choose` will choose.

    It takes a few seconds, best spent while something else runs.
    """
    for function in preferred(name):
        if why_not(kind, function) is None:
            return
    for function in registry.to_time(kind):
        why_not(kind, function)


def preferred(name: str) -> list[AttentionFunction]:
    """Returns the functions that are taken without timing if they work, best first.

    One that is named stands alone, so that kernels which do not work somewhere are not even compiled. FP8 does not, as the model's
    ``fp8`` asks for it only where it works.
    """
    first = [function for function in registry.FUNCTIONS.values() if function.comes_first]
    if name == AUTO:
        return first
    return [registry.FUNCTIONS[name], *(first if registry.FUNCTIONS[name].fp8 else ())]


def choose(name: str, kind: Kind, tokens: int, ranks: Ranks) -> Choice:
    """Chooses the function of a job. All ranks must call it.

    Args:
        name: of a function, or ``auto``. If the function does not work, another one is chosen, with a note: :func:`check` refuses
            one that the user has named.
        kind: of this rank's tensors.
        tokens: of the whole sequence.
        ranks: of the group.
    """
    wanted = preferred(name)
    reasons = ranks.mine(ranks.collect({function.name: why_not(kind, function) for function in wanted}))
    works = [function for function in wanted if not any(of_rank[function.name] for of_rank in reasons)]
    # All ranks take part, whether or not they need it: others may be without a function that works for these.
    offers = ranks.mine(ranks.collect(None if works else measured(kind, length_class(tokens))))
    chosen, notes = (works[0], []) if works else fastest_of(offers)
    missed = [note_of_missed(each, kind, reasons) for each in (wanted[: wanted.index(chosen)] if works else wanted)]
    return Choice(chosen, tuple(note for note in (*missed, *notes, note_of_values(chosen, kind)) if note))


def fastest_of(offers: list[Timings]) -> tuple[AttentionFunction, list[str]]:
    """Returns the function that is the fastest for the slowest rank, among those that all ranks have, and the notes for the user."""
    slowest = {
        name: max(offer.milliseconds[name] for offer in offers)
        for name in offers[0].milliseconds
        if all(name in offer.milliseconds for offer in offers)
    }
    name = min(slowest, key=slowest.get, default=registry.LAST_RESORT)
    left_out = {name: reason for offer in offers for name, reason in offer.left_out.items()}
    without = "".join(f"; without {other}: {reason}" for other, reason in left_out.items())
    if len(slowest) > 1:
        note = f"attention: {name}, the fastest of {len(slowest)} exact functions here{without}"
        return registry.FUNCTIONS[name], [note if without else Information(note)]
    return registry.FUNCTIONS[name], [f"attention: {name}{without}"] if without else []


def note_of_missed(function: AttentionFunction, kind: Kind, reasons: list[dict[str, str | None]]) -> str | None:
    """Returns a note for the user on a preferred function that is not used, or None if it is not meant for this GPU."""
    mine = why_not(kind, function)
    reason = mine or "another rank cannot use it: " + next(
        of_rank[function.name] for of_rank in reasons if of_rank[function.name]
    )
    if function.comes_first:
        return None if function.missing(kind) else f"attention is not this pack's own, which is faster: {reason}"
    return f"attention is not in {function.name.upper()}: {reason}"


def note_of_values(function: AttentionFunction, kind: Kind) -> str | None:
    """Returns a note for the user if FP8 attention keeps values in 16 bits, else None."""
    reason = hopper_fp8.why_not(kind.device) if function.fp8 else None
    return f"attention's values are not in FP8, which is slower: {reason}" if reason else None


def fastest_alone(kind: Kind, tokens: int) -> AttentionFunction:
    """Returns what ``auto`` chooses for one rank."""
    return choose(AUTO, kind, tokens, Ranks()).function


def begin(function: AttentionFunction, device: torch.device) -> None:
    """Prepares a forward pass: lets this pack's kernels follow the range of the scores."""
    if function.base_two:
        pieces_on(device).look()


def note_of_twice(device: torch.device) -> str | None:
    """Returns a note for the user if this pack's kernels recomputed much since the last call, else None."""
    share = pieces_on(device).share_of_twice() if device.type == "cuda" else 0.0
    if share <= TOO_OFTEN:
        return None
    then = ", until the kernel for such scores took over" if pieces_on(device).needs_maximum else ""
    return f"{share:.0%} of attention was computed twice, as its scores are out of the fast kernel's range{then}: slower, but as accurate"


def alone(attend: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes attention on one rank, for tensors ``[batch, 1, tokens, heads, head_dim]`` in the layout for several ranks."""
    return attend(*(states.squeeze(1) for states in (query, key, value))).unsqueeze(1)
