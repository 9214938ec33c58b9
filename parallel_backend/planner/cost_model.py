"""What a step costs: seconds and bytes on each rank, from operations, bytes and messages. Importable without torch.

Constants say which measurement they come from: NOTES is benchmarks/NOTES.md, FACTS is the project's table of speed (one H200),
``h100x2*.json`` are in benchmarks/results. What was not measured here is marked as assumed.
"""

from dataclasses import dataclass

from ..plan import Plan
from .machine import Link, Machine

MATRIX_SHARE = 0.94
"""Of a large product's rate, what products reach in a step: 745 of 790 TFLOP/s (NOTES: where a half goes; FACTS)."""
ATTENTION_SHARE = 0.88
"""Of one attention's rate, what attention reaches in a step: 572 of 651 TFLOP/s on an H100 (NOTES), 503 of 571 with FlashAttention-3."""
BANDWIDTH_SHARE = 0.78
"""Of the memory's rate: 32 ms where moving the bytes once takes 25 (NOTES: where a half goes)."""
PASSES = 26
"""Times that compiled kernels read or write tokens x features a block, beside products and attention: those 25 ms."""
EAGER_PASSES = 176
"""The same uncompiled: 0.19 s a half more (NOTES: 0.774 and 0.581 s)."""
ULYSSES_PASSES = 10
"""More of them with Ulysses: laying out, own part, and back; counted in ``parallel/attention.py``."""
MERGE_PASSES, MERGE_SECONDS = 24, 1.1e-3
"""More of them for each rank's keys in a ring, whose results are merged in float32, uncompiled; counted in xDiT's code. And what each
takes beside them in a block: ``ring2`` of 2b in h100x2.json, and of 5b in h100x2-waiting.json."""
PATCH_SECONDS = 0.65e-3
"""For each patch of a pipeline in each block, whose kernels are small: between ``pipefusion2`` of 2b in h100x2.json (0.55 ms) and of
5b in h100x2-flash3.json (0.9)."""
LAUNCH_SECONDS = 1.1e-3
"""That the host takes to ask for a block, which the device does not wait for unless it is done sooner: 0.8 to 1.4 ms (NOTES). As much is
assumed for each exchange in it; with two GPUs the device was never done sooner."""
ULYSSES_EXPOSED, COPIED = 0.5, 60e9
"""Of what Ulysses sends, what attention cannot hide where ranks write into each other's memory, which is assumed of links as fast as
that: the first of two parts, and the results of the last."""
RING_EXPOSED = 0.5
"""Of a ring's messages, what attention cannot hide: FACTS has Ring 2 as fast as Ulysses 2 in xDiT's pipeline."""
FSDP_EXPOSED = 0.2
"""Of gathered weights, what the block before cannot hide: assumed."""
OUTPUT_FEATURES = 64
"""Numbers in a token of the prediction: 16 channels of 2 x 2."""

WORKING_FACTOR = 16
"""Bytes a forward needs beside the weights, per token, feature and byte of dtype. Measured: 13.5, with 5b at
49x480x720 in bf16 on an H200, for batches of one and two (benchmarks/results)."""
SPLIT_FACTOR = 8
"""Of these, the bytes of hidden features, four times as many and twice, before GELU and after: ``tensor`` splits them."""
COMPILED_FACTOR = 8.7
"""What compiled blocks need of ``WORKING_FACTOR``'s 16: 8.3 (5b), 10.7 (2b), 8.5 (``cfg2``) in h100x2-before.json."""
EXCHANGED_FACTOR = 5
"""More where tokens are exchanged for attention: ``ulysses2`` of h100x2-before.json."""
RING_FACTOR = 11.5
"""More where keys and values go around a ring, whose results are merged in float32: ``ring2`` of h100x2-waiting.json, 10.3 (5b), 14 (2b)."""
WORKSPACE = 192 * 2**20
"""Bytes of cuBLAS and of tables, whatever the size: what the rows of 2b in h100x2-before.json need more than those of 5b let
expect, and cuBLAS's 32 MiB of the stream on which blocks are compiled while weights are read."""
FP8_WORKSPACE = 320 * 2**20
"""More in FP8: 0.33 GiB (``cfg2`` of 2b) to 0.46 (``single`` of 5b) in h100x2.json."""
GATHERED = 3
"""Blocks that are whole at once under ``fsdp``: the one that runs, and the next one, as it arrives and once it is sorted."""
PATCHES, PATCHES_PER_STAGE = 8, 2
"""Of a sequence under ``pipefusion``, the greater of both: with more of them stages wait less for the first and last patch, but
more keys are of the step before."""
KEPT_PASSES = 4
"""More of ``PASSES`` under ``pipefusion``: keys and values are read and written once more, to be kept."""
HEADROOM = 0.9
"""Share of free memory that is counted on; the rest is fragmentation and the allocator's."""


