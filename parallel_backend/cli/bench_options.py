"""What the options of ``bench`` mean."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from ..devices import RAY, Devices
from ..errors import RequestError
from ..executor.prepare import CheckedJob, PreparedJob, prepare
from ..model import Model
from ..plan import AUTO, Plan

PRECISIONS = {
    "lossless": {},
    "eager": {"compile": "off"},
    "fp8": {"fp8": "linears"},
    "fp8-all": {"fp8": "all"},
    "int8": {"quantize": "int8"},
}
"""What differs in the model from what the options say."""
CACHES = {"cache": ("step_cache", float), "guidance": ("guidance_cache", int)}
"""What may follow behind a ``+``, with its number: the model's field, and the number's type."""
DIFFUSERS = ("eager", "compiled")
NONE = "none"
"""The word for no plan and no pipeline."""


def plans_of(args: Namespace, checked: CheckedJob) -> list[PreparedJob]:
    """Returns the job with each plan of ``--plans``. The choice of ``auto`` is left out if it is named too.

    Raises:
        RequestError: when a plan does not fit the devices or the job.
    """
    words = [] if args.plans == NONE else args.plans.split(",")
    found = [prepare(checked, word, first_devices(args.devices, word)) for word in words]
    named = [(each.plan, each.devices) for word, each in zip(words, found) if word != AUTO]
    return [each for word, each in zip(words, found) if word != AUTO or (each.plan, each.devices) not in named]


def first_devices(devices: str, plan: str) -> str:
    """Returns the first of the user's devices, as many as a plan needs. ``auto`` and ``ray`` stay words, as they leave the number open."""
    if plan == AUTO or devices in (AUTO, RAY):
        return devices
    return str(Devices.parse(devices).first_of(Plan.parse(plan).world_size))


def chosen(option: str, words: str, allowed) -> list[str]:
    """The words of a comma-separated option.

    Raises:
        RequestError: for one that is not allowed.
    """
    found = words.split(",")
    if unknown := set(found) - set(allowed):
        raise RequestError(f"{option}: '{unknown.pop()}' is not understood; use some of {', '.join(allowed)}")
    return found


def changes_of(word: str) -> dict[str, Any]:
    """The model's fields that a word of ``--precisions`` sets, such as ``fp8-all+cache0.1+guidance4``.

    Raises:
        RequestError: for one that is not understood.
    """
    name, *caches = word.split("+")
    try:
        changes = dict(PRECISIONS[name])
        for each in caches:
            cache = each.rstrip("0123456789.")
            field, number = CACHES[cache]
            changes[field] = number(each.removeprefix(cache))
    except (KeyError, ValueError):
        allowed = f"{', '.join(PRECISIONS)}, each with +cache0.1, +guidance4 or both"
        raise RequestError(f"--precisions: '{word}' is not understood; use some of {allowed}") from None
    return changes


def in_precision(model: Model, word: str) -> Model:
    """A model in what a word of ``--precisions`` says."""
    return replace(model, **changes_of(word))


def chosen_precisions(words: str) -> list[str]:
    """The words of ``--precisions``.

    Raises:
        RequestError: for one that is not understood.
    """
    for word in words.split(","):
        changes_of(word)
    return words.split(",")
