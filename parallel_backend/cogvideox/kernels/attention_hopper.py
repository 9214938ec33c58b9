"""The kernels of :mod:`parallel_backend.cogvideox.attention.hopper` for Hopper GPUs. Imported only if Triton is installed.

Softmax needs no running maximum if the sums of ``2 ** score`` neither overflow nor underflow. In float32 and bf16 the range is
2^-90 to 2^100, which covers scores of normalised heads. In fp16 the upper limit is 2^16, so scores are taken relative to the
largest one over the neighbouring tokens and the first tile, as most heads attend to neighbours. The first kernel assumes this
and reports the rows where it fails. The second kernel, with a running maximum, recomputes those. Without maxima and rescaling,
exponentials and matrix products of three warp groups overlap (FlashAttention-3's schedule, arXiv 2407.08608) and little other
work remains. If too many rows fail, the first kernel can use a running maximum itself.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

bring = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""Starts a TMA load of a tile; the function is renamed in Triton 3.9."""
ROWS = tl.constexpr(64)
"""Queries per warp group: the rows of one matrix instruction."""
GROUPS = tl.constexpr(3)
"""Warp groups that share each loaded tile of keys; with three, a thread may use 160 registers."""
KEYS = tl.constexpr(128)
"""Keys per tile."""
STAGES = tl.constexpr(2)
"""Tiles of keys, and of values, that fit in shared memory."""
LN_2 = tl.constexpr(0.6931471805599453)
LEAST, MOST = tl.constexpr(2.0**-90), tl.constexpr(2.0**100)
"""The range of sums without loss: no relevant term underflows, and none overflows."""
MOST_FP16 = tl.constexpr(2.0**15.5)
"""The upper limit in fp16, whose largest number is just below 2^16."""
ROOM = tl.constexpr(3.0)
"""Headroom in powers of two above the largest known score in fp16. Other scores may be higher by 2^18; scores lower by 2^21
contribute nothing."""


@gluon.jit
def halve(values):
    """Adds the right half of the columns to the left half, without exchanging data between threads."""
    left, right = values.reshape([values.shape[0], 2, values.shape[1] // 2]).permute((0, 2, 1)).split()
    return left + right


@gluon.jit
def add_columns(values):
    """Sums ``[rows, 128]`` to ``[rows, 8]``, without exchanging data between threads."""
    gl.static_assert(values.shape[1] == 128)
    return halve(halve(halve(halve(values))))


@gluon.jit
def make_barriers():
    """Creates the barriers of queries, and for each tile of keys and of values its full and empty barriers."""
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_in.index(stage), count=1)
        mbarrier.init(keys_out.index(stage), count=GROUPS)
        mbarrier.init(values_in.index(stage), count=1)
        mbarrier.init(values_out.index(stage), count=GROUPS)
    fence_async_shared()
    return loaded, keys_in, keys_out, values_in, values_out


@gluon.jit
def largest_near(query, keys, dtype: gl.constexpr, rows_in: gl.constexpr):
    """Returns the largest score of each query over a tile of keys, in float32."""
    depth: gl.constexpr = 256 // keys.dtype.primitive_bitwidth
    scores_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, depth])
    nothing = gl.zeros([ROWS, ROWS], dtype, scores_in)
    scores = warpgroup_mma(query, keys.permute((1, 0)), nothing, use_acc=False)
    return gl.convert_layout(gl.max(scores, 1).to(gl.float32), rows_in)