@dataclass(frozen=True)
class Work:
    """One step of a job: its numbers and bytes, for all prompts."""

    layers: int
    heads: int
    head_dim: int
    tokens: int
    """Of text and video, of one prompt."""
    prompts: int
    """Two for each video with guidance, else one."""
    itemsize: int
    """Bytes of the dtype to compute in."""
    matrices: int
    """Bytes of all blocks' matrices, as they are stored: FP8 where asked for."""
    vectors: int
    """Bytes of all blocks' other weights."""
    rest: int
    """Bytes of the weights outside of blocks."""
    guided: bool = True
    """Whether there are two halves of guidance to share."""
    dtype: str = "bf16"
    fp8: str = "off"
    """``off``, ``linears`` or ``all``."""
    compile: str = "auto"
    """``auto``, ``on`` or ``off``."""

    @property
    def videos(self) -> int:
        """That are sampled together."""
        return self.prompts // (2 if self.guided else 1)

    @property
    def features(self) -> int:
        """Of one token."""
        return self.heads * self.head_dim

    @property
    def products(self) -> float:
        """Operations of a step's matrix products."""
        return 24 * self.tokens * self.features**2 * self.layers * self.prompts

    @property
    def attention(self) -> float:
        """Operations of a step's attention."""
        return 4 * self.tokens**2 * self.features * self.layers * self.prompts

    def is_compiled(self, machine: Machine) -> bool:
        """Whether blocks run compiled."""
        return machine.compiles if self.compile == "auto" else self.compile == "on"


@dataclass(frozen=True)
class Prediction:
    """What a plan is predicted to cost."""

    plan: Plan
    seconds: float
    """Of one step."""
    peak: int
    """Bytes on each rank."""
    needed: int
    """Bytes that must be free on each rank: the peak, or what the engine asks for where that is more, and ``HEADROOM``."""
    sent: float
    """Bytes that a rank sends in one step."""
    fits: bool
    rounds: int = 1
    """Times that a step is run, one after the other, for all videos asked for."""

    @property
    def total(self) -> float:
        """Seconds of a step of all videos asked for."""
        return self.seconds * self.rounds


