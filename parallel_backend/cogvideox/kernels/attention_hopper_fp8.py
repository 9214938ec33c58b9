"""The kernels of :mod:`parallel_backend.cogvideox.attention.hopper_fp8`: attention with both products in e4m3, on Hopper.

Imported only if Triton is installed.

The bits of an e4m3 number are nearly its logarithm: they are ``8 * (exponent + 7) + mantissa``, and those of ``2 ** x`` are
about ``8 * x + 56``. So probabilities need no exponentials: the first product gives scores as two fp16 per register, and two
instructions per pair turn them into e4m3 bits. Valid bits are 0 to 126, so the saturating product clamps for free. The linear
approximation makes probabilities up to 6 % too small or large, about as much as rounding to e4m3 (Schraudolph's exponential,
1999, with fewer bits).

Probabilities are ``2 ** (score - reference)``. Each row's reference is below its largest score over the neighbouring tokens and
the first tile. Rows whose probabilities approach e4m3's largest number, 448, are recomputed. Alternatively their reference is
raised, which requires a check per tile.

After the first product a thread has columns ``8 b + 2 lane + a`` of every 16. The second product needs columns
``4 lane + 2 b + a`` from it. The order of keys does not change a sum, so values are stored in that order; see
:func:`key_at`.
"""

import struct

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .attention_hopper import GROUPS, KEYS, LN_2, ROWS, STAGES, largest_near, load, make_barriers

START, START_IF_RAISED, RAISED = tl.constexpr(1.0), tl.constexpr(4.0), tl.constexpr(7.0)
"""Log of the largest known probability at the start: if references are fixed, and if they can be raised. The last is the log of
the largest probability, or a thread's sum, after a reference is raised."""
NEAR_LARGEST = tl.constexpr(448.0)
"""A thread's sum of a row from which on one of its probabilities may have been clamped to e4m3's largest number."""
FARTHEST = tl.constexpr(100.0)
"""References beyond which fp16 is too coarse for scores; such rows are recomputed."""
NOTHING = tl.constexpr(-30000.0)
"""Score of masked keys; finite in fp16, so that differences are not NaN."""
CODES = tl.constexpr(126)
"""Bits of the largest number."""
SLOPE = tl.constexpr(0.0634765625)
"""``8 / CODES`` rounded to fp16."""
LINEAR_BIAS = tl.constexpr(0.0397)
"""Mean of the log of ``(1 + x) / 2 ** x`` for x from 0 to 1: by how much the approximation overestimates sums of
probabilities."""


def both(number: float) -> str:
    """Returns the bits of a register with the same fp16 twice."""
    bits = int.from_bytes(struct.pack("<e", number), "little")
    return f"0x{bits << 16 | bits:08x}"


def straight(word: str, score: str) -> str:
    """Returns PTX for the bits of ``2 ** score`` in linear approximation, in the lower byte of each half."""
    return f"fma.rn.sat.f16x2 {word}, {score}, slope, $3; fma.rn.f16x2 {word}, {word}, codes, whole;"


MOVES = " ".join(
    f"mov.b32 {name}, {both(number)};" for name, number in (("slope", SLOPE.value), ("codes", CODES.value), ("whole", 1024))
)
STRAIGHT = tl.constexpr(
    f"{{ .reg .b32 first, second, slope, codes, whole; {MOVES} {straight('first', '$1')} {straight('second', '$2')} "
    "prmt.b32 $0, first, second, 0x6420; }"
)
"""PTX: converts four scores ``$1, $2`` of a row, with the shift ``$3``, to bits."""
ADD = tl.constexpr("add.rn.f16x2 $0, $1, $2;")
DECODE_AND_ADD = tl.constexpr(
    """{
        .reg .b16 a, b, c, d; .reg .b32 first, second;
        mov.b32 {a, b}, $2; mov.b32 {c, d}, $3;
        cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; cvt.rn.f16x2.e4m3x2 first, c; cvt.rn.f16x2.e4m3x2 second, d;
        add.rn.f16x2 $0, $0, first; add.rn.f16x2 $1, $1, second;
    }"""
)


