"""LSTM kernels: one program walks all steps of one tile of batch rows in one direction.

The formulas are those of docs/maths.md. Tensors, with D directions and R rows (one for each step of
each sequence): xg (R, D*4H) input terms without bias, w_hh (D, 4H, P), bias (D, 4H) float32,
w_hr (D, P, H) or None, h0 and h_n (D, N, P), c0 and c_n (D, N, H), y (R, D*P), cells (R, D*H)
float32, gates (D, R, 4H) float32: activated i, f, g, o. P is H without a projection.
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
    sigmoid,
    tanh,
    weight_tile,
)

__all__ = ["lstm_backward_kernel", "lstm_forward_kernel"]

# Sizes that change from call to call: without a kernel of their own for 1 and for multiples of 16.
_SIZES = ["T", "N", "R", "stride_t", "stride_n", "stream", "zero"]


@triton.jit(do_not_specialize=_SIZES)
def lstm_forward_kernel(
    xg, w_hh, bias, w_hr, h0, c0, y, cells, gates, h_n, c_n, lengths, reset, offsets, seed,
    T, N, R, stride_t, stride_n, stream, zero,
    drop_threshold, drop_value, zone_h_threshold, zone_h_value, zone_c_threshold, zone_c_value,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    HP: tl.constexpr, PP: tl.constexpr, BT: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MODE: tl.constexpr, TRAINING: tl.constexpr, SEQUENCE: tl.constexpr,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    p = tl.arange(0, PP)
    inside = n < N
    unit = (u < H)[:, None]
    out = (p < P)[:, None]
    xg += d * 4 * H
    w_hh += d * 4 * H * P
    y += d * P
    stream += (d * 16).to(tl.int32)
    w_i = weight_tile(w_hh, u, p, H, P, P, 1)
    w_f = weight_tile(w_hh + H * P, u, p, H, P, P, 1)
    w_g = weight_tile(w_hh + 2 * H * P, u, p, H, P, P, 1)
    w_o = weight_tile(w_hh + 3 * H * P, u, p, H, P, P, 1)
    if w_hr is not None:
        w_hr += d * P * H
        w_r = weight_tile(w_hr, p, u, P, H, H, 1)
    if bias is not None:
        b_i = column(bias + d * 4 * H, u, H)
        b_f = column(bias + d * 4 * H + H, u, H)
        b_g = column(bias + d * 4 * H + 2 * H, u, H)
        b_o = column(bias + d * 4 * H + 3 * H, u, H)
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    key = tl.load(seed) if TRAINING else 0
    h = cube(h0 + d * N * P, n, p, P, out & inside[None, :])
    c = cube(c0 + d * N * H, n, u, H, unit & inside[None, :])
    for s in range(T):
        w_now = w_hh + s * zero  # no loop invariant
        t = s + d.to(tl.int32) * (T - 1 - 2 * s)
        live = inside
        if lengths is not None:
            live = inside & (t < length)
        row = row_index(t, n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        h_prev = h
        c_prev = c
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_prev = tl.where(clear[None, :], 0.0, h)
            c_prev = tl.where(clear[None, :], 0.0, c)
        h_in = h_prev
        at = t * (1 - SEQUENCE)
        if MODE == "state":
            h_in *= factor(key, stream, at, n, p, drop_threshold, drop_value, TRAINING)
        z_i = product(w_i, w_now, u, p, H, P, P, 1, h_in, STREAM, PRECISION, WIDEN)
        z_i += cube(xg, row, u, D * 4 * H, mask)
        z_f = product(w_f, w_now + H * P, u, p, H, P, P, 1, h_in, STREAM, PRECISION, WIDEN)
        z_f += cube(xg + H, row, u, D * 4 * H, mask)
        z_g = product(w_g, w_now + 2 * H * P, u, p, H, P, P, 1, h_in, STREAM, PRECISION, WIDEN)
        z_g += cube(xg + 2 * H, row, u, D * 4 * H, mask)
        z_o = product(w_o, w_now + 3 * H * P, u, p, H, P, P, 1, h_in, STREAM, PRECISION, WIDEN)
        z_o += cube(xg + 3 * H, row, u, D * 4 * H, mask)
        if bias is not None:
            z_i += b_i
            z_f += b_f
            z_g += b_g
            z_o += b_o
        i = sigmoid(z_i)
        f = sigmoid(z_f)
        g = tanh(z_g)
        o = sigmoid(z_o)
        update = i * g
        if MODE == "update":
            update *= factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
        c_new = f * c_prev + update
        if MODE == "cell":
            c_new *= factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
        h_new = o * tanh(c_new)
        if w_hr is not None:
            h_new = product(w_r, w_hr + s * zero, p, u, P, H, H, 1, h_new, STREAM, PRECISION, WIDEN)
        if ZONE_H:
            w = factor(key, stream + 1, t, n, p, zone_h_threshold, zone_h_value, TRAINING)
            h_new = w * h_new + (1.0 - w) * h_prev
        if ZONE_C:
            w = factor(key, stream + 2, t, n, u, zone_c_threshold, zone_c_value, TRAINING)
            c_new = w * c_new + (1.0 - w) * c_prev
        # Packed data have no rows past an end; elsewhere those rows are 0.
        written = (live if offsets is not None else inside)[None, :]
        save(y, row, p, D * P, h_new, live, out & written)
        if cells is not None:
            save(cells + d * H, row, u, D * H, c_new, live, unit & written)
        if gates is not None:
            tape = gates + d * R * 4 * H
            scatter(tape, row, u, 4 * H, i, mask)
            scatter(tape + H, row, u, 4 * H, f, mask)
            scatter(tape + 2 * H, row, u, 4 * H, g, mask)
            scatter(tape + 3 * H, row, u, 4 * H, o, mask)
        h = tl.where(live[None, :], h_new, h)
        c = tl.where(live[None, :], c_new, c)
    scatter(h_n + d * N * P, n, p, P, h, out & inside[None, :])
    scatter(c_n + d * N * H, n, u, H, c, unit & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def lstm_backward_kernel(
    w_hh, w_hr, h0, c0, y, cells, gates, dy, dh_n, dc_n, dcells, dz, h_ins, dh_out, dh0, dc0,
    outs, lengths, reset, offsets, seed,
    T, N, R, stride_t, stride_n, stream, zero,
    drop_threshold, drop_value, zone_h_threshold, zone_h_value, zone_c_threshold, zone_c_value,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    HP: tl.constexpr, PP: tl.constexpr, BT: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MODE: tl.constexpr, TRAINING: tl.constexpr, SEQUENCE: tl.constexpr,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr,
):  # fmt: skip
    """Writes dz (R, D*4H), h_ins (R, D*P): the h that met w_hh, dh0, dc0 and, with a projection,
    dh_out (R, D*P) and outs (R, D*H): its output's gradient and its input."""
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    p = tl.arange(0, PP)
    inside = n < N
    unit = (u < H)[:, None]
    out = (p < P)[:, None]
    w_hh += d * 4 * H * P
    dz += d * 4 * H
    tape = gates + d * R * 4 * H
    y += d * P
    cells += d * H
    stream += (d * 16).to(tl.int32)
    w_i = weight_tile(w_hh, p, u, P, H, 1, P)
    w_f = weight_tile(w_hh + H * P, p, u, P, H, 1, P)
    w_g = weight_tile(w_hh + 2 * H * P, p, u, P, H, 1, P)
    w_o = weight_tile(w_hh + 3 * H * P, p, u, P, H, 1, P)
    if w_hr is not None:
        w_hr += d * P * H
        w_r = weight_tile(w_hr, u, p, H, P, 1, H)
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    else:
        length = tl.zeros((BT,), tl.int64) + T
    key = tl.load(seed) if TRAINING else 0
    dh = tl.zeros((PP, BT), tl.float32)
    dc = tl.zeros((HP, BT), tl.float32)
    if dh_n is not None:
        dh += cube(dh_n + d * N * P, n, p, P, out & inside[None, :])
    if dc_n is not None:
        dc += cube(dc_n + d * N * H, n, u, H, unit & inside[None, :])
    for k in range(T):
        s = T - 1 - k
        w_now = w_hh + s * zero  # no loop invariant
        t = s + d.to(tl.int32) * (T - 1 - 2 * s)
        live = inside & (t < length)
        row = row_index(t, n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        out_mask = out & live[None, :]
        start = live & first_step(t, length, d > 0)
        t_prev = tl.maximum(t - 1 + 2 * d.to(tl.int32), 0)
        t_prev = tl.minimum(t_prev, T - 1)
        before = row_index(t_prev, n, offsets, stride_t, stride_n, offsets is not None)
        kept = live ^ start
        h_prev = cube(y, before, p, D * P, out & kept[None, :])
        h_prev += cube(h0 + d * N * P, n, p, P, out & start[None, :])
        c_prev = cube(cells, before, u, D * H, unit & kept[None, :])
        c_prev += cube(c0 + d * N * H, n, u, H, unit & start[None, :])
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_prev = tl.where(clear[None, :], 0.0, h_prev)
            c_prev = tl.where(clear[None, :], 0.0, c_prev)
        at = t * (1 - SEQUENCE)
        h_in = h_prev
        if MODE == "state":
            drop = factor(key, stream, at, n, p, drop_threshold, drop_value, TRAINING)
            h_in *= drop
        written = (live if offsets is not None else inside)[None, :]
        save(h_ins + d * P, row, p, D * P, h_in, live, out & written)

        dh_new = dh
        dc_new = dc
        if dy is not None:
            dh_new += cube(dy + d * P, row, p, D * P, out_mask)
        if dcells is not None:
            dc_new += cube(dcells + d * H, row, u, D * H, mask)
        dh_old = tl.zeros((PP, BT), tl.float32)
        dc_old = tl.zeros((HP, BT), tl.float32)
        if ZONE_H:
            w = factor(key, stream + 1, t, n, p, zone_h_threshold, zone_h_value, TRAINING)
            dh_old = dh_new * (1.0 - w)
            dh_new *= w
        if ZONE_C:
            w = factor(key, stream + 2, t, n, u, zone_c_threshold, zone_c_value, TRAINING)
            dc_old = dc_new * (1.0 - w)
            dc_new *= w
        i = cube(tape, row, u, 4 * H, mask)
        f = cube(tape + H, row, u, 4 * H, mask)
        g = cube(tape + 2 * H, row, u, 4 * H, mask)
        o = cube(tape + 3 * H, row, u, 4 * H, mask)
        update = i * g
        if MODE == "update":
            drop = factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
            update *= drop
        c = f * c_prev + update
        if MODE == "cell":
            drop = factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
            c *= drop
        q = tanh(c)
        dm = dh_new
        if w_hr is not None:
            save(dh_out + d * P, row, p, D * P, dh_new, live, out & written)
            save(outs + d * H, row, u, D * H, o * q, live, unit & written)
            dm = product(w_r, w_hr + s * zero, u, p, H, P, 1, H, dh_new, STREAM, PRECISION, WIDEN)
        dc_new += dm * o * (1.0 - q * q)
        if MODE == "cell":
            dc_new *= drop
        dz_o = dm * q * o * (1.0 - o)
        dz_f = dc_new * c_prev * f * (1.0 - f)
        dc_old += dc_new * f
        if MODE == "update":
            dc_new *= drop
        dz_i = dc_new * g * i * (1.0 - i)
        dz_g = dc_new * i * (1.0 - g * g)
        save(dz, row, u, D * 4 * H, dz_i, live, unit & written)
        save(dz + H, row, u, D * 4 * H, dz_f, live, unit & written)
        save(dz + 2 * H, row, u, D * 4 * H, dz_g, live, unit & written)
        save(dz + 3 * H, row, u, D * 4 * H, dz_o, live, unit & written)
        da = product(w_i, w_now, p, u, P, H, 1, P, dz_i, STREAM, PRECISION, WIDEN)
        da += product(w_f, w_now + H * P, p, u, P, H, 1, P, dz_f, STREAM, PRECISION, WIDEN)
        da += product(w_g, w_now + 2 * H * P, p, u, P, H, 1, P, dz_g, STREAM, PRECISION, WIDEN)
        da += product(w_o, w_now + 3 * H * P, p, u, P, H, 1, P, dz_o, STREAM, PRECISION, WIDEN)
        if MODE == "state":
            da *= drop
        dh_old += da
        if reset is not None:
            dh_old = tl.where(clear[None, :], 0.0, dh_old)
            dc_old = tl.where(clear[None, :], 0.0, dc_old)
        dh = tl.where(live[None, :], dh_old, dh)
        dc = tl.where(live[None, :], dc_old, dc)
    scatter(dh0 + d * N * P, n, p, P, dh, out & inside[None, :])
    scatter(dc0 + d * N * H, n, u, H, dc, unit & inside[None, :])
