"""Elman RNN kernels; structure and tensors as in ``lstm``.

xg (R, D*H), w_hh (D, H, H), bias (D, H) float32; gates (D, R, H) float32 or None: h before zoneout,
where zoneout mixes, because the derivative is a function of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrnn.backends.triton.common import (
    column,
    cube,
    factor,
    first_step,
    product,
    row_index,
    save,
    scatter,
    tanh,
    weight_tile,
)

__all__ = ["rnn_backward_kernel", "rnn_forward_kernel"]

_SIZES = ["T", "N", "R", "stride_t", "stride_n", "stream", "zero"]


@triton.jit(do_not_specialize=_SIZES)
def rnn_forward_kernel(
    xg, w_hh, bias, h0, y, gates, h_n, lengths, reset, offsets, seed,
    T, N, R, stride_t, stride_n, stream, zero,
    drop_threshold, drop_value, zone_h_threshold, zone_h_value,
    RELU: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HP: tl.constexpr, BT: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MODE: tl.constexpr, TRAINING: tl.constexpr, SEQUENCE: tl.constexpr, ZONE_H: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    xg += d * H
    w_hh += d * H * H
    y += d * H
    stream += (d * 16).to(tl.int32)
    w_h = weight_tile(w_hh, u, u, H, H, H, 1)
    if bias is not None:
        b = column(bias + d * H, u, H)
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    key = tl.load(seed) if TRAINING else 0
    h = cube(h0 + d * N * H, n, u, H, unit & inside[None, :])
    for s in range(T):
        w_now = w_hh + s * zero  # no loop invariant
        t = s + d.to(tl.int32) * (T - 1 - 2 * s)
        live = inside
        if lengths is not None:
            live = inside & (t < length)
        row = row_index(t, n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        h_prev = h
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_prev = tl.where(clear[None, :], 0.0, h)
        h_in = h_prev
        if MODE == "state":
            at = t * (1 - SEQUENCE)
            h_in *= factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
        z = product(w_h, w_now, u, u, H, H, H, 1, h_in, STREAM, PRECISION, WIDEN)
        z += cube(xg, row, u, D * H, mask)
        if bias is not None:
            z += b
        # In this form a NaN stays one.
        h_new = tl.where(z <= 0.0, 0.0, z) if RELU else tanh(z)
        if gates is not None:
            scatter(gates + d * R * H, row, u, H, h_new, mask)
        if ZONE_H:
            w = factor(key, stream + 1, t, n, u, zone_h_threshold, zone_h_value, TRAINING)
            h_new = w * h_new + (1.0 - w) * h_prev
        # Packed data have no rows past an end; elsewhere those rows are 0.
        written = (live if offsets is not None else inside)[None, :]
        save(y, row, u, D * H, h_new, live, unit & written)
        h = tl.where(live[None, :], h_new, h)
    scatter(h_n + d * N * H, n, u, H, h, unit & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def rnn_backward_kernel(
    w_hh, h0, y, gates, dy, dh_n, dz, h_ins, dh0, lengths, reset, offsets, seed,
    T, N, R, stride_t, stride_n, stream, zero,
    drop_threshold, drop_value, zone_h_threshold, zone_h_value,
    RELU: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HP: tl.constexpr, BT: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MODE: tl.constexpr, TRAINING: tl.constexpr, SEQUENCE: tl.constexpr, ZONE_H: tl.constexpr,
):  # fmt: skip
    """Writes dz (R, D*H), h_ins (R, D*H): the h that met w_hh, and dh0."""
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    w_hh += d * H * H
    dz += d * H
    y += d * H
    stream += (d * 16).to(tl.int32)
    w_h = weight_tile(w_hh, u, u, H, H, 1, H)
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    else:
        length = tl.zeros((BT,), tl.int64) + T
    key = tl.load(seed) if TRAINING else 0
    dh = tl.zeros((HP, BT), tl.float32)
    if dh_n is not None:
        dh += cube(dh_n + d * N * H, n, u, H, unit & inside[None, :])
    for k in range(T):
        s = T - 1 - k
        w_now = w_hh + s * zero  # no loop invariant
        t = s + d.to(tl.int32) * (T - 1 - 2 * s)
        live = inside & (t < length)
        row = row_index(t, n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        start = live & first_step(t, length, d > 0)
        t_prev = tl.minimum(tl.maximum(t - 1 + 2 * d.to(tl.int32), 0), T - 1)
        before = row_index(t_prev, n, offsets, stride_t, stride_n, offsets is not None)
        h_in = cube(y, before, u, D * H, unit & (live ^ start)[None, :])
        h_in += cube(h0 + d * N * H, n, u, H, unit & start[None, :])
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_in = tl.where(clear[None, :], 0.0, h_in)
        if MODE == "state":
            at = t * (1 - SEQUENCE)
            drop = factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
            h_in *= drop
        written = (live if offsets is not None else inside)[None, :]
        save(h_ins + d * H, row, u, D * H, h_in, live, unit & written)

        dh_new = dh
        if dy is not None:
            dh_new += cube(dy + d * H, row, u, D * H, mask)
        dh_old = tl.zeros((HP, BT), tl.float32)
        if ZONE_H:
            w = factor(key, stream + 1, t, n, u, zone_h_threshold, zone_h_value, TRAINING)
            dh_old = dh_new * (1.0 - w)
            dh_new *= w
        if gates is not None:
            h = cube(gates + d * R * H, row, u, H, mask)
        else:
            h = cube(y, row, u, D * H, mask)
        dz_h = tl.where(h <= 0.0, 0.0, dh_new) if RELU else dh_new * (1.0 - h * h)
        save(dz, row, u, D * H, dz_h, live, unit & written)
        da = product(w_h, w_now, u, u, H, H, 1, H, dz_h, STREAM, PRECISION, WIDEN)
        if MODE == "state":
            da *= drop
        dh_old += da
        if reset is not None:
            dh_old = tl.where(clear[None, :], 0.0, dh_old)
        dh = tl.where(live[None, :], dh_old, dh)
    scatter(dh0 + d * N * H, n, u, H, dh, unit & inside[None, :])
