"""GRU kernels, in both reset forms; structure and tensors as in ``lstm``.

xg (R, D*3H), w_hh (D, 3H, H), bias (D, 4H) float32: those of r and z, then of n's input side and of
its recurrent side; gates (D, R, 4H) float32: r, z, n and, with AFTER, u = W_hn h + b_hn, else 3H.
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

__all__ = ["gru_backward_kernel", "gru_forward_kernel"]

_SIZES = ["T", "N", "R", "stride_t", "stride_n", "stream", "zero"]


@triton.jit(do_not_specialize=_SIZES)
def gru_forward_kernel(
    xg, w_hh, bias, h0, y, gates, h_n, lengths, reset, offsets, seed,
    T, N, R, stride_t, stride_n, stream, zero,
    drop_threshold, drop_value, zone_h_threshold, zone_h_value,
    AFTER: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HP: tl.constexpr, BT: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MODE: tl.constexpr, TRAINING: tl.constexpr, SEQUENCE: tl.constexpr, ZONE_H: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    SLOTS: tl.constexpr = 4 if AFTER else 3
    xg += d * 3 * H
    w_hh += d * 3 * H * H
    y += d * H
    stream += (d * 16).to(tl.int32)
    w_r = weight_tile(w_hh, u, u, H, H, H, 1)
    w_z = weight_tile(w_hh + H * H, u, u, H, H, H, 1)
    w_n = weight_tile(w_hh + 2 * H * H, u, u, H, H, H, 1)
    if bias is not None:
        b_r = column(bias + d * 4 * H, u, H)
        b_z = column(bias + d * 4 * H + H, u, H)
        b_n = column(bias + d * 4 * H + 2 * H, u, H)
        b_u = column(bias + d * 4 * H + 3 * H, u, H)
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
        at = t * (1 - SEQUENCE)
        if MODE == "state":
            h_in *= factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
        z_r = product(w_r, w_now, u, u, H, H, H, 1, h_in, STREAM, PRECISION, WIDEN)
        z_r += cube(xg, row, u, D * 3 * H, mask)
        z_z = product(w_z, w_now + H * H, u, u, H, H, H, 1, h_in, STREAM, PRECISION, WIDEN)
        z_z += cube(xg + H, row, u, D * 3 * H, mask)
        z_n = cube(xg + 2 * H, row, u, D * 3 * H, mask)
        if bias is not None:
            z_r += b_r
            z_z += b_z
            z_n += b_n
        r = sigmoid(z_r)
        z = sigmoid(z_z)
        operand = h_in
        if not AFTER:
            operand = r * h_in
        v = product(w_n, w_now + 2 * H * H, u, u, H, H, H, 1, operand, STREAM, PRECISION, WIDEN)
        if bias is not None:
            v += b_u
        c = tanh(z_n + r * v) if AFTER else tanh(z_n + v)
        candidate = c
        if MODE == "update":
            candidate *= factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
        h_new = candidate + z * (h_prev - candidate)
        if ZONE_H:
            w = factor(key, stream + 1, t, n, u, zone_h_threshold, zone_h_value, TRAINING)
            h_new = w * h_new + (1.0 - w) * h_prev
        # Packed data have no rows past an end; elsewhere those rows are 0.
        written = (live if offsets is not None else inside)[None, :]
        save(y, row, u, D * H, h_new, live, unit & written)
        if gates is not None:
            tape = gates + d * R * SLOTS * H
            scatter(tape, row, u, SLOTS * H, r, mask)
            scatter(tape + H, row, u, SLOTS * H, z, mask)
            scatter(tape + 2 * H, row, u, SLOTS * H, c, mask)
            if AFTER:
                scatter(tape + 3 * H, row, u, SLOTS * H, v, mask)
        h = tl.where(live[None, :], h_new, h)
    scatter(h_n + d * N * H, n, u, H, h, unit & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def gru_backward_kernel(
    w_hh, h0, y, gates, dy, dh_n, dz, h_ins, products, dh0, lengths, reset, offsets, seed,
    T, N, R, stride_t, stride_n, stream, zero,
    drop_threshold, drop_value, zone_h_threshold, zone_h_value,
    AFTER: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HP: tl.constexpr, BT: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MODE: tl.constexpr, TRAINING: tl.constexpr, SEQUENCE: tl.constexpr, ZONE_H: tl.constexpr,
):  # fmt: skip
    """Writes h_ins (R, D*H): the h that met w_hh, dh0, and dz. With AFTER dz is (R, D*4H): of n's
    input side, r, z and n's recurrent side; else (R, D*3H): of n, r and z, and products (R, D*H)
    gets r * h, which met W_hn."""
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    SLOTS: tl.constexpr = 4 if AFTER else 3
    w_hh += d * 3 * H * H
    dz += d * SLOTS * H
    tape = gates + d * R * SLOTS * H
    y += d * H
    stream += (d * 16).to(tl.int32)
    w_r = weight_tile(w_hh, u, u, H, H, 1, H)
    w_z = weight_tile(w_hh + H * H, u, u, H, H, 1, H)
    w_n = weight_tile(w_hh + 2 * H * H, u, u, H, H, 1, H)
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
        h_prev = cube(y, before, u, D * H, unit & (live ^ start)[None, :])
        h_prev += cube(h0 + d * N * H, n, u, H, unit & start[None, :])
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_prev = tl.where(clear[None, :], 0.0, h_prev)
        at = t * (1 - SEQUENCE)
        h_in = h_prev
        if MODE == "state":
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
        r = cube(tape, row, u, SLOTS * H, mask)
        z = cube(tape + H, row, u, SLOTS * H, mask)
        c = cube(tape + 2 * H, row, u, SLOTS * H, mask)
        dh_old += dh_new * z
        candidate = c
        dc = dh_new * (1.0 - z)
        if MODE == "update":
            drop = factor(key, stream, at, n, u, drop_threshold, drop_value, TRAINING)
            candidate *= drop
            dc *= drop
        dz_z = dh_new * (h_prev - candidate) * z * (1.0 - z)
        dz_n = dc * (1.0 - c * c)
        if AFTER:
            v = cube(tape + 3 * H, row, u, SLOTS * H, mask)
            dv = dz_n * r
            dz_r = dz_n * v * r * (1.0 - r)
            da = product(w_n, w_now + 2 * H * H, u, u, H, H, 1, H, dv, STREAM, PRECISION, WIDEN)
            save(dz + 3 * H, row, u, D * SLOTS * H, dv, live, unit & written)
        else:
            da = product(w_n, w_now + 2 * H * H, u, u, H, H, 1, H, dz_n, STREAM, PRECISION, WIDEN)
            dz_r = da * h_in * r * (1.0 - r)
            da *= r
            save(products + d * H, row, u, D * H, r * h_in, live, unit & written)
        save(dz, row, u, D * SLOTS * H, dz_n, live, unit & written)
        save(dz + H, row, u, D * SLOTS * H, dz_r, live, unit & written)
        save(dz + 2 * H, row, u, D * SLOTS * H, dz_z, live, unit & written)
        da += product(w_r, w_now, u, u, H, H, 1, H, dz_r, STREAM, PRECISION, WIDEN)
        da += product(w_z, w_now + H * H, u, u, H, H, 1, H, dz_z, STREAM, PRECISION, WIDEN)
        if MODE == "state":
            da *= drop
        dh_old += da
        if reset is not None:
            dh_old = tl.where(clear[None, :], 0.0, dh_old)
        dh = tl.where(live[None, :], dh_old, dh)
    scatter(dh0 + d * N * H, n, u, H, dh, unit & inside[None, :])
