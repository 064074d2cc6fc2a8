"""The Triton kernel of `contract.shard_statistics`: one program a row, one read.

Every thread runs over its share of the columns with a maximum of its own, so that no thread waits
for another before the row ends; then the threads are folded as shards are. While a tile is computed
the next one is on its way, 64 bytes a thread.

R = Z - 1 is exact because a maximal logit never enters a sum: each logit and the thread's maximum
change places where they are the wrong way round, and what is left over is summed. Sums are taken
over 8 logits, then over a tile, then over the row, which keeps chains of additions short.

A row is not split over programs: the order of its sums would then depend on how many rows there
are. NaN stays in the thread's maximum, by a maximum that keeps it, and is found in the fold.
"""

import triton
import triton.language as tl

from megatron_infoentropy.kernels.triton_logits import (
    FLOOR,
    LN2,
    exist,
    load_logits,
    load_words,
    logits_of,
    meaning,
)

KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
GROUP = tl.constexpr(8)  # logits that are summed on their own


@triton.jit(do_not_specialize=["tokens", "vocab_start", "ignore_index"])
def statistics_kernel(
    logits,
    row_stride,
    target,
    statistics,
    tokens,
    vocab_start,
    columns,
    ignore_index,
    scale,  # makes a value the logit that is meant
    rate,  # scale log2 e
    cap_high,  # 2 log2(e) / softcap, as a sum
    cap_low,
    ALIGNED: tl.constexpr,  # every row starts at a 16-byte boundary
    SOFTCAP: tl.constexpr,
    DISTANCE: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The statistics of row program_id(0)."""
    DTYPE: tl.constexpr = logits.dtype.element_ty
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    COUNT: tl.constexpr = VECTOR * LOADS
    token = tl.program_id(0).to(tl.int64)  # times the stride it may pass 2^31
    statistics += token
    y = tl.load(target + token)
    if y == ignore_index:
        for part in tl.static_range(5 if DISTANCE else 4):
            tl.store(statistics + part * tokens, 0.0)
        return

    cap = (cap_high, cap_low)
    row = logits + token * row_stride
    zeros = tl.zeros([THREADS], tl.float32)
    state = (zeros + float("-inf"), zeros, zeros, zeros, zeros)
    every = (zeros.to(tl.int32) + 1,) * COUNT
    done = 0
    if ALIGNED:
        tiles = columns // (THREADS * COUNT)
        done = tiles * (THREADS * COUNT)
        if tiles > 0:
            start = tl.multiple_of(row, 16).to(tl.pointer_type(tl.int32))
            words = load_words(start, THREADS, LOADS)
            for _ in tl.range(1, tiles):
                start += 4 * THREADS * LOADS
                following = load_words(start, THREADS, LOADS)
                z = logits_of(words, LOADS, DTYPE)
                state = _add(state, z, every, rate, cap, COUNT, SOFTCAP, DISTANCE)
                words = following
            z = logits_of(words, LOADS, DTYPE)
            state = _add(state, z, every, rate, cap, COUNT, SOFTCAP, DISTANCE)
    for start in tl.range(done, columns, THREADS * COUNT):
        z = load_logits(row, start, columns, VECTOR, THREADS, LOADS)
        exists = exist(start, columns, VECTOR, THREADS, LOADS) if DISTANCE else every
        state = _add(state, z, exists, rate, cap, COUNT, SOFTCAP, DISTANCE)

    m, tail, spread, distance = _fold(state, rate, DISTANCE)
    tl.store(statistics, m * scale)
    tl.store(statistics + tokens, tail)
    tl.store(statistics + 2 * tokens, spread * LN2)
    column = y - vocab_start
    z = tl.load(row + column, mask=(column >= 0) & (column < columns), other=0.0)
    x, _ = meaning(z, cap, SOFTCAP)
    tl.store(statistics + 3 * tokens, x * scale)
    if DISTANCE:
        tl.store(statistics + 4 * tokens, distance * scale)


@triton.jit
def _add(
    state,
    z,
    exists,
    rate,
    cap,
    COUNT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """The state of every thread after COUNT more logits, those that exist.

    The state is the maximum m; the mass beside one maximal logit; the sum of 2^t (-t), with
    t = log2 e^(x - m); the sum of m - x; and how many logits there were.
    """
    m, tail, spread, distance, seen = state
    top = m
    values = ()
    others = ()
    for i in tl.static_range(COUNT):
        x, _ = meaning(z[i], cap, SOFTCAP)
        values += (x,)
        others += (tl.minimum(top, x, propagate_nan=KEEP_NAN),)
        top = tl.maximum(top, x, propagate_nan=KEEP_NAN)
    t = tl.maximum((m - top) * rate, FLOOR)
    s = tl.exp2(t)
    spread = s * (spread - t * tail)
    tail = s * tail
    TERMS: tl.constexpr = GROUP if COUNT > GROUP else COUNT
    for group in tl.static_range(0, COUNT, TERMS):
        group_tail = tl.zeros_like(m)
        group_spread = tl.zeros_like(m)
        for i in tl.static_range(TERMS):
            t = tl.maximum((others[group + i] - top) * rate, FLOOR)
            e = tl.exp2(t)
            group_tail += e
            group_spread -= e * t
        tail += group_tail
        spread += group_spread
    if DISTANCE:
        distance += tl.where((seen == 0) | (top == m), 0.0, seen * (top - m))
        for i in tl.static_range(COUNT):
            # A maximum that drops NaN makes (-inf) - (-inf) no distance.
            distance += tl.where(exists[i] != 0, tl.maximum(top - values[i], 0.0), 0.0)
            seen += exists[i].to(tl.float32)
    return top, tail, spread, distance, seen


@triton.jit
def _fold(state, rate, DISTANCE: tl.constexpr):
    """m, R, U and D of the row from those of its threads."""
    m, tail, spread, distance, seen = state
    top = tl.max(m, 0)
    t = tl.maximum((m - top) * rate, FLOOR)
    s = tl.exp2(t)
    spread = tl.sum(s * (spread - t * (1.0 + tail)), 0)
    # Every thread left one logit out; of those that equal the row's maximum all but one are mass.
    holds_top = (m == top) & (m > float("-inf"))
    tops = tl.sum(holds_top.to(tl.float32), 0)
    tail = tl.sum(tl.where(holds_top, tail, s * (1.0 + tail)), 0) + (tops - 1.0)
    if DISTANCE:
        distance += tl.where((seen == 0) | (top == m), 0.0, seen * (top - m))
    spoilt = (tl.sum((m != m).to(tl.int32), 0) > 0) | (top == float("inf"))
    return top, tl.where(spoilt, float("nan"), tail), spread, tl.sum(distance, 0)
