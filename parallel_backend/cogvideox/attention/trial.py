"""Tries attention functions on a device: whether they are right, and how fast they are."""

import time
from functools import cache

import torch

from ...devices import current
from ...errors import reason_of
from ...system.modules import version_of
from ...system.nvml import driver_version
from ..kernels.block_torch import keep_kernels
from ..kernels.probe import is_near, once
from . import registry, timings
from .function import NAMES, AttentionFunction, Kind
from .timings import Timings
from .torch_attention import attend_torch, few_states

LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Classes of sequence lengths: a sequence is timed as one of the next length. Longer ones are timed as the last, as their order is
the same."""
HEADS = 4
"""Heads that are timed; with 16384 tokens they fill the largest GPU."""
SECONDS = 0.5
"""For timing all functions of a kind. The round in which it ends is completed."""
ROUNDS, CALLS = 8, 3
"""Most rounds over all functions, and calls of each in a round. A function's fastest round counts."""
CHECKED = slice(64)
"""Queries of a timed sequence that are compared with float32."""
WRONG = "its results are wrong here"
WITH_RINGS = ("cpu", "cuda")
"""Kinds of devices that form groups. On others no function's log-sum-exp is needed, and torch has none."""


def why_not(kind: Kind, function: AttentionFunction) -> str | None:
    """Returns why a function cannot be used on a device, in one line, or None. It is tried once."""
    return function.missing(kind) or why_not_right(kind.device, function.name, kind.dtype, kind.head_dim)


@once
def why_not_right(device: torch.device, name: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Tries a function with a few tokens, and with log-sum-exp where it may be needed, and compares it with torch in float32."""
    keep_kernels()
    function, states = registry.FUNCTIONS[name], few_states(device, head_dim)
    exact = attend_torch(*states)
    found = [function.attend(*function.operands(*states, dtype))]
    if function.attend_with_sums and device.type in WITH_RINGS:
        attended, sums = function.attend_with_sums(*function.operands(*states, dtype, in_ring=True))
        scores = torch.einsum("bqhd,bkhd->bhqk", *states[:2]) / head_dim**0.5
        found.append(attended)
        if sums.shape != scores.shape[:3] or not is_near(sums, scores.logsumexp(-1), function.near):
            return WRONG
    right = all(part.dtype == dtype and part.shape == exact.shape and is_near(part, exact, function.near) for part in found)
    return None if right else WRONG


def length_class(tokens: int) -> int:
    """Returns the length that a sequence is timed as."""
    return next((length for length in LENGTHS if tokens <= length), LENGTHS[-1])


@cache
def measured(kind: Kind, length: int) -> Timings:
    """Returns the times of the exact functions that are right, read from disk or measured now.

    One alone is not timed; its time is 0. That is the last resort where no other is right.

    Args:
        kind: of the tensors.
        length: from :func:`length_class`.
    """
    able = registry.to_time(kind)
    reasons = {function.name: why_not(kind, function) for function in able}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    right = [function for function in able if function.name not in left_out]
    if len(right) < 2:
        return Timings({function.name: 0.0 for function in right} or {registry.LAST_RESORT: 0.0}, left_out)
    key, versions = key_of(kind, length), versions_of(kind.device, able)
    found = timings.read(key, versions)
    if found is None:
        with current(kind.device), torch.inference_mode():
            found = timed(right, kind, length)
        timings.keep(key, versions, found)
    milliseconds = {name: value for name, value in found.milliseconds.items() if name not in left_out}
    return Timings(milliseconds or {registry.LAST_RESORT: 0.0}, {**found.left_out, **left_out})


def timed(functions: list[AttentionFunction], kind: Kind, length: int) -> Timings:
    """Times functions in turn, after comparing a part of each one's result with float32."""
    generator = torch.Generator(kind.device).manual_seed(0)
    shape = (1, length, HEADS, kind.head_dim)
    states = [torch.randn(shape, device=kind.device, generator=generator, dtype=torch.float32) for _ in range(3)]
    exact = attend_torch(states[0][:, CHECKED], *states[1:])
    given, left_out = {}, {}
    for function in functions:
        operands = function.operands(*states, kind.dtype)
        if reason := why_not_at_length(function, operands, exact):
            left_out[function.name] = reason
        else:
            given[function.name] = (function, operands)
    found: dict[str, list[float]] = {name: [] for name in given}
    began = time.monotonic()
    for _ in range(ROUNDS):
        for name, (function, operands) in given.items():
            found[name].append(seconds_of(function, operands))
        if time.monotonic() - began > SECONDS:
            break
    return Timings({name: 1e3 * min(seconds) for name, seconds in found.items()}, left_out)


def why_not_at_length(function: AttentionFunction, operands, exact: torch.Tensor) -> str | None:
    """Returns why a function cannot be used for a long sequence, in one line, or None. The call also prepares it for timing."""
    try:
        result = function.attend(*operands)
        right = bool(result.isfinite().all()) and is_near(result[:, CHECKED], exact, function.near)
    except Exception as error:  # as many kinds as there are packages
        return reason_of(error)
    return None if right else WRONG


def seconds_of(function: AttentionFunction, operands) -> float:
    """Returns the seconds of one call."""
    device = operands[0].device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        function.attend(*operands)
    wait(device)
    return (time.perf_counter() - began) / CALLS


def key_of(kind: Kind, length: int) -> str:
    """Returns the key under which times are kept."""
    gpu = torch.cuda.get_device_name(kind.device) if kind.device.type == "cuda" else kind.device.type
    return f"{gpu}, {NAMES.get(kind.dtype, kind.dtype)}, heads of {kind.head_dim}, {length} tokens"


def versions_of(device: torch.device, functions: list[AttentionFunction]) -> str:
    """Returns the versions of all that the functions' times depend on, and the functions' names."""
    parts = {"torch": torch.__version__}
    if device.type == "cuda":
        parts |= {"driver": driver_version(), "cudnn": torch.backends.cudnn.version()}
    for function in functions:
        parts[function.name] = version_of(function.needs.package) if function.needs.package else "of torch"
    return ", ".join(f"{name} {value}" for name, value in parts.items())
