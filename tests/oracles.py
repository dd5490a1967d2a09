"""Independent oracles: one sequence, one direction, NumPy scalars and explicit loops.

Written from the formulas alone, they share no line with fastrnn.reference, not even the handling
of lengths and resets: the caller passes one sequence cut to its own length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _logistic(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v))


def _dot(row: Array, vector: list[float]) -> float:
    return sum(float(w) * v for w, v in zip(row, vector, strict=True))


def gru(
    x: Array,
    h0: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array,
    b_hh: Array,
    *,
    reset_after: bool,
    clears: list[bool],
    backwards: bool,
) -> tuple[Array, Array]:
    """x (T, I), h0 (H,), gate rows r, z, n; clears[t] zeroes h before step t -> y (T, H), h."""
    steps, size = x.shape[0], h0.shape[0]
    h = [float(v) for v in h0]
    y = np.zeros((steps, size))
    for t in sorted(range(steps), reverse=backwards):
        if clears[t]:
            h = [0.0] * size
        r, z, n = [0.0] * size, [0.0] * size, [0.0] * size
        for j in range(size):
            r[j] = _logistic(_dot(w_ih[j], list(x[t])) + b_ih[j] + _dot(w_hh[j], h) + b_hh[j])
            k = size + j
            z[j] = _logistic(_dot(w_ih[k], list(x[t])) + b_ih[k] + _dot(w_hh[k], h) + b_hh[k])
        for j in range(size):
            k = 2 * size + j
            from_input = _dot(w_ih[k], list(x[t])) + b_ih[k]
            if reset_after:
                from_state = r[j] * (_dot(w_hh[k], h) + b_hh[k])
            else:
                from_state = _dot(w_hh[k], [r[m] * h[m] for m in range(size)]) + b_hh[k]
            n[j] = math.tanh(from_input + from_state)
        h = [n[j] - z[j] * n[j] + z[j] * h[j] for j in range(size)]
        y[t] = h
    return y, np.array(h)


def lstm(
    x: Array,
    h0: Array,
    c0: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array,
    b_hh: Array,
    w_hr: Array | None,
    *,
    clears: list[bool],
    backwards: bool,
) -> tuple[Array, Array, Array, Array]:
    """x (T, I), gate rows i, f, g, o; w_hr (P, H) or None -> y (T, P|H), h, c, cells (T, H)."""
    steps, size = x.shape[0], c0.shape[0]
    h, c = [float(v) for v in h0], [float(v) for v in c0]
    y, cells = np.zeros((steps, len(h))), np.zeros((steps, size))
    for t in sorted(range(steps), reverse=backwards):
        if clears[t]:
            h, c = [0.0] * len(h), [0.0] * size
        a = [
            _dot(w_ih[k], list(x[t])) + b_ih[k] + _dot(w_hh[k], h) + b_hh[k]
            for k in range(4 * size)
        ]
        out = [0.0] * size
        for j in range(size):
            kept = _logistic(a[size + j]) * c[j]
            c[j] = kept + _logistic(a[j]) * math.tanh(a[2 * size + j])
            out[j] = _logistic(a[3 * size + j]) * math.tanh(c[j])
        h = out if w_hr is None else [_dot(row, out) for row in w_hr]
        y[t], cells[t] = h, c
    return y, np.array(h), np.array(c), cells


def rnn(
    x: Array,
    h0: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array,
    b_hh: Array,
    *,
    relu: bool,
    clears: list[bool],
    backwards: bool,
) -> tuple[Array, Array]:
    """x (T, I), h0 (H,) -> y (T, H), h (H,)."""
    steps, size = x.shape[0], h0.shape[0]
    h = [float(v) for v in h0]
    y = np.zeros((steps, size))
    for t in sorted(range(steps), reverse=backwards):
        if clears[t]:
            h = [0.0] * size
        a = [_dot(w_ih[j], list(x[t])) + b_ih[j] + _dot(w_hh[j], h) + b_hh[j] for j in range(size)]
        h = [max(v, 0.0) if relu else math.tanh(v) for v in a]
        y[t] = h
    return y, np.array(h)


def central_difference(loss: Callable[[], float], values: Array, step: float = 1e-5) -> Array:
    """d loss / d values, element by element; ``loss`` reads ``values`` in place."""
    grad = np.zeros_like(values)
    for index in np.ndindex(values.shape):
        kept = values[index]
        values[index] = kept + step
        above = loss()
        values[index] = kept - step
        grad[index] = (above - loss()) / (2 * step)
        values[index] = kept
    return grad
