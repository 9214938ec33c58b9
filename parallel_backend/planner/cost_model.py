"""The cost model: seconds and bytes of one step on each rank, from operations, bytes and messages. Importable without torch.

Each constant names the measurement that it comes from: NOTES is benchmarks/NOTES.md, FACTS is the project's table of speed (one H200),
``h100x2*.json`` are in benchmarks/results. A constant that was not measured is marked as assumed.
"""

from dataclasses import dataclass

from ..plan import Plan
from .machine import Link, Machine

MATRIX_SHARE = 0.94
"""Share of a large product's rate that products reach in a step: 745 of 790 TFLOP/s (NOTES: where a half goes; FACTS)."""
ATTENTION_SHARE = 0.88
"""Share of one attention's rate that attention reaches in a step: 572 of 651 TFLOP/s on an H100 (NOTES), 503 of 571 with
FlashAttention-3."""
BANDWIDTH_SHARE = 0.78
"""Share of the memory's bandwidth that kernels reach: 32 ms where moving the bytes once takes 25 (NOTES: where a half goes)."""
PASSES = 26
"""How often compiled kernels other than products and attention read or write tokens x features in a block: these are the 25 ms."""
EAGER_PASSES = 176
"""``PASSES`` without compilation: 0.19 s more for each half of guidance (NOTES: 0.774 and 0.581 s)."""
ULYSSES_PASSES = 10
"""Additional passes with Ulysses: packing, copying the rank's own part, unpacking; counted in ``parallel/attention.py``."""
MERGE_PASSES, MERGE_SECONDS = 24, 1.1e-3
"""Additional passes for each rank's keys in a ring, as results are merged in float32, uncompiled; counted in xDiT's code. And the
additional seconds of each in a block: ``ring2`` of 2b in h100x2.json, and of 5b in h100x2-waiting.json."""
PATCH_SECONDS = 0.65e-3
"""Additional seconds of each patch of a pipeline in each block, as its kernels are small: between ``pipefusion2`` of 2b in h100x2.json
(0.55 ms) and of 5b in h100x2-flash3.json (0.9)."""
LAUNCH_SECONDS = 1.1e-3
"""Seconds in which the host launches a block's kernels; they count only where the device takes less: 0.8 to 1.4 ms (NOTES). The same is
assumed for each exchange in a block; with two GPUs the device never took less."""
ULYSSES_EXPOSED, COPIED = 0.5, 60e9
"""Share of Ulysses' transfers that attention cannot hide where ranks write into each other's memory: the first of two parts, and the
results of the last. And the bandwidth from which links are assumed to allow such writes."""
RING_EXPOSED = 0.5
"""Share of a ring's messages that attention cannot hide: in FACTS, Ring 2 is as fast as Ulysses 2 in xDiT's pipeline."""
FSDP_EXPOSED = 0.2
"""Share of gathered weights that the previous block cannot hide: assumed."""
OUTPUT_FEATURES = 64
"""Features of an output token: 16 channels of 2 x 2."""

WORKING_FACTOR = 16
"""Bytes that a forward needs in addition to the weights, per token, feature and byte of dtype. Measured: 13.5, with 5b at
49x480x720 in bf16 on an H200, for batches of one and two (benchmarks/results)."""
SPLIT_FACTOR = 8
"""The part of ``WORKING_FACTOR`` that ``tensor`` splits: the feed-forward's hidden features, which are four times the features, before and
after GELU."""
COMPILED_FACTOR = 8.7
"""``WORKING_FACTOR`` of compiled blocks: 8.3 (5b), 10.7 (2b), 8.5 (``cfg2``) in h100x2-before.json."""
EXCHANGED_FACTOR = 5
"""Addition for Ulysses' exchanges: ``ulysses2`` of h100x2-before.json."""
RING_FACTOR = 11.5
"""Addition for a ring, whose results are merged in float32: ``ring2`` of h100x2-waiting.json, 10.3 (5b), 14 (2b)."""
WORKSPACE = 192 * 2**20
"""Bytes of cuBLAS and of tables, independent of the video's size: what the rows of 2b in h100x2-before.json need in excess of what those
of 5b suggest, and cuBLAS's 32 MiB for the stream on which blocks are compiled while weights are read."""
FP8_WORKSPACE = 320 * 2**20
"""Addition for FP8: 0.33 GiB (``cfg2`` of 2b) to 0.46 (``single`` of 5b) in h100x2.json."""
GATHERED = 3
"""Blocks held whole at once under ``fsdp``: the running one, and the next one twice, as received and as unpacked."""
PATCHES, PATCHES_PER_STAGE = 8, 2
"""Patches of a sequence under ``pipefusion``, and patches for each stage; the larger number counts. With more patches the pipeline's
bubble is smaller, but more keys come from the previous step."""
KEPT_PASSES = 4
"""Additional passes under ``pipefusion``: keys and values are kept, so they are read and written once more."""
HEADROOM = 0.9
"""Share of free memory that can be used; the rest is lost to fragmentation and the allocator."""


