"""Device functions of the Triton kernels: how logits come into registers and what they mean.

A thread's share of a tile is LOADS vectors of 16 bytes. They travel as 32-bit words and are split,
without leaving their thread, into tensors of one element a thread: what is then done to a row is
plain arithmetic on such tensors, and threads meet only where the row ends.
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