def predict(plan: Plan, work: Work, machine: Machine) -> Prediction:
    """Seconds of a step and bytes on each rank."""
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
    """Seconds that a rank computes in a step."""
    matrix, attention = machine.matrix * MATRIX_SHARE, machine.attention * ATTENTION_SHARE
    if work.dtype == "fp16" and work.fp8 == "off" and machine.attention_fp16:  # what comes out of products in FP8 is bf16
        attention = machine.attention_fp16 * ATTENTION_SHARE
    if work.fp8 != "off":
        matrix *= machine.matrix_fp8
    if work.fp8 == "all":
        attention *= machine.attention_fp8
    passes = PASSES if work.is_compiled(machine) else EAGER_PASSES
    passes *= (1 + 1 / plan.tensor) / 2  # about half of it is with heads and hidden features
    passes += ULYSSES_PASSES * (plan.ulysses > 1) + MERGE_PASSES * (plan.ring - 1) + KEPT_PASSES * (plan.pipefusion > 1)
    others = MERGE_SECONDS * plan.ring if plan.ring > 1 else 0.0
    others += PATCH_SECONDS * plan_patches(plan, work) if plan.pipefusion > 1 and work.is_compiled(machine) else 0.0
    layers = stage_layers(plan, work.layers)
    share = layers / work.layers / (plan.world_size // plan.pipefusion)  # of the slowest rank
    device = (
        work.products * share / matrix
        + work.attention * share / attention
        + layers * passes * states_bytes(plan, work) / (machine.bandwidth * BANDWIDTH_SHARE)
        + layers * others
    )
    host = layers * (1 + cuts(plan)) * plan_patches(plan, work) * LAUNCH_SECONDS if work.is_compiled(machine) else 0.0
    return slots(plan, work) * max(device, host)


def patches(tokens: int, stages: int, ranks: int = 1) -> int:
    """Patches that a sequence of text and video is cut into for a pipeline, each over so many ranks: ``PATCHES``, or
    ``PATCHES_PER_STAGE`` a stage, or fewer where there are not so many tokens; none of them is all padding."""
    length = -(-tokens // (max(PATCHES, PATCHES_PER_STAGE * stages) * ranks))
    return -(-tokens // (length * ranks))


def plan_patches(plan: Plan, work: Work) -> int:
    """Patches of a step under a plan."""
    return patches(work.tokens, plan.pipefusion, plan.ulysses) if plan.pipefusion > 1 else 1


def slots(plan: Plan, work: Work) -> float:
    """How many times as long as a rank's own work a step takes: stages wait for the first patch to come, or the last to be through."""
    count = plan_patches(plan, work)
    return (count + plan.pipefusion - 1) / count


def stage_layers(plan: Plan, layers: int) -> int:
    """Blocks of the stage that has most of so many."""
    return -(-layers // plan.pipefusion)


def cuts(plan: Plan) -> int:
    """Places in a block where ranks exchange something."""
    return 2 * (plan.tensor > 1) + (plan.ring if plan.ring > 1 else plan.ulysses > 1 or plan.pipefusion > 1)


def communication(plan: Plan, work: Work, machine: Machine) -> tuple[float, float]:
    """Seconds that a rank waits for others in a step, and bytes that it sends."""
    states, layers = states_bytes(plan, work), stage_layers(plan, work.layers)
    count, waits = plan_patches(plan, work), slots(plan, work)
    rounded = 1 / work.itemsize if work.fp8 == "all" and machine.attention_fp8 > 1 else 1.0  # queries and keys
    attending = work.attention / plan.world_size / (machine.attention * ATTENTION_SHARE) / work.layers
    seconds, sent = 0.0, 0.0

    def send(size: float, link: Link, times: int, exchanges: int = 1, exposed: float = 1.0, behind: float = 0.0) -> None:
        nonlocal seconds, sent
        lasts = size / link.bandwidth
        seconds += times * (max(lasts - behind, exposed * lasts) + exchanges * link.latency)
        sent += times * size

    if plan.ulysses > 1:  # queries, keys and values there, and results back
        tensors = (2 * rounded if plan.ring == 1 else 2) + 2
        spans = within(machine, plan, plan.tensor, plan.ulysses)
        away = (plan.ulysses - 1) / plan.ulysses
        copied = plan.ring == plan.pipefusion == 1 and spans == machine.link and spans.bandwidth >= COPIED
        exposed, behind = (ULYSSES_EXPOSED, attending / 2) if copied else (1.0, 0.0)
        send(tensors * states / plan.tensor * away, spans, layers, exchanges=2 * count, exposed=exposed, behind=behind)
        seconds *= waits
    if plan.pipefusion > 1:  # each patch once to the next stage, while that works on the one before
        working = computation(plan, work, machine) / (waits * count)
        spans = within(machine, plan, plan.tensor * plan.sequence, plan.pipefusion)
        send(states / count, spans, count, behind=working, exposed=0)
        seconds += (plan.pipefusion - 1) * states / count / spans.bandwidth  # of the first one
    if plan.ring > 1:  # keys and values of all others, while attending to those before
        spans = within(machine, plan, plan.tensor * plan.ulysses, plan.ring)
        size = 2 * states / plan.tensor * (plan.ring - 1)
        hidden = attending * (plan.ring - 1) / plan.ring
        send(size, spans, work.layers, exchanges=plan.ring - 1, exposed=RING_EXPOSED, behind=hidden)
    if plan.tensor > 1:  # results of attention and feed-forward are added up
        size = 2 * 2 * states * (plan.tensor - 1) / plan.tensor
        send(size, within(machine, plan, 1, plan.tensor), work.layers, exchanges=2)
    if plan.fsdp > 1:  # the next block's weights, while this one runs
        block = (work.vectors + work.matrices // plan.tensor) / work.layers
        running = computation(plan, work, machine) / work.layers
        away = (plan.fsdp - 1) / plan.fsdp
        spans = within(machine, plan, plan.tensor, plan.fsdp)
        send(block * away, spans, work.layers, exposed=FSDP_EXPOSED, behind=running)
    output = OUTPUT_FEATURES / work.features * states
    if plan.sequence > 1:
        send(output * (plan.sequence - 1), within(machine, plan, plan.tensor, plan.sequence), 1)
    if plan.pipefusion > 1:  # from the last stage to all
        send(output, within(machine, plan, plan.tensor * plan.sequence, plan.pipefusion), 1)
    if plan.cfg > 1:
        stride = plan.tensor * plan.sequence * plan.pipefusion
        send(output * plan.sequence, within(machine, plan, stride, plan.cfg), 1)
    return seconds, sent


def within(machine: Machine, plan: Plan, stride: int, degree: int) -> Link:
    """The slowest link that ranks of a group use, which lie so far apart: tensor, ulysses, ring, pipefusion and cfg from the inside."""
    if plan.world_size <= machine.per_machine or machine.per_machine % (stride * degree) == 0:
        return machine.link
    return machine.network


def states_bytes(plan: Plan, work: Work) -> float:
    """Bytes of tokens x features of the prompts and tokens that a rank has."""
    return work.prompts / plan.cfg * work.tokens / plan.sequence * work.features * work.itemsize


def weight_bytes(plan: Plan, work: Work) -> int:
    """Bytes of the transformer's weights that each rank keeps."""
    blocks = (work.vectors + work.matrices // plan.tensor) * stage_layers(plan, work.layers) // work.layers
    return work.rest + blocks // plan.fsdp


def working_bytes(plan: Plan, work: Work, *, compiled: bool = False) -> int:
    """Bytes beside the weights: what the engine asks for, or what ``compiled`` blocks use of it."""
    states = (working_factor(plan, compiled=compiled) + kept_factor(plan, work.layers)) * states_bytes(plan, work)
    gathered = GATHERED * (work.vectors + work.matrices // plan.tensor) // work.layers if plan.fsdp > 1 else 0
    return int(states) + gathered


def working_factor(plan: Plan, *, compiled: bool = False) -> float:
    """Bytes beside the weights, per token, feature and byte of dtype; enough for compiled blocks too where it is not known."""
    exchanged = RING_FACTOR if plan.ring > 1 else EXCHANGED_FACTOR * (plan.ulysses > 1)
    used = COMPILED_FACTOR * (1 + 1 / plan.tensor) / 2 + exchanged
    return used if compiled else max(used, WORKING_FACTOR - SPLIT_FACTOR + SPLIT_FACTOR / plan.tensor)


def kept_factor(plan: Plan, layers: int) -> int:
    """Bytes of kept keys and values, per token, feature and byte of dtype; once for each window."""
    return 2 * stage_layers(plan, layers) if plan.pipefusion > 1 else 0
