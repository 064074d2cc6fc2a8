"""The Triton kernel of `contract.shard_gradient`: one program a row and block, one read, one write.

The gradient is a function of each logit alone, so a row may be cut anywhere: its blocks lie between
16-byte boundaries of the output, and where the row begins or ends inside a block that is masked.
Both sides are marked as not worth keeping in the caches.
"""

import triton
import triton.language as tl

from megatron_infoentropy.kernels.triton_logits import FLOOR, LN2, LOG2E, meaning


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
    cap_high,  # 2 log2(e) / softcap, as a sum
    cap_low,
    blocks,  # a row
    ALIGNED: tl.constexpr,  # every row of both starts at a 16-byte boundary
    TOGETHER: tl.constexpr,  # rows of both lie alike around 16-byte boundaries
    SOFTCAP: tl.constexpr,
    OFFSET: tl.constexpr,
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

    cap = (cap_high, cap_low)
    own = y - vocab_start
    own = tl.where((own >= 0) & (own < columns), own - start, BLOCK).to(tl.int32)
    if (start >= 0) & (start + BLOCK <= columns):
        z = tl.load(z_at, eviction_policy="evict_first")
        dz = _gradient(z, lane == own, coefficients + token, tokens, scale, cap, SOFTCAP, OFFSET)
        tl.store(out_at, dz, eviction_policy="evict_first")
    else:
        read = (start + lane >= 0) & (start + lane < columns)
        z = tl.load(z_at, mask=read, other=0.0, eviction_policy="evict_first")
        dz = _gradient(z, lane == own, coefficients + token, tokens, scale, cap, SOFTCAP, OFFSET)
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
):
    """The gradient of logits z of one row, in fp32."""
    m = tl.load(coefficients)
    a = tl.load(coefficients + tokens)
    b = tl.load(coefficients + 2 * tokens) * LN2
    x, slope = meaning(z, cap, SOFTCAP)
    t = tl.maximum((x * scale - m) * LOG2E, FLOOR)
    dz = tl.exp2(t) * (a + b * t)
    if OFFSET:
        dz += tl.load(coefficients + 4 * tokens)
    return tl.where(is_target, tl.load(coefficients + 3 * tokens), dz) * slope
