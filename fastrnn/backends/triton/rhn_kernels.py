"""Recurrent Highway Network kernels; structure and tensors as in ``lstm``.

With depth L and G gates h, t[, c]: xg (R, D*G*H), w_hh (D, L, G*H, H), bias (D, L, G*H),
s_mask (D, g, N, H), gates (D, L, R, G*H) float32: activated. Weights are read in every micro-step:
which ones is a run-time index, and the cache of an SM keeps what a register file could not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrnn.backends.triton.common import (
    column,
    cube,
    first_step,
    product,
    row_index,
    save,
    scatter,
    sigmoid,
    tanh,
)

__all__ = ["rhn_backward_kernel", "rhn_forward_kernel"]

_SIZES = ["T", "N", "R", "stride_t", "stride_n", "zero"]


@triton.jit(do_not_specialize=_SIZES)
def rhn_forward_kernel(
    xg, w_hh, bias, s_mask, h0, y, gates, h_n, lengths, reset, offsets,
    T, N, R, stride_t, stride_n, zero,
    H: tl.constexpr, L: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr,
    HP: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    in_batch = unit & inside[None, :]
    xg += d * G * H
    w_hh += d * L * G * H * H
    y += d * H
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    if GROUPS > 0:
        m_h = cube(s_mask + d * GROUPS * N * H, n, u, H, in_batch)
        m_t = m_h
        m_c = m_h
        if GROUPS > 1:
            m_t = cube(s_mask + (d * GROUPS + 1) * N * H, n, u, H, in_batch)
            if G == 3:
                m_c = cube(s_mask + (d * GROUPS + 2) * N * H, n, u, H, in_batch)
    kept = tl.zeros((HP, HP), w_hh.dtype.element_ty)
    h = cube(h0 + d * N * H, n, u, H, in_batch)
    for s in range(T):
        t = s + d.to(tl.int32) * (T - 1 - 2 * s)
        live = inside
        if lengths is not None:
            live = inside & (t < length)
        row = row_index(t, n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        state = h
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            state = tl.where(clear[None, :], 0.0, h)
        for level in range(L):
            w = w_hh + level * G * H * H + s * zero  # no loop invariant
            fed = mask & (u * 0 + level == 0)[:, None]  # in the interpreter level is no tensor
            s_h = state
            s_t = state
            s_c = state
            if GROUPS > 0:
                s_h = state * m_h
                s_t = state * m_t
                s_c = state * m_c
            z_h = product(kept, w, u, u, H, H, H, 1, s_h, True, PRECISION, WIDEN)
            z_h += cube(xg, row, u, D * G * H, fed)
            z_t = product(kept, w + H * H, u, u, H, H, H, 1, s_t, True, PRECISION, WIDEN)
            z_t += cube(xg + H, row, u, D * G * H, fed)
            if bias is not None:
                b = bias + (d * L + level) * G * H
                z_h += column(b, u, H)
                z_t += column(b + H, u, H)
            candidate = tanh(z_h)
            transform = sigmoid(z_t)
            carry = 1.0 - transform
            if G == 3:
                z_c = product(kept, w + 2 * H * H, u, u, H, H, H, 1, s_c, True, PRECISION, WIDEN)
                z_c += cube(xg + 2 * H, row, u, D * G * H, fed)
                if bias is not None:
                    z_c += column(b + 2 * H, u, H)
                carry = sigmoid(z_c)
            state = candidate * transform + state * carry
            if gates is not None:
                tape = gates + (d * L + level) * R * G * H
                scatter(tape, row, u, G * H, candidate, mask)
                scatter(tape + H, row, u, G * H, transform, mask)
                if G == 3:
                    scatter(tape + 2 * H, row, u, G * H, carry, mask)
        written = (live if offsets is not None else inside)[None, :]
        save(y, row, u, D * H, state, live, unit & written)
        h = tl.where(live[None, :], state, h)
    scatter(h_n + d * N * H, n, u, H, h, in_batch)


@triton.jit(do_not_specialize=_SIZES)
def rhn_backward_kernel(
    w_hh, s_mask, h0, y, gates, dy, dh_n, dz, states, dh0, lengths, reset, offsets,
    T, N, R, stride_t, stride_n, zero,
    H: tl.constexpr, L: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr,
    HP: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Writes dz (D, L, R, G*H), states (D, L, R, H) float32: what each micro-step began with, and
    dh0."""
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    u = tl.arange(0, HP)
    inside = n < N
    unit = (u < H)[:, None]
    in_batch = unit & inside[None, :]
    w_hh += d * L * G * H * H
    y += d * H
    if lengths is not None:
        length = tl.load(lengths + n, mask=inside, other=0)
    else:
        length = tl.zeros((BT,), tl.int64) + T
    if GROUPS > 0:
        m_h = cube(s_mask + d * GROUPS * N * H, n, u, H, in_batch)
        m_t = m_h
        m_c = m_h
        if GROUPS > 1:
            m_t = cube(s_mask + (d * GROUPS + 1) * N * H, n, u, H, in_batch)
            if G == 3:
                m_c = cube(s_mask + (d * GROUPS + 2) * N * H, n, u, H, in_batch)
    kept = tl.zeros((HP, HP), w_hh.dtype.element_ty)
    dh = tl.zeros((HP, BT), tl.float32)
    if dh_n is not None:
        dh += cube(dh_n + d * N * H, n, u, H, in_batch)
    for k in range(T):
        s = T - 1 - k
        t = s + d.to(tl.int32) * (T - 1 - 2 * s)
        live = inside & (t < length)
        row = row_index(t, n, offsets, stride_t, stride_n, offsets is not None)
        mask = unit & live[None, :]
        written = unit & (live if offsets is not None else inside)[None, :]
        start = live & first_step(t, length, d > 0)
        t_prev = tl.minimum(tl.maximum(t - 1 + 2 * d.to(tl.int32), 0), T - 1)
        before = row_index(t_prev, n, offsets, stride_t, stride_n, offsets is not None)
        state = cube(y, before, u, D * H, unit & (live ^ start)[None, :])
        state += cube(h0 + d * N * H, n, u, H, unit & start[None, :])
        if reset is not None:
            clear = tl.load(reset + row, mask=live, other=0) != 0
            state = tl.where(clear[None, :], 0.0, state)
        # Upwards once more: which state a micro-step began with is not on the tape.
        for level in range(L):
            save(states + (d * L + level) * R * H, row, u, H, state, live, written)
            tape = gates + (d * L + level) * R * G * H
            candidate = cube(tape, row, u, G * H, mask)
            transform = cube(tape + H, row, u, G * H, mask)
            carry = 1.0 - transform
            if G == 3:
                carry = cube(tape + 2 * H, row, u, G * H, mask)
            state = candidate * transform + state * carry
        # Other threads may have written what a thread reads below.
        tl.debug_barrier()
        ds = dh
        if dy is not None:
            ds += cube(dy + d * H, row, u, D * H, mask)
        for up in range(L):
            level = L - 1 - up
            w = w_hh + level * G * H * H + s * zero  # no loop invariant
            tape = gates + (d * L + level) * R * G * H
            began = cube(states + (d * L + level) * R * H, row, u, H, mask)
            candidate = cube(tape, row, u, G * H, mask)
            transform = cube(tape + H, row, u, G * H, mask)
            dz_h = ds * transform * (1.0 - candidate * candidate)
            if G == 3:
                carry = cube(tape + 2 * H, row, u, G * H, mask)
                dz_t = ds * candidate * transform * (1.0 - transform)
                dz_c = ds * began * carry * (1.0 - carry)
            else:
                carry = 1.0 - transform
                dz_t = ds * (candidate - began) * transform * (1.0 - transform)
            out = dz + (d * L + level) * R * G * H
            save(out, row, u, G * H, dz_h, live, written)
            save(out + H, row, u, G * H, dz_t, live, written)
            da = product(kept, w, u, u, H, H, 1, H, dz_h, True, PRECISION, WIDEN)
            if GROUPS > 0:
                da *= m_h
            da_t = product(kept, w + H * H, u, u, H, H, 1, H, dz_t, True, PRECISION, WIDEN)
            if GROUPS > 0:
                da_t *= m_t
            da += da_t
            if G == 3:
                save(out + 2 * H, row, u, G * H, dz_c, live, written)
                da_c = product(kept, w + 2 * H * H, u, u, H, H, 1, H, dz_c, True, PRECISION, WIDEN)
                if GROUPS > 0:
                    da_c *= m_c
                da += da_c
            ds = ds * carry + da
        if reset is not None:
            ds = tl.where(clear[None, :], 0.0, ds)
        dh = tl.where(live[None, :], ds, dh)
    scatter(dh0 + d * N * H, n, u, H, dh, in_batch)
