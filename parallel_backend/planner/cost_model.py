"""The cost model: seconds of a step and bytes on each rank under a plan. Importable without torch.

Each constant names the measurement that it comes from; ``h100x2*.json`` and ``h200x2*.json`` are in benchmarks/results.
"""

from dataclasses import dataclass

from ..plan import Plan
from .communication import communication
from .computation import computation, vae_seconds
from .machine import Machine
from .work import Work, stage_layers, states_bytes

WORKING_FACTOR = 16
"""Bytes that a forward needs in addition to the weights, per token, feature and byte of dtype. Measured: 13.5, with 5b at
49x480x720 in bf16 on an H200, for batches of one and two (benchmarks/results)."""
SPLIT_FACTOR = 8
"""The part of ``WORKING_FACTOR`` that ``tensor`` splits: the feed-forward's hidden features, which are four times the features, before and
after GELU."""
COMPILED_FACTOR = 8.7
"""``WORKING_FACTOR`` of compiled blocks: 8.3 (5b), 10.7 (2b), 8.5 (``cfg2``) in h100x2-before.json."""
EXCHANGED_FACTOR = 3
"""Addition for Ulysses' exchanges: ``ulysses2`` needs 0.3 (5b) to 4 (2b) in h200x2-2026-11-28.json."""
RING_FACTOR = 11.5
"""Addition for a ring, whose results are merged in float32: ``ring2`` of h100x2-waiting.json, 10.3 (5b), 14 (2b)."""
WORKSPACE = 192 * 2**20
"""Bytes of cuBLAS and of tables, independent of the video's size: what the rows of 2b in h100x2-before.json need in excess of what those
of 5b suggest, and cuBLAS's 32 MiB for the stream on which blocks are compiled while weights are read."""
FP8_WORKSPACE = 320 * 2**20
"""Addition for FP8: 0.33 GiB (``cfg2`` of 2b) to 0.46 (``single`` of 5b) in h100x2.json."""
ROUNDED_FEATURES = 4
"""Features of the largest input that a layer in int8 rounds to a copy, relative to the model's: the feed-forward's hidden ones."""
GATHERED = 3
"""Blocks held whole at once under ``fsdp``: the running one, and the next one twice, as received and as unpacked."""
HEADROOM = 0.9
"""Share of free memory that can be used; the rest is lost to fragmentation and the allocator."""


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a plan."""

    plan: Plan
    seconds: float
    """Seconds of one step."""
    peak: int
    """Peak bytes on each rank."""
    needed: int
    """Bytes that must be free on each rank: the peak, or what the engine requires if that is more, divided by ``HEADROOM``."""
    sent: float
    """Bytes that a rank sends in one step."""
    fits: bool
    rounds: int = 1
    """How often a step runs, one run after the other, for all requested videos."""

    @property
    def total(self) -> float:
        """Seconds of a step of all requested videos."""
        return self.seconds * self.rounds


def predict(plan: Plan, work: Work, machine: Machine) -> Prediction:
    """Predicts the seconds of a step and the bytes on each rank."""
    waiting, sent = communication(plan, work, machine)
    weights = weight_bytes(plan, work)
    peak = weights + working_bytes(plan, work, compiled=work.is_compiled(machine)) + workspace_bytes(plan, work)
    needed = int(max(peak, weights + working_bytes(plan, work)) / HEADROOM)
    return Prediction(
        plan,
        seconds=work.windows * (computation(plan, work, machine) + waiting) + vae_seconds(plan, work, machine),
        peak=peak,
        needed=needed,
        sent=work.windows * sent,
        fits=machine.free is None or needed <= machine.free,
    )


def weight_bytes(plan: Plan, work: Work) -> int:
    """Returns the bytes of the transformer's weights that each rank keeps."""
    blocks = (work.vectors + work.matrices // plan.tensor) * stage_layers(plan, work.layers) // work.layers
    return work.rest + blocks // plan.fsdp


def workspace_bytes(plan: Plan, work: Work) -> int:
    """Returns the bytes that kernels need for themselves."""
    if work.quantize == "int8":
        return WORKSPACE + int(ROUNDED_FEATURES * states_bytes(plan, work) / work.itemsize / plan.tensor)
    return WORKSPACE + (FP8_WORKSPACE if work.quantize == "fp8" else 0)


def working_bytes(plan: Plan, work: Work, *, compiled: bool = False) -> int:
    """Returns the bytes that a forward needs in addition to the weights: what the engine requires, or less if ``compiled``."""
    states = (working_factor(plan, compiled=compiled) + kept_factor(plan, work.layers)) * states_bytes(plan, work)
    gathered = GATHERED * (work.vectors + work.matrices // plan.tensor) // work.layers if plan.fsdp > 1 else 0
    return int(states) + gathered


def working_factor(plan: Plan, *, compiled: bool = False) -> float:
    """Returns a forward's bytes in addition to the weights, per token, feature and byte of dtype.

    ``compiled`` returns what compiled blocks use; else the result is enough for blocks of both kinds.
    """
    exchanged = RING_FACTOR if plan.ring > 1 else EXCHANGED_FACTOR * (plan.ulysses > 1)
    used = COMPILED_FACTOR * (1 + 1 / plan.tensor) / 2 + exchanged
    return used if compiled else max(used, WORKING_FACTOR - SPLIT_FACTOR + SPLIT_FACTOR / plan.tensor)


def kept_factor(plan: Plan, layers: int) -> int:
    """Returns the bytes of the keys and values that each window keeps, per token, feature and byte of dtype."""
    return 2 * stage_layers(plan, layers) if plan.pipefusion > 1 else 0