@gluon.jit
def left_and_right(values):
    """Splits the columns in half, without exchanging data between threads."""
    return values.reshape([values.shape[0], 2, values.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def add_words(left, right):
    """Adds pairs of fp16."""
    return gl.inline_asm_elementwise(ADD, "=r,r,r", [left, right], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def add_codes(codes):
    """Sums e4m3 bits ``[rows, columns]`` to ``[rows, 4]`` in float32, without exchanging data between threads."""
    rows: gl.constexpr = codes.shape[0]
    left, right = left_and_right(codes)
    sums = gl.inline_asm_elementwise(DECODE_AND_ADD, "=&r,=&r,r,r", [left, right], dtype=gl.float16, is_pure=True, pack=4)
    for _ in gl.static_range(2):
        left, right = left_and_right(sums)
        sums = add_words(left, right)
    gl.static_assert(sums.shape[1] == 16)
    left, right = sums.reshape([rows, 4, 2, 2]).permute((0, 1, 3, 2)).split()
    left, right = add_words(left, right).to(gl.float32).split()
    return left + right


@gluon.jit
def to_words(codes):
    """Packs four bytes per word, ``[rows, columns / 4]``: otherwise a loop-carried byte would take a register."""
    even, odd = codes.reshape([codes.shape[0], codes.shape[1] // 4, 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    low = (first.to(gl.int32) & 255) | ((second.to(gl.int32) & 255) << 8)
    return low | ((third.to(gl.int32) & 255) << 16) | ((fourth.to(gl.int32) & 255) << 24)


@gluon.jit
def to_weights(words, weights_in: gl.constexpr):
    """Unpacks words to e4m3 numbers; takes no instruction."""
    twice = gl.join(words, words)
    each = gl.join(twice, twice).reshape([words.shape[0], 4 * words.shape[1]])
    codes = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [each], dtype=gl.int8, is_pure=True, pack=4)
    return gl.convert_layout(codes.to(gl.float8e4nv, bitcast=True), weights_in, assert_trivial=True)


@gluon.jit
def round_reference(reference):
    """Rounds to a number that ends in a half; NaN stays NaN."""
    return gl.floor(reference) + 0.5


@gluon.jit
def make_codes(scores, reference, weights_in: gl.constexpr):
    """Converts scores to probabilities, four per word in the order of the second product.

    Also returns sums of them, ``[rows, 4]``.
    """
    rows: gl.constexpr = scores.shape[0]
    columns: gl.constexpr = scores.shape[1]
    ordered = scores.reshape([rows, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([rows, columns])
    ordered = gl.convert_layout(ordered, weights_in, assert_trivial=True)
    shift = (56.0 / CODES - SLOPE * reference).to(gl.float16)[:, None]
    codes = gl.inline_asm_elementwise(STRAIGHT, "=r,r,r,r,r", [ordered, shift], dtype=gl.int8, is_pure=True, pack=4)
    return to_words(codes), add_codes(codes)


@gluon.jit
def multiply(words, values, like, weights_in: gl.constexpr):
    """Starts the second product of a tile, with a separate accumulator: the matrix unit's sums have only 14 bits."""
    return warpgroup_mma(
        to_weights(words, weights_in), values.permute((1, 0)), gl.zeros_like(like), use_acc=False, is_async=True
    )


@gluon.jit
def attend(
    result, log_sums, failed, scales, centers, query_room, near_room, key_room, value_room, barriers,
    row, rows, key_count, heads, tiles,
    GROUP: gl.constexpr, FEATURES: gl.constexpr, RAISES: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: attends from its rows to all keys."""
    loaded, keys_in, keys_out, values_in, values_out = barriers
    scores_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    sums_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    weights_in: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_in, k_width=4)
    rows_in: gl.constexpr = gl.SliceLayout(1, weights_in)
    query = query_room.index(GROUP)
    # Zero, but unknown to the compiler: the next product's operand must not be written before the previous product has read
    # its own.
    nought = heads >> 30
    nothing = gl.zeros([ROWS, KEYS], gl.float16, scores_in)
    sums = gl.zeros([ROWS, FEATURES], gl.float32, sums_in)

    mbarrier.wait(loaded, 0)
    mbarrier.wait(keys_in.index(0), 0)
    scores = warpgroup_mma(query, key_room.index(0).permute((1, 0)), nothing, use_acc=False)
    mbarrier.arrive(keys_out.index(0))
    there = gl.arange(0, KEYS, gl.SliceLayout(0, scores_in)) < key_count - (tiles - 1) * KEYS
    scores = gl.where(there[None, :], scores, NOTHING)
    largest = gl.convert_layout(gl.max(scores, 1).to(gl.float32), rows_in)
    largest = gl.maximum(largest, largest_near(query, near_room.index(GROUP), gl.float16, rows_in))
    reference = round_reference(largest - (START_IF_RAISED if RAISES else START))
    words, total = make_codes(scores, reference, weights_in)
    worst = total
    mbarrier.wait(keys_in.index(1 % STAGES), 1 // STAGES & 1, pred=tiles > 1)
    for tile in range(1, tiles):
        stage, before, after = tile % STAGES, (tile - 1) % STAGES, (tile + 1) % STAGES
        # Triton keeps two fp16 per register only for a synchronous product.
        scores = warpgroup_mma(query, key_room.index(stage).permute((1, 0)), nothing, use_acc=False)
        mbarrier.wait(values_in.index(before), (tile - 1) // STAGES & 1)
        part = multiply(words, value_room.index(before), sums, weights_in)
        words, added = make_codes(scores, reference, weights_in)
        # The branch in this wait keeps this tile's work before the next product, overlapping the running one.
        mbarrier.wait(keys_in.index(after), (tile + 1) // STAGES & 1, pred=tile + 1 < tiles)
        part, added, words = warpgroup_mma_wait(0, deps=[part, added, words])
        words ^= nought
        mbarrier.arrive(values_out.index(before))
        sums += part
        if RAISES:
            if gl.max(gl.max(added, 1), 0) >= NEAR_LARGEST:
                # Computes the scores again, as there are no registers to keep them in.
                scores = warpgroup_mma(query, key_room.index(stage).permute((1, 0)), nothing, use_acc=False)
                largest = gl.convert_layout(gl.max(scores, 1).to(gl.float32), rows_in)
                most = gl.convert_layout(gl.max(added, 1), rows_in)
                # If many are large but none is too large, raise by their sum, to avoid raising at each tile.
                crowd = gl.where(most >= NEAR_LARGEST, gl.ceil(gl.log2(most)) - RAISED, 0.0)
                now = gl.maximum(reference + crowd, round_reference(largest - RAISED))
                shrinks = gl.exp2(reference - now)
                reference = now
                words, added = make_codes(scores, reference, weights_in)
                total *= gl.convert_layout(shrinks, gl.SliceLayout(1, total.type.layout))[:, None]
                sums *= gl.convert_layout(shrinks, gl.SliceLayout(1, sums_in))[:, None]
        else:
            worst = gl.maximum(worst, added)
        mbarrier.arrive(keys_out.index(stage))
        total += added
    last = (tiles - 1) % STAGES
    mbarrier.wait(values_in.index(last), (tiles - 1) // STAGES & 1)
    part = warpgroup_mma_wait(0, deps=[multiply(words, value_room.index(last), sums, weights_in)])
    sums += part

    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, sums_in))
    reference = gl.convert_layout(reference, gl.SliceLayout(1, sums_in))
    at = row + gl.arange(0, ROWS, gl.SliceLayout(1, sums_in))
    # NaN compares as false, so it counts as failed.
    good = (total > 0) & (gl.abs(reference) < FARTHEST)
    if not RAISES:
        good = good & (gl.convert_layout(gl.max(worst, 1), gl.SliceLayout(1, sums_in)) < NEAR_LARGEST)
    gl.store(failed, gl.sum(gl.where(good | (at >= rows), 0, 1), 0))
    gl.store(log_sums + at, gl.log(total) + (reference * LN_2 - LINEAR_BIAS), mask=at < rows)
    column = gl.arange(0, FEATURES, gl.SliceLayout(0, sums_in))
    scale, center = gl.load(scales + column), gl.load(centers + column)
    places = result + at[:, None].to(gl.int64) * (heads * FEATURES) + column[None, :]
    found = sums / total[:, None] * scale[None, :] + center[None, :]
    gl.store(places, found.to(result.dtype.element_ty), mask=(at < rows)[:, None])


@gluon.jit
def fp8_kernel(
    queries, near, keys, values, result, log_sums, failed, scales, centers,
    query_count, key_rows, key_count, heads,
    FEATURES: gl.constexpr, RAISES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Attention in e4m3. A program has ``GROUPS * ROWS`` queries of one head of one sample.

    Args: as for :func:`.attention_hopper.optimistic_kernel`, except
        values: a descriptor of ``[batch * heads * features, tokens]`` from :func:`transpose_kernel`.
        scales, centers: of the values, ``[batch, heads, features]``.
        RAISES: whether references are raised; otherwise rows with too large probabilities fail.
    """
    tile, head, sample = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    query_room = gl.allocate_shared_memory(queries.dtype, [GROUPS, ROWS, FEATURES], queries.layout)
    near_room = gl.allocate_shared_memory(near.dtype, [GROUPS, ROWS, FEATURES], near.layout)
    key_room = gl.allocate_shared_memory(keys.dtype, [STAGES, KEYS, FEATURES], keys.layout)
    value_room = gl.allocate_shared_memory(values.dtype, [STAGES, FEATURES, KEYS], values.layout)
    barriers = make_barriers()
    of_head = sample * heads + head
    row, tiles, column = tile * (GROUPS * ROWS), gl.cdiv(key_count, KEYS), head * FEATURES
    result += (sample.to(gl.int64) * query_count * heads + head) * FEATURES
    log_sums += of_head * query_count
    failed += (of_head * gl.num_programs(0) + tile) * GROUPS
    scales += of_head * FEATURES
    centers += of_head * FEATURES
    gl.warp_specialize(
        [
            (attend, (result, log_sums, failed, scales, centers, query_room, near_room, key_room, value_room, barriers,
                      row, query_count, key_count, heads, tiles, 0, FEATURES, RAISES)),
            (attend, (result, log_sums, failed + 1, scales, centers, query_room, near_room, key_room, value_room, barriers,
                      row + ROWS, query_count, key_count, heads, tiles, 1, FEATURES, RAISES)),
            (attend, (result, log_sums, failed + 2, scales, centers, query_room, near_room, key_room, value_room, barriers,
                      row + 2 * ROWS, query_count, key_count, heads, tiles, 2, FEATURES, RAISES)),
            (load, (queries, near, keys, values, query_room, near_room, key_room, value_room, barriers,
                    (sample * query_count + row, sample * key_rows + row), sample * key_rows, column, of_head * FEATURES, tiles, True, True)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


@triton.jit
def key_at(place):
    """Returns the key whose value is at a place of the second product.

    Of every 16 places, ``4 lane + 2 b + a`` has key ``8 b + 2 lane + a``.
    """
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@triton.jit
def survey_kernel(
    values, found, count, heads, sample_stride, stride, FEATURES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Computes minimum, maximum and sum ``[3, features]`` over ``STEPS * ROWS`` tokens of a head, in ``found``."""
    part, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, FEATURES)
    values += sample.to(tl.int64) * sample_stride + head * FEATURES
    least = tl.full([ROWS, FEATURES], float("inf"), tl.float32)
    most = tl.full([ROWS, FEATURES], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        there = (row < count)[:, None]
        value = tl.load(values + row[:, None].to(tl.int64) * stride + column, mask=there, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.where(there, value, float("inf")))
        most = tl.maximum(most, tl.where(there, value, -float("inf")))
        total += value
    found += ((sample * heads + head) * tl.num_programs(0) + part) * 3 * FEATURES + column
    tl.store(found, tl.min(least, 0))
    tl.store(found + FEATURES, tl.max(most, 0))
    tl.store(found + 2 * FEATURES, tl.sum(total, 0))


@triton.jit
def settle_kernel(
    found, scales, centers, count, parts,
    FEATURES: tl.constexpr, PARTS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Computes a head's ``scales`` and ``centers`` from the parts ``found`` by :func:`survey_kernel`."""
    head, column, part = tl.program_id(0), tl.arange(0, FEATURES), tl.arange(0, PARTS)
    known = (part < parts)[:, None]
    found += (head * parts + part[:, None]) * 3 * FEATURES + column
    least = tl.min(tl.load(found, mask=known, other=float("inf")), 0)
    most = tl.max(tl.load(found + FEATURES, mask=known, other=-float("inf")), 0)
    center = tl.sum(tl.load(found + 2 * FEATURES, mask=known, other=0.0), 0) / count
    tl.store(scales + head * FEATURES + column, tl.maximum(tl.maximum(most - center, center - least), SMALLEST) / LARGEST)
    tl.store(centers + head * FEATURES + column, center)


@triton.jit
def transpose_kernel(
    values, result, scales, centers, count, heads, sample_stride, stride, places,
    FEATURES: tl.constexpr, KEYS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Converts values to e4m3 ``[batch, heads, features, places]``, padded with zeros.

    Keys are in the order of :func:`key_at`.

    Args:
        values: ``[batch, tokens, heads, features]``.
        scales, centers: ``[batch, heads, features]``.
    """
    tile, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head, column = sample * heads + head, tl.arange(0, FEATURES)
    factor = 1 / tl.load(scales + of_head * FEATURES + column)
    center = tl.load(centers + of_head * FEATURES + column)
    row = tile * KEYS + key_at(tl.arange(0, KEYS))
    there = (row < count)[:, None]
    values += sample.to(tl.int64) * sample_stride + head * FEATURES
    value = tl.load(values + row[:, None].to(tl.int64) * stride + column, mask=there, other=0.0).to(tl.float32)
    value = tl.where(there, (value - center) * factor, 0.0)
    value = tl.clamp(value, -LARGEST, LARGEST, tl.PropagateNan.ALL).to(result.dtype.element_ty)
    place = tile * KEYS + tl.arange(0, KEYS)
    at = result + (of_head * FEATURES + column[:, None]).to(tl.int64) * places + place
    tl.store(at, tl.trans(value))
