"""Batch-normalised LSTM kernels: one program has the whole batch of one direction, so that the
statistics of a step are sums over a tile and no program waits for another.

Structure as in ``lstm``, but steps are counted from each sequence's own first one: step s of row n
is time s, and length - 1 - s backwards. bx (R, D*4H) is x W_i^T, tape (D, R, W): a^, and from W / 2
on b^. mean and var are (D, rows, width), used_* (D, 2, T, width); all is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrnn.backends.triton.common import (
    column,
    cube,
    product,
    row_index,
    save,
    scatter,
    sigmoid,
    tanh,
    weight_tile,
)

__all__ = ["bnlstm_backward_kernel", "bnlstm_forward_kernel"]

_SIZES = ["T", "N", "R", "stride_t", "stride_n", "zero", "rows_ih", "rows_hh", "rows_c"]


@triton.jit
def _normalised(x, alive, count, mean, var, used, used_var, u, H, eps, BATCH: tl.constexpr):
    """x^ by the statistics of the live rows if there are two, else by those given; keeps them."""
    m = tl.load(mean + u, mask=u < H, other=0.0)
    v = tl.load(var + u, mask=u < H, other=1.0)
    if BATCH:
        # In two passes: the difference of two squares would cancel.
        own = tl.sum(x * alive, 1) / count
        apart = (x - own[:, None]) * alive
        m = tl.where(count >= 2.0, own, m)
        v = tl.where(count >= 2.0, tl.sum(apart * apart, 1) / count, v)
    if used is not None:
        tl.store(used + u, m, mask=u < H)
        tl.store(used + used_var + u, v, mask=u < H)
    return (x - m[:, None]) / tl.sqrt(v + eps)[:, None]


@triton.jit
def _backward(dy, hat, alive, count, var, u, H, eps, BATCH: tl.constexpr):
    """The gradient of u from that of u^; rows that are not live have 0 in dy."""
    if BATCH:
        both = tl.sum(dy, 1)[:, None] + hat * tl.sum(dy * hat, 1)[:, None]
        dy = tl.where(count >= 2.0, dy - alive * both / count, dy)
    return dy / tl.sqrt(tl.load(var + u, mask=u < H, other=1.0) + eps)[:, None]


@triton.jit(do_not_specialize=_SIZES)
def bnlstm_forward_kernel(
    bx, w_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c,
    mean_ih, var_ih, mean_hh, var_hh, mean_c, var_c, used_ih, used_hh, used_c,
    h0, c0, y, cells, tape, h_n, c_n, lengths, reset, offsets,
    T, N, R, stride_t, stride_n, zero, rows_ih, rows_hh, rows_c, eps,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HP: tl.constexpr, BT: tl.constexpr,
    BATCH: tl.constexpr, BATCH_IH: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    in_batch = unit & inside[None, :]
    bx += d * 4 * H
    w_hh += d * 4 * H * H
    y += d * H
    w_i = weight_tile(w_hh, u, u, H, H, H, 1)
    w_f = weight_tile(w_hh + H * H, u, u, H, H, H, 1)
    w_g = weight_tile(w_hh + 2 * H * H, u, u, H, H, H, 1)
    w_o = weight_tile(w_hh + 3 * H * H, u, u, H, H, H, 1)
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    else:
        length = tl.where(inside, T, 0).to(tl.int64)
    h = cube(h0 + d * N * H, n, u, H, in_batch)
    c = cube(c0 + d * N * H, n, u, H, in_batch)
    for s in range(T):
        live = s < length
        # Past its end a row is at time s in either direction, to write its zeros.
        t = tl.where(live & (d > 0), length - 1 - s, s)
        row = row_index(tl.where(inside, t, 0), n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        alive = tl.where(live, 1.0, 0.0)[None, :]
        count = tl.sum(tl.where(live, 1.0, 0.0), 0)
        w_now = w_hh + s * zero  # no loop invariant
        h_prev = h
        c_prev = c
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_prev = tl.where(clear[None, :], 0.0, h)
            c_prev = tl.where(clear[None, :], 0.0, c)
        at_ih = (d * rows_ih + tl.minimum(s, rows_ih - 1)) * 4 * H
        at_hh = (d * rows_hh + tl.minimum(s, rows_hh - 1)) * 4 * H
        at_c = (d * rows_c + tl.minimum(s, rows_c - 1)) * H
        use_ih = None
        use_hh = None
        use_c = None
        if used_c is not None:
            use_hh = used_hh + (d * 2 * T + s) * 4 * H
            use_c = used_c + (d * 2 * T + s) * H
            if used_ih is not None:
                use_ih = used_ih + (d * 2 * T + s) * 4 * H
        z_i = tl.zeros((HP, BT), tl.float32)
        z_f = z_i
        z_g = z_i
        z_o = z_i
        for gate in tl.static_range(4):
            kept = w_i if gate == 0 else w_f if gate == 1 else w_g if gate == 2 else w_o
            g = gate * H
            a = product(kept, w_now + g * H, u, u, H, H, H, 1, h_prev, STREAM, PRECISION, WIDEN)
            ig = None if use_ih is None else use_ih + g
            hg = None if use_hh is None else use_hh + g
            a = _normalised(
                a, alive, count, mean_hh + at_hh + g, var_hh + at_hh + g, hg, T * 4 * H, u, H, eps,
                BATCH,
            )  # fmt: skip
            b = cube(bx + g, row, u, D * 4 * H, mask)
            b = _normalised(
                b, alive, count, mean_ih + at_ih + g, var_ih + at_ih + g, ig, T * 4 * H, u, H, eps,
                BATCH_IH,
            )  # fmt: skip
            if tape is not None:
                scatter(tape + d * R * W + g, row, u, W, a, mask)
                scatter(tape + d * R * W + W // 2 + g, row, u, W, b, mask)
            z = column(gamma_hh + d * 4 * H + g, u, H) * a
            z += column(gamma_ih + d * 4 * H + g, u, H) * b
            if bias is not None:
                z += column(bias + d * 4 * H + g, u, H)
            if gate == 0:
                z_i = z
            if gate == 1:
                z_f = z
            if gate == 2:
                z_g = z
            if gate == 3:
                z_o = z
        c_new = sigmoid(z_f) * c_prev + sigmoid(z_i) * tanh(z_g)
        normal = _normalised(
            c_new, alive, count, mean_c + at_c, var_c + at_c, use_c, T * H, u, H, eps, BATCH
        )
        shifted = column(gamma_c + d * H, u, H) * normal + column(beta_c + d * H, u, H)
        h_new = sigmoid(z_o) * tanh(shifted)
        written = unit & (live if offsets is not None else inside)[None, :]
        save(y, row, u, D * H, h_new, live, written)
        if cells is not None:
            save(cells + d * H, row, u, D * H, c_new, live, written)
        h = tl.where(live[None, :], h_new, h)
        c = tl.where(live[None, :], c_new, c)
    scatter(h_n + d * N * H, n, u, H, h, in_batch)
    scatter(c_n + d * N * H, n, u, H, c, in_batch)


@triton.jit(do_not_specialize=_SIZES)
def bnlstm_backward_kernel(
    w_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c, used_ih, used_hh, used_c,
    h0, c0, y, cells, tape, dy, dh_n, dc_n, dcells,
    dz, da, db, h_ins, dh0, dc0, dgamma_c, dbeta_c, lengths, reset, offsets,
    T, N, R, stride_t, stride_n, zero, eps,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HP: tl.constexpr, BT: tl.constexpr,
    BATCH: tl.constexpr, SHARED_IH: tl.constexpr,
    STREAM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Writes dz, da and db (R, D*4H): of z, a and b; h_ins (R, D*H): the h that met w_hh; dgamma_c
    and dbeta_c (D, H); dh0, dc0. With SHARED_IH one statistic of b serves all steps: no db here."""
    d = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    in_batch = unit & inside[None, :]
    w_hh += d * 4 * H * H
    y += d * H
    cells += d * H
    a_hat = tape + d * R * W
    b_hat = tape + d * R * W + W // 2
    w_i = weight_tile(w_hh, u, u, H, H, 1, H)
    w_f = weight_tile(w_hh + H * H, u, u, H, H, 1, H)
    w_g = weight_tile(w_hh + 2 * H * H, u, u, H, H, 1, H)
    w_o = weight_tile(w_hh + 3 * H * H, u, u, H, H, 1, H)
    scale_c = column(gamma_c + d * H, u, H)
    shift_c = column(beta_c + d * H, u, H)
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    else:
        length = tl.where(inside, T, 0).to(tl.int64)
    dh = tl.zeros((HP, BT), tl.float32)
    dc = tl.zeros((HP, BT), tl.float32)
    if dh_n is not None:
        dh += cube(dh_n + d * N * H, n, u, H, in_batch)
    if dc_n is not None:
        dc += cube(dc_n + d * N * H, n, u, H, in_batch)
    sum_gamma = tl.zeros((HP,), tl.float32)
    sum_beta = tl.zeros((HP,), tl.float32)
    for k in range(T):
        s = T - 1 - k
        live = s < length
        backwards = live & (d > 0)
        t = tl.where(backwards, length - 1 - s, s)
        row = row_index(tl.where(inside, t, 0), n, offsets, stride_t, stride_n, offsets is not None)
        t_prev = tl.where(backwards, tl.minimum(t + 1, T - 1), tl.maximum(t - 1, 0))
        before = row_index(
            tl.where(inside, t_prev, 0), n, offsets, stride_t, stride_n, offsets is not None
        )
        mask = unit & live[None, :]
        written = unit & (live if offsets is not None else inside)[None, :]
        alive = tl.where(live, 1.0, 0.0)[None, :]
        count = tl.sum(tl.where(live, 1.0, 0.0), 0)
        w_now = w_hh + s * zero  # no loop invariant
        # Steps are counted from a row's own first one, so that all live rows begin at once.
        later = unit & (live & (length * 0 + s > 0))[None, :]
        start = unit & (live & (length * 0 + s == 0))[None, :]
        h_prev = cube(y, before, u, D * H, later)
        h_prev += cube(h0 + d * N * H, n, u, H, start)
        c_prev = cube(cells, before, u, D * H, later)
        c_prev += cube(c0 + d * N * H, n, u, H, start)
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            h_prev = tl.where(clear[None, :], 0.0, h_prev)
            c_prev = tl.where(clear[None, :], 0.0, c_prev)
        save(h_ins + d * H, row, u, D * H, h_prev, live, written)

        z_i = tl.zeros((HP, BT), tl.float32)
        z_f = z_i
        z_g = z_i
        z_o = z_i
        for gate in tl.static_range(4):
            g = gate * H
            z = column(gamma_hh + d * 4 * H + g, u, H) * cube(a_hat + g, row, u, W, mask)
            z += column(gamma_ih + d * 4 * H + g, u, H) * cube(b_hat + g, row, u, W, mask)
            if bias is not None:
                z += column(bias + d * 4 * H + g, u, H)
            if gate == 0:
                z_i = z
            if gate == 1:
                z_f = z
            if gate == 2:
                z_g = z
            if gate == 3:
                z_o = z
        i = sigmoid(z_i)
        f = sigmoid(z_f)
        g = tanh(z_g)
        o = sigmoid(z_o)
        use_c = used_c + (d * 2 * T + s) * H
        use_hh = used_hh + (d * 2 * T + T + s) * 4 * H
        var_c = tl.load(use_c + T * H + u, mask=u < H, other=1.0)
        normal = cube(cells, row, u, D * H, mask) - column(use_c, u, H)
        normal = normal / tl.sqrt(var_c + eps)[:, None] * alive
        q = tanh(scale_c * normal + shift_c)

        dh_now = dh
        dc_now = dc
        if dy is not None:
            dh_now += cube(dy + d * H, row, u, D * H, mask)
        if dcells is not None:
            dc_now += cube(dcells + d * H, row, u, D * H, mask)
        dm = dh_now * o * (1.0 - q * q) * alive
        sum_gamma += tl.sum(dm * normal, 1)
        sum_beta += tl.sum(dm, 1)
        dc_now += _backward(dm * scale_c, normal, alive, count, use_c + T * H, u, H, eps, BATCH)
        dz_i = dc_now * g * i * (1.0 - i) * alive
        dz_f = dc_now * c_prev * f * (1.0 - f) * alive
        dz_g = dc_now * i * (1.0 - g * g) * alive
        dz_o = dh_now * q * o * (1.0 - o) * alive
        dh_old = tl.zeros((HP, BT), tl.float32)
        for gate in tl.static_range(4):
            at = gate * H
            kept = w_i if gate == 0 else w_f if gate == 1 else w_g if gate == 2 else w_o
            own = dz_i if gate == 0 else dz_f if gate == 1 else dz_g if gate == 2 else dz_o
            save(dz + d * 4 * H + at, row, u, D * 4 * H, own, live, written)
            hat = cube(a_hat + at, row, u, W, mask)
            inner = own * column(gamma_hh + d * 4 * H + at, u, H)
            inner = _backward(inner, hat, alive, count, use_hh + at, u, H, eps, BATCH)
            save(da + d * 4 * H + at, row, u, D * 4 * H, inner, live, written)
            dh_old += product(
                kept, w_now + at * H, u, u, H, H, 1, H, inner, STREAM, PRECISION, WIDEN
            )
            if not SHARED_IH:
                use_ih = used_ih + (d * 2 * T + T + s) * 4 * H
                hat = cube(b_hat + at, row, u, W, mask)
                outer = own * column(gamma_ih + d * 4 * H + at, u, H)
                outer = _backward(outer, hat, alive, count, use_ih + at, u, H, eps, BATCH)
                save(db + d * 4 * H + at, row, u, D * 4 * H, outer, live, written)
        dc_old = dc_now * f
        if reset is not None:
            dh_old = tl.where(clear[None, :], 0.0, dh_old)
            dc_old = tl.where(clear[None, :], 0.0, dc_old)
        dh = tl.where(live[None, :], dh_old, dh)
        dc = tl.where(live[None, :], dc_old, dc)
    scatter(dh0 + d * N * H, n, u, H, dh, in_batch)
    scatter(dc0 + d * N * H, n, u, H, dc, in_batch)
    tl.store(dgamma_c + d * H + u, sum_gamma, mask=u < H)
    tl.store(dbeta_c + d * H + u, sum_beta, mask=u < H)