@dataclass(frozen=True)
class Work:
    """One step of a job, for all prompts."""

    layers: int
    heads: int
    head_dim: int
    tokens: int
    """Text and video tokens of one prompt."""
    prompts: int
    """Two for each video with guidance, else one."""
    itemsize: int
    """Bytes per element of the compute dtype."""
    matrices: int
    """Bytes of the matrices of all blocks as they are stored, in FP8 if that is used."""
    vectors: int
    """Bytes of the other weights of all blocks."""
    rest: int
    """Bytes of the weights outside the blocks."""
    guided: bool = True
    """Whether each step runs the model on both prompts."""
    dtype: str = "bf16"
    fp8: str = "off"
    """``off``, ``linears`` or ``all``."""
    compile: str = "auto"
    """``auto``, ``on`` or ``off``."""

    @property
    def videos(self) -> int:
        """Videos that are sampled together."""
        return self.prompts // (2 if self.guided else 1)

    @property
    def features(self) -> int:
        """Features of one token."""
        return self.heads * self.head_dim

    @property
    def products(self) -> float:
        """Floating-point operations of a step's matrix products."""
        return 24 * self.tokens * self.features**2 * self.layers * self.prompts

    @property
    def attention(self) -> float:
        """Floating-point operations of a step's attention."""
        return 4 * self.tokens**2 * self.features * self.layers * self.prompts

    def is_compiled(self, machine: Machine) -> bool:
        """Whether blocks run compiled on this machine."""
        return machine.compiles if self.compile == "auto" else self.compile == "on"


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
    weights, workspace = weight_bytes(plan, work), WORKSPACE + (FP8_WORKSPACE if work.fp8 != "off" else 0)
    peak = weights + working_bytes(plan, work, compiled=work.is_compiled(machine)) + workspace
    needed = int(max(peak, weights + working_bytes(plan, work)) / HEADROOM)
    return Prediction(
        plan,
        seconds=computation(plan, work, machine) + waiting,
        peak=peak,
        needed=needed,
        sent=sent,
        fits=machine.free is None or needed <= machine.free,
    )


