"""Device functions of the Triton kernels: how logits come into registers, and what is made of them.

A thread's share of a tile is LOADS vectors of 16 bytes. They travel as 32-bit words and are split,
without leaving their thread, into tensors of one element a thread: what is then done to a row is
plain arithmetic on such tensors, and threads meet only where the row ends.

The Triton kernel of `contract.shard_statistics`: one program a row, one read.

Every thread runs over its share of the columns with a maximum of its own, so that no thread waits
for another before the row ends; then the threads are folded as shards are. While a tile is computed
the next one is on its way, 64 bytes a thread.

R = Z - 1 is exact because a maximal logit never enters a sum: each logit and the thread's maximum
change places where they are the wrong way round, and what is left over is summed. Sums are taken
over 8 logits, then over a tile, then over the row, which keeps chains of additions short.

A row is not split over programs: the order of its sums would then depend on how many rows there
are. NaN stays in the thread's maximum, by a maximum that keeps it, and is found in the fold.

The Triton kernel of `contract.shard_gradient`: one program a row and block, one read, one write.

The gradient is a function of each logit alone, so a row may be cut anywhere: its blocks lie between
16-byte boundaries of the output, and where the row begins or ends inside a block that is masked.
Both sides are marked as not worth keeping in the caches.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Exponents of 2 are kept at or above this by a maximum that drops NaN. 2^FLOOR is exactly 0; the
# difference (-inf) - (-inf) is NaN and means no mass; and 0 * -inf, which would be NaN, is avoided.
FLOOR = tl.constexpr(-200.0)


@triton.jit
def load_words(start, THREADS: tl.constexpr, LOADS: tl.constexpr):
    """A whole tile from a 16-byte boundary on, as LOADS tensors of 32-bit words."""
    words = ()
    for i in tl.static_range(LOADS):
        words += (tl.load(start + i * (4 * THREADS) + tl.arange(0, 4 * THREADS)),)
    return words


@triton.jit
def logits_of(words, LOADS: tl.constexpr, DTYPE: tl.constexpr):
    """The logits in the words of a tile, one element a thread, in the order of `split`."""
    z = ()
    for i in tl.static_range(LOADS):
        word = words[i]
        if DTYPE.is_fp32():
            z += (word.to(tl.float32, bitcast=True),)
        elif DTYPE.is_bf16():  # the upper half of a float: one instruction a logit
            low = (word << 16).to(tl.float32, bitcast=True)
            high = (word & -65536).to(tl.float32, bitcast=True)
            z += (low, high)
        else:
            low = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            z += (low, high)
    return split(z, LOADS * (32 // DTYPE.primitive_bitwidth), 4)


@triton.jit
def load_logits(
    row, start, columns, VECTOR: tl.constexpr, THREADS: tl.constexpr, LOADS: tl.constexpr
):
    """A tile from column `start` on wherever that lies, -inf at and beyond `columns`; as above."""
    z = ()
    for i in tl.static_range(LOADS):
        column = start + i * (THREADS * VECTOR) + tl.arange(0, THREADS * VECTOR)
        z += (tl.load(row + column, mask=column < columns, other=float("-inf")),)
    return split(z, LOADS, VECTOR)


@triton.jit
def exist(start, columns, VECTOR: tl.constexpr, THREADS: tl.constexpr, LOADS: tl.constexpr):
    """1 where `load_logits` finds a logit, else 0."""
    inside = ()
    for i in tl.static_range(LOADS):
        column = start + i * (THREADS * VECTOR) + tl.arange(0, THREADS * VECTOR)
        inside += ((column < columns).to(tl.int32),)
    return split(inside, LOADS, VECTOR)


@triton.jit
def split(tensors, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """COUNT tensors as COUNT * PARTS, each a PARTS-th of the size; elements keep their threads."""
    if PARTS > 1:
        halves = ()
        for i in tl.static_range(COUNT):
            pairs = tl.reshape(tensors[i], [tensors[i].shape[0] // 2, 2])
            halves += tl.split(pairs)
        tensors = split(halves, COUNT * 2, PARTS // 2)
    return tensors


@triton.jit
def meaning(z, cap, SOFTCAP: tl.constexpr):
    """(the logit as the model means it but for its scale, the softcap's slope there)."""
    x = z.to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        tanh, rest = _tanh(x, cap)
        x = tl.where(x == float("-inf"), x, tanh)  # a mask stays a mask
        slope = rest * (2.0 - rest)
    return x, slope


@triton.jit
def _tanh(z, cap):
    """(tanh y, 1 - |tanh y|), within 1.6e-7; tanh of small and the rest of large y relatively.

    y is z / softcap, and `cap` 2 log2(e) / softcap as a sum, so that the exponent is rounded once.
    """
    high, low = cap
    z_size = tl.abs(z)
    t = tl.fma(z_size, high, z_size * low)
    size = t * (0.5 * LN2)
    # Below 1.2 an odd polynomial of least relative error, 6e-9: 1 - 2 E / (1 + E) cancels there,
    # and the hardware's 2^t, good to 2^-22, would be all of the error allowed.
    w = size * size
    p = 6.7766e-05 * w - 0.000601829
    p = p * w + 0.002643575
    p = p * w - 0.008182572
    p = p * w + 0.02156848
    p = p * w - 0.053892188
    p = p * w + 0.13332385
    p = p * w - 0.33333293
    near = size + size * (w * p)
    e = tl.exp2(-t)
    far = 2.0 * e / (1.0 + e)
    rest = tl.where(size < 1.2, 1.0 - near, far)
    tanh = tl.where(size < 1.2, near, 1.0 - far)
    return tl.where(z < 0, -tanh, tanh), rest


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
    inverse_temperatures,  # a further factor of every token, with PER_TOKEN
    cap_high,  # 2 log2(e) / softcap, as a sum
    cap_low,
    ALIGNED: tl.constexpr,  # every row starts at a 16-byte boundary
    SOFTCAP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DISTANCE: tl.constexpr,
    SQUARES: tl.constexpr,
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
        for part in tl.static_range(4 + DISTANCE + SQUARES):
            tl.store(statistics + part * tokens, 0.0)
        return
    if PER_TOKEN:
        scale *= tl.load(inverse_temperatures + token)
        rate = scale * LOG2E

    cap = (cap_high, cap_low)
    row = logits + token * row_stride
    zeros = tl.zeros([THREADS], tl.float32)
    state = (zeros + float("-inf"), zeros, zeros, zeros, zeros, zeros)
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
                state = _add(state, z, every, rate, cap, COUNT, SOFTCAP, DISTANCE, SQUARES)
                words = following
            z = logits_of(words, LOADS, DTYPE)
            state = _add(state, z, every, rate, cap, COUNT, SOFTCAP, DISTANCE, SQUARES)
    for start in tl.range(done, columns, THREADS * COUNT):
        z = load_logits(row, start, columns, VECTOR, THREADS, LOADS)
        exists = exist(start, columns, VECTOR, THREADS, LOADS) if DISTANCE else every
        state = _add(state, z, exists, rate, cap, COUNT, SOFTCAP, DISTANCE, SQUARES)

    m, tail, spread, distance, squares = _fold(state, rate, DISTANCE, SQUARES)
    tl.store(statistics, m * scale)
    tl.store(statistics + tokens, tail)
    tl.store(statistics + 2 * tokens, spread * LN2)
    column = y - vocab_start
    z = tl.load(row + column, mask=(column >= 0) & (column < columns), other=0.0)
    x, _ = meaning(z, cap, SOFTCAP)
    tl.store(statistics + 3 * tokens, x * scale)
    if DISTANCE:
        tl.store(statistics + 4 * tokens, distance * scale)
    if SQUARES:
        tl.store(statistics + (4 + DISTANCE) * tokens, squares)


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
    SQUARES: tl.constexpr,
):
    """The state of every thread after COUNT more logits, those that exist.

    The state is the maximum m; the mass beside one maximal logit; the sum of 2^t (-t), with
    t = log2 e^(x - m); the sum of m - x; how many logits there were; and the sum of 2^2t beside one
    maximal logit.
    """
    m, tail, spread, distance, seen, squares = state
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
    if SQUARES:
        squares = s * s * squares
    TERMS: tl.constexpr = GROUP if COUNT > GROUP else COUNT
    for group in tl.static_range(0, COUNT, TERMS):
        group_tail = tl.zeros_like(m)
        group_spread = tl.zeros_like(m)
        for i in tl.static_range(TERMS):
            t = tl.maximum((others[group + i] - top) * rate, FLOOR)
            e = tl.exp2(t)
            group_tail += e
            group_spread -= e * t
            if SQUARES:
                squares += e * e
        tail += group_tail
        spread += group_spread
    if DISTANCE:
        distance += tl.where((seen == 0) | (top == m), 0.0, seen * (top - m))
        for i in tl.static_range(COUNT):
            # A maximum that drops NaN makes (-inf) - (-inf) no distance.
            distance += tl.where(exists[i] != 0, tl.maximum(top - values[i], 0.0), 0.0)
            seen += exists[i].to(tl.float32)
    return top, tail, spread, distance, seen, squares


