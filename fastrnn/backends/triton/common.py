"""What the kernels share: activations, tiles, the recurrent product, rows of a step, random masks.

A tile is (units, batch rows): a recurrent product is weight tile x state tile, so that the batch is
the dimension of a matrix product that may be as small as 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "column",
    "cube",
    "factor",
    "first_step",
    "keep",
    "product",
    "row_index",
    "save",
    "scatter",
    "sigmoid",
    "tanh",
    "weight_tile",
]


@triton.jit
def sigmoid(x):
    # exp of a negative number only: no overflow, and a NaN stays one.
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, y, -y)


@triton.jit
def weight_tile(w, outs, ins, size_out, size_in, stride_out, stride_in):
    """(outs, ins) of a weight, zero beyond its sizes."""
    mask = (outs < size_out)[:, None] & (ins < size_in)[None, :]
    return tl.load(w + outs[:, None] * stride_out + ins[None, :] * stride_in, mask=mask, other=0.0)


@triton.jit
def product(
    kept,
    w,
    outs,
    ins,
    size_out,
    size_in,
    stride_out,
    stride_in,
    state,
    STREAM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """weight x state in float32. STREAM: read the weight again instead of using ``kept``; its
    address must not be a loop invariant, or the compiler reads it once and keeps all of it."""
    tile = kept
    if STREAM:
        # Without it the compiler has the matrices of all gates in shared memory at once.
        tl.debug_barrier()
        tile = weight_tile(w, outs, ins, size_out, size_in, stride_out, stride_in)
    state = state.to(tile.dtype)
    if WIDEN:
        # The interpreter has no product of 16-bit floats; the operands are rounded all the same.
        tile = tile.to(tl.float32)
        state = state.to(tl.float32)
    return tl.dot(tile, state, input_precision=PRECISION)


@triton.jit
def row_index(t, n, offsets, stride_t, stride_n, PACKED: tl.constexpr):
    """The row of step t of sequence n in tensors of one row for each."""
    row = tl.load(offsets + t) + n if PACKED else (n * stride_n + t * stride_t).to(tl.int64)
    return row


@triton.jit
def first_step(t, length, backwards):
    """Whether step t is a sequence's first one in the order of the direction."""
    return tl.where(backwards, length - 1 - t, length * 0 + t) <= 0


@triton.jit
def cube(base, row, units, width, mask):
    """A tile (units, rows) in float32 of a tensor with rows of ``width``; 0 where not mask."""
    at = base + units[:, None] + row[None, :] * width
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scatter(base, row, units, width, value, mask):
    at = base + units[:, None] + row[None, :] * width
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def save(base, row, units, width, value, live, mask):
    """As ``scatter``, but 0 in rows that are not live."""
    scatter(base, row, units, width, tl.where(live[None, :], value, 0.0), mask)


@triton.jit
def column(base, units, size):
    """A vector over units as a column of a tile, in float32."""
    return tl.load(base + units, mask=units < size, other=0.0).to(tl.float32)[:, None]


@triton.jit
def keep(seed, stream, t, n, units, threshold):
    """1.0 where the random word of (t, n, unit) is at least the threshold, else 0.0.

    The words are those of csrc/cells/philox.h.
    """
    zero = (units[:, None] * 0 + n[None, :] * 0).to(tl.uint32)
    lane = (units // 64 * 16 + units % 16).to(tl.uint32)[:, None] + zero
    c0, c1, c2, c3 = tl.philox(
        seed, lane, n.to(tl.uint32)[None, :] + zero, zero + t, zero + stream, 10
    )
    which = (units // 16 % 4)[:, None]
    word = tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))
    return tl.where(word.to(tl.int64) >= threshold, 1.0, 0.0)


@triton.jit
def factor(seed, stream, t, n, units, threshold, value, TRAINING: tl.constexpr):
    """A mask times ``value`` in training; ``value``, an expectation, in evaluation."""
    scale = value
    if TRAINING:
        scale = keep(seed, stream, t, n, units, threshold) * value
    return scale