def computation(plan: Plan, work: Work, machine: Machine) -> float:
    """Returns the seconds that the slowest rank computes in a step, the pipeline's bubble included."""
    matrix, attention = machine.matrix * MATRIX_SHARE, machine.attention * ATTENTION_SHARE
    if work.dtype == "fp16" and work.fp8 == "off" and machine.attention_fp16:  # products in FP8 return bf16
        attention = machine.attention_fp16 * ATTENTION_SHARE
    if work.fp8 != "off":
        matrix *= machine.matrix_fp8
    if work.fp8 == "all":
        attention *= machine.attention_fp8
    passes = PASSES if work.is_compiled(machine) else EAGER_PASSES
    passes *= (1 + 1 / plan.tensor) / 2  # tensor parallelism splits about half of the passes: heads and hidden features
    passes += ULYSSES_PASSES * (plan.ulysses > 1) + MERGE_PASSES * (plan.ring - 1) + KEPT_PASSES * (plan.pipefusion > 1)
    others = MERGE_SECONDS * plan.ring if plan.ring > 1 else 0.0
    others += PATCH_SECONDS * plan_patches(plan, work) if plan.pipefusion > 1 and work.is_compiled(machine) else 0.0
    layers = stage_layers(plan, work.layers)
    share = layers / work.layers / (plan.world_size // plan.pipefusion)  # the largest stage is the slowest
    device = (
        work.products * share / matrix
        + work.attention * share / attention
        + layers * passes * states_bytes(plan, work) / (machine.bandwidth * BANDWIDTH_SHARE)
        + layers * others
    )
    host = layers * (1 + cuts(plan)) * plan_patches(plan, work) * LAUNCH_SECONDS if work.is_compiled(machine) else 0.0
    return slots(plan, work) * max(device, host)


def patches(tokens: int, stages: int, ranks: int = 1) -> int:
    """Returns the number of patches that a sequence is split into for a pipeline.

    It is ``PATCHES`` or ``PATCHES_PER_STAGE`` for each stage, or less if there are fewer tokens: no patch is all padding.

    Args:
        tokens: text and video tokens of the sequence.
        stages: stages of the pipeline.
        ranks: ranks that share each patch.
    """
    length = -(-tokens // (max(PATCHES, PATCHES_PER_STAGE * stages) * ranks))
    return -(-tokens // (length * ranks))


def plan_patches(plan: Plan, work: Work) -> int:
    """Returns the number of patches of a step under a plan; 1 without a pipeline."""
    return patches(work.tokens, plan.pipefusion, plan.ulysses) if plan.pipefusion > 1 else 1


def slots(plan: Plan, work: Work) -> float:
    """Returns a step's time relative to a rank's own work: above 1 with a pipeline, as stages wait at its start and its end."""
    count = plan_patches(plan, work)
    return (count + plan.pipefusion - 1) / count


def stage_layers(plan: Plan, layers: int) -> int:
    """Returns the number of blocks of the largest stage."""
    return -(-layers // plan.pipefusion)


def cuts(plan: Plan) -> int:
    """Returns how often ranks exchange data in a block."""
    return 2 * (plan.tensor > 1) + (plan.ring if plan.ring > 1 else plan.ulysses > 1 or plan.pipefusion > 1)


def communication(plan: Plan, work: Work, machine: Machine) -> tuple[float, float]:
    """Returns the seconds that a rank waits for others in a step, and the bytes that it sends."""
    states, layers = states_bytes(plan, work), stage_layers(plan, work.layers)
    count, waits = plan_patches(plan, work), slots(plan, work)
    rounded = 1 / work.itemsize if work.fp8 == "all" and machine.attention_fp8 > 1 else 1.0  # size of queries and keys
    attending = work.attention / plan.world_size / (machine.attention * ATTENTION_SHARE) / work.layers
    seconds, sent = 0.0, 0.0

    def send(size: float, link: Link, times: int, exchanges: int = 1, exposed: float = 1.0, behind: float = 0.0) -> None:
        nonlocal seconds, sent
        lasts = size / link.bandwidth
        seconds += times * (max(lasts - behind, exposed * lasts) + exchanges * link.latency)
        sent += times * size

    if plan.ulysses > 1:  # all-to-all: queries, keys and values there, results back
        tensors = (2 * rounded if plan.ring == 1 else 2) + 2
        spans = within(machine, plan, plan.tensor, plan.ulysses)
        away = (plan.ulysses - 1) / plan.ulysses
        copied = plan.ring == plan.pipefusion == 1 and spans == machine.link and spans.bandwidth >= COPIED
        exposed, behind = (ULYSSES_EXPOSED, attending / 2) if copied else (1.0, 0.0)
        send(tensors * states / plan.tensor * away, spans, layers, exchanges=2 * count, exposed=exposed, behind=behind)
        seconds *= waits
    if plan.pipefusion > 1:  # each patch once to the next stage, while that computes the previous patch
        working = computation(plan, work, machine) / (waits * count)
        spans = within(machine, plan, plan.tensor * plan.sequence, plan.pipefusion)
        send(states / count, spans, count, behind=working, exposed=0)
        seconds += (plan.pipefusion - 1) * states / count / spans.bandwidth  # the first patch is not hidden
    if plan.ring > 1:  # keys and values of all other ranks, while attending to the previous ones
        spans = within(machine, plan, plan.tensor * plan.ulysses, plan.ring)
        size = 2 * states / plan.tensor * (plan.ring - 1)
        hidden = attending * (plan.ring - 1) / plan.ring
        send(size, spans, work.layers, exchanges=plan.ring - 1, exposed=RING_EXPOSED, behind=hidden)
    if plan.tensor > 1:  # all-reduce: results of attention and feed-forward
        size = 2 * 2 * states * (plan.tensor - 1) / plan.tensor
        send(size, within(machine, plan, 1, plan.tensor), work.layers, exchanges=2)
    if plan.fsdp > 1:  # all-gather: the next block's weights, while this one runs
        block = (work.vectors + work.matrices // plan.tensor) / work.layers
        running = computation(plan, work, machine) / work.layers
        away = (plan.fsdp - 1) / plan.fsdp
        spans = within(machine, plan, plan.tensor, plan.fsdp)
        send(block * away, spans, work.layers, exposed=FSDP_EXPOSED, behind=running)
    output = OUTPUT_FEATURES / work.features * states
    if plan.sequence > 1:
        send(output * (plan.sequence - 1), within(machine, plan, plan.tensor, plan.sequence), 1)
    if plan.pipefusion > 1:  # from the last stage to all others
        send(output, within(machine, plan, plan.tensor * plan.sequence, plan.pipefusion), 1)
    if plan.cfg > 1:
        stride = plan.tensor * plan.sequence * plan.pipefusion
        send(output * plan.sequence, within(machine, plan, stride, plan.cfg), 1)
    return seconds, sent


def within(machine: Machine, plan: Plan, stride: int, degree: int) -> Link:
    """Returns the slowest link between the ranks of a group.

    Args:
        machine, plan: where the ranks are. From the innermost, ranks are ordered by tensor, ulysses, ring, pipefusion, cfg.
        stride: distance between neighbours in the group, in ranks.
        degree: ranks in the group.
    """
    if plan.world_size <= machine.per_machine or machine.per_machine % (stride * degree) == 0:
        return machine.link
    return machine.network


def states_bytes(plan: Plan, work: Work) -> float:
    """Returns the bytes of the hidden states of a rank's prompts and tokens."""
    return work.prompts / plan.cfg * work.tokens / plan.sequence * work.features * work.itemsize


def weight_bytes(plan: Plan, work: Work) -> int:
    """Returns the bytes of the transformer's weights that each rank keeps."""
    blocks = (work.vectors + work.matrices // plan.tensor) * stage_layers(plan, work.layers) // work.layers
    return work.rest + blocks // plan.fsdp


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