@triton.jit
def _fold(state, rate, DISTANCE: tl.constexpr, SQUARES: tl.constexpr):
    """m, R, U, D and Q of the row from those of its threads."""
    m, tail, spread, distance, seen, squares = state
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
    if SQUARES:
        squares = tl.where(holds_top, squares, s * s * (1.0 + squares))
    spoilt = (tl.sum((m != m).to(tl.int32), 0) > 0) | (top == float("inf"))
    whole = tl.sum(squares, 0) + (tops - 1.0)
    return top, tl.where(spoilt, float("nan"), tail), spread, tl.sum(distance, 0), whole


@triton.jit(do_not_specialize=["tokens", "vocab_start", "ignore_index"])
def gradient_kernel(
    logits,
    row_stride,
    out,
    out_row_stride,
    target,
    coefficients,
    tokens,
    vocab_start,
    columns,
    width,
    ignore_index,
    scale,
    inverse_temperatures,  # as for the statistics
    cap_high,  # 2 log2(e) / softcap, as a sum
    cap_low,
    blocks,  # a row
    ALIGNED: tl.constexpr,  # every row of both starts at a 16-byte boundary
    TOGETHER: tl.constexpr,  # rows of both lie alike around 16-byte boundaries
    SOFTCAP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    OFFSET: tl.constexpr,
    QUADRATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`contract.shard_gradient` of block program_id(0) % blocks of row program_id(0) // blocks."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    SIZE: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth // 8
    row = logits + token * row_stride
    out_row = out + token * out_row_stride
    start = (tl.program_id(0) % blocks) * BLOCK
    if not ALIGNED:  # the first block begins at the boundary before the row
        start -= ((out_row.to(tl.int64) // SIZE) % (16 // SIZE)).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    z_at = tl.multiple_of(row + start, 16 if TOGETHER else SIZE) + lane
    out_at = tl.multiple_of(out_row + start, 16) + lane
    written = (start + lane >= 0) & (start + lane < width)
    y = tl.load(target + token)
    if y == ignore_index:
        tl.store(out_at, 0.0, mask=written, eviction_policy="evict_first")
        return
    if PER_TOKEN:
        scale *= tl.load(inverse_temperatures + token)

    cap = (cap_high, cap_low)
    row_coefficients = coefficients + token
    own = y - vocab_start
    own = tl.where((own >= 0) & (own < columns), own - start, BLOCK).to(tl.int32)
    if (start >= 0) & (start + BLOCK <= columns):
        z = tl.load(z_at, eviction_policy="evict_first")
        dz = _gradient(
            z, lane == own, row_coefficients, tokens, scale, cap, SOFTCAP, OFFSET, QUADRATIC
        )
        tl.store(out_at, dz, eviction_policy="evict_first")
    else:
        read = (start + lane >= 0) & (start + lane < columns)
        z = tl.load(z_at, mask=read, other=0.0, eviction_policy="evict_first")
        dz = _gradient(
            z, lane == own, row_coefficients, tokens, scale, cap, SOFTCAP, OFFSET, QUADRATIC
        )
        tl.store(out_at, tl.where(read, dz, 0.0), mask=written, eviction_policy="evict_first")


@triton.jit
def _gradient(
    z,
    is_target,
    coefficients,
    tokens,
    scale,
    cap,
    SOFTCAP: tl.constexpr,
    OFFSET: tl.constexpr,
    QUADRATIC: tl.constexpr,
):
    """The gradient of logits z of one row, in fp32."""
    m = tl.load(coefficients)
    a = tl.load(coefficients + tokens)
    b = tl.load(coefficients + 2 * tokens) * LN2
    x, slope = meaning(z, cap, SOFTCAP)
    t = tl.maximum((x * scale - m) * LOG2E, FLOOR)
    e = tl.exp2(t)
    sloped = a + b * t
    if QUADRATIC:
        sloped += e * tl.load(coefficients + (4 + OFFSET) * tokens)
    dz = e * sloped
    if OFFSET:
        dz += tl.load(coefficients + 4 * tokens)
    return tl.where(is_target, tl.load(coefficients + 3 * tokens), dz) * slope