@gluon.jit
def load(
    queries, near, keys, values, query_room, near_room, key_room, value_room, barriers, row, first, column, feature, tiles,
    NEAR: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """The producer warp: loads queries, if requested the keys near them, and tiles of keys and values by TMA.

    The last tile, which may be partial, comes first.
    """
    loaded, keys_in, keys_out, values_in, values_out = barriers
    mbarrier.expect(loaded, GROUPS * ((1 + NEAR) * queries.block_type.nbytes))
    for group in gl.static_range(GROUPS):
        bring(queries, [row[0] + group * ROWS, column], loaded, query_room.index(group))
        if NEAR:
            bring(near, [row[1] + group * ROWS, column], loaded, near_room.index(group))
    for tile in range(tiles):
        stage, phase = tile % STAGES, tile // STAGES & 1
        start = gl.where(tile == 0, tiles - 1, tile - 1) * KEYS
        mbarrier.wait(keys_out.index(stage), phase ^ 1)
        mbarrier.expect(keys_in.index(stage), keys.block_type.nbytes)
        bring(keys, [first + start, column], keys_in.index(stage), key_room.index(stage))
        mbarrier.wait(values_out.index(stage), phase ^ 1)
        mbarrier.expect(values_in.index(stage), values.block_type.nbytes)
        if TURNED:
            bring(values, [feature, start], values_in.index(stage), value_room.index(stage))
        else:
            bring(values, [first + start, column], values_in.index(stage), value_room.index(stage))


@gluon.jit
def attend(
    result, log_sums, failed, query_room, near_room, key_room, value_room, barriers,
    row, rows, key_count, heads, tiles, GROUP: gl.constexpr, FEATURES: gl.constexpr, RUNNING: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: attends from its rows to all keys."""
    loaded, keys_in, keys_out, values_in, values_out = barriers
    depth: gl.constexpr = 256 // key_room.dtype.primitive_bitwidth
    scores_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, depth])
    sums_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 16])
    weights_in: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_in, k_width=2)
    query = query_room.index(GROUP)
    half: gl.constexpr = value_room.dtype == gl.float16
    nothing = gl.zeros([ROWS, KEYS], gl.float32, scores_in)
    sums = gl.zeros([ROWS, FEATURES], gl.float32, sums_in)

    mbarrier.wait(loaded, 0)
    mbarrier.wait(keys_in.index(0), 0)
    scores = warpgroup_mma(query, key_room.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(keys_out.index(0))
    there = gl.arange(0, KEYS, gl.SliceLayout(0, scores_in)) < key_count - (tiles - 1) * KEYS
    counts_from: gl.constexpr = half or RUNNING
    if counts_from:
        zero = gl.max(gl.where(there[None, :], scores, -float("inf")), 1)
        if not RUNNING:
            zero = (
                gl.maximum(zero, largest_near(query, near_room.index(GROUP), gl.float32, gl.SliceLayout(1, scores_in))) + ROOM
            )
        scores -= zero[:, None]
    weights = gl.where(there[None, :], gl.exp2(scores), 0.0)
    total = add_columns(weights)
    rounded = gl.convert_layout(weights.to(value_room.dtype), weights_in)
    mbarrier.wait(keys_in.index(1 % STAGES), 1 // STAGES & 1, pred=tiles > 1)
    for tile in range(1, tiles):
        stage, before, after = tile % STAGES, (tile - 1) % STAGES, (tile + 1) % STAGES
        scores = warpgroup_mma(query, key_room.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(values_in.index(before), (tile - 1) // STAGES & 1)
        sums = warpgroup_mma(rounded, value_room.index(before), sums, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(keys_out.index(stage))
        if RUNNING:
            largest = gl.maximum(zero, gl.max(scores, 1))
            shrinks = gl.exp2(zero - largest)
            zero = largest
            total *= gl.convert_layout(shrinks, gl.SliceLayout(1, total.type.layout))[:, None]
        if counts_from:
            scores -= zero[:, None]
        weights = gl.exp2(scores)
        total += add_columns(weights)
        # The branch in this wait keeps the exponentials before the next product, overlapping the running one.
        mbarrier.wait(keys_in.index(after), (tile + 1) // STAGES & 1, pred=tile + 1 < tiles)
        sums, rounded, weights = warpgroup_mma_wait(0, deps=[sums, rounded, weights])
        mbarrier.arrive(values_out.index(before))
        if RUNNING:
            sums *= gl.convert_layout(shrinks, gl.SliceLayout(1, sums_in))[:, None]
        rounded = gl.convert_layout(weights.to(value_room.dtype), weights_in)
    last = (tiles - 1) % STAGES
    mbarrier.wait(values_in.index(last), (tiles - 1) // STAGES & 1)
    sums = warpgroup_mma(rounded, value_room.index(last), sums, is_async=True)
    sums, rounded = warpgroup_mma_wait(0, deps=[sums, rounded])

    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, sums_in))
    at = row + gl.arange(0, ROWS, gl.SliceLayout(1, sums_in))
    # NaN compares as false, so it counts as failed.
    good = (total > LEAST) & (total < (MOST_FP16 if half and not RUNNING else MOST))
    gl.store(failed, gl.sum(gl.where(good | (at >= rows), 0, 1), 0))
    log_sum = gl.log(total)
    if counts_from:
        log_sum += gl.convert_layout(zero, gl.SliceLayout(1, sums_in)) * LN_2
    gl.store(log_sums + at, log_sum, mask=at < rows)
    column = gl.arange(0, FEATURES, gl.SliceLayout(0, sums_in))
    places = result + at[:, None].to(gl.int64) * (heads * FEATURES) + column[None, :]
    gl.store(places, (sums / total[:, None]).to(result.dtype.element_ty), mask=(at < rows)[:, None])


@gluon.jit
def optimistic_kernel(
    queries, near, keys, values, result, log_sums, failed,
    query_count, key_rows, key_count, heads, FEATURES: gl.constexpr, RUNNING: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Attention without a running maximum, which reports the rows that need one.

    A program has ``GROUPS * ROWS`` queries of one head of one sample.

    Args:
        queries, keys, values: descriptors of ``[batch * tokens, heads * features]``.
        near: like ``keys``, with tiles of the queries' size.
        failed: ``[batch, heads, programs, GROUPS]``; set to the number of rows to recompute.
        key_rows: distance of samples in rows of keys.
        RUNNING: whether to use a running maximum; then no row fails.
    """
    tile, head, sample = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    query_room = gl.allocate_shared_memory(queries.dtype, [GROUPS, ROWS, FEATURES], queries.layout)
    NEAR: gl.constexpr = values.dtype == gl.float16 and not RUNNING
    near_room = gl.allocate_shared_memory(near.dtype, [GROUPS if NEAR else 1, ROWS, FEATURES], near.layout)
    key_room = gl.allocate_shared_memory(keys.dtype, [STAGES, KEYS, FEATURES], keys.layout)
    value_room = gl.allocate_shared_memory(values.dtype, [STAGES, KEYS, FEATURES], values.layout)
    barriers = make_barriers()
    row, tiles, column = tile * (GROUPS * ROWS), gl.cdiv(key_count, KEYS), head * FEATURES
    result += (sample.to(gl.int64) * query_count * heads + head) * FEATURES
    log_sums += (sample * heads + head) * query_count
    failed += ((sample * heads + head) * gl.num_programs(0) + tile) * GROUPS
    gl.warp_specialize(
        [
            (attend, (result, log_sums, failed, query_room, near_room, key_room, value_room, barriers,
                      row, query_count, key_count, heads, tiles, 0, FEATURES, RUNNING)),
            (attend, (result, log_sums, failed + 1, query_room, near_room, key_room, value_room, barriers,
                      row + ROWS, query_count, key_count, heads, tiles, 1, FEATURES, RUNNING)),
            (attend, (result, log_sums, failed + 2, query_room, near_room, key_room, value_room, barriers,
                      row + 2 * ROWS, query_count, key_count, heads, tiles, 2, FEATURES, RUNNING)),
            (load, (queries, near, keys, values, query_room, near_room, key_room, value_room, barriers,
                    (sample * query_count + row, sample * key_rows + row), sample * key_rows, column, column, tiles, NEAR, False)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


@triton.jit
def careful_kernel(
    queries, keys, values, result, log_sums, failed, redone,
    query_count, key_count, heads, query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Recomputes tiles with ``failed`` rows, with a running maximum, and counts them in ``redone``."""
    group, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if tl.load(failed + (sample * heads + head) * tl.num_programs(0) + group) > 0:
        row, column = group * ROWS + tl.arange(0, ROWS), tl.arange(0, FEATURES)
        queries += sample * query_sample + head * FEATURES
        keys += sample * key_sample + head * FEATURES
        values += sample * value_sample + head * FEATURES
        there = (row < query_count)[:, None]
        query = tl.load(queries + row[:, None].to(tl.int64) * query_stride + column, mask=there, other=0.0)
        largest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, FEATURES], tl.float32)
        for start in range(0, key_count, KEYS):
            at = start + tl.arange(0, KEYS)
            valid = at < key_count
            key = tl.load(keys + at[None, :].to(tl.int64) * key_stride + column[:, None], mask=valid[None, :], other=0.0)
            value = tl.load(values + at[:, None].to(tl.int64) * value_stride + column, mask=valid[:, None], other=0.0)
            scores = tl.where(valid[None, :], tl.dot(query, key), -float("inf"))
            now = tl.maximum(largest, tl.max(scores, 1))
            shrinks = tl.exp2(largest - now)
            weights = tl.exp2(scores - now[:, None])
            total = total * shrinks + tl.sum(weights, 1)
            sums = sums * shrinks[:, None] + tl.dot(weights.to(value.dtype), value)
            largest = now
        at = (sample * heads + head) * query_count + row
        tl.store(log_sums + at, (largest + tl.log2(total)) * LN_2, mask=row < query_count)
        places = result + ((sample * query_count + row[:, None]) * heads + head) * FEATURES + column
        tl.store(places, (sums / total[:, None]).to(result.dtype.element_ty), mask=there)
        tl.atomic_add(redone, 1)
