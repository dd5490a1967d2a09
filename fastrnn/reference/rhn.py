"""Recurrent Highway Network: one layer, one direction, in plain PyTorch.

For every step t, with s_0 = y_{t-1} and l = 1 .. L micro-steps of the state, gate order h, t[, c]:

    h_l = tanh   ([l = 1] (m_x * x_t) W_h^T + (m_s * s_{l-1}) R_{h,l}^T + b_{h,l})
    t_l = sigmoid([l = 1] (m_x * x_t) W_t^T + (m_s * s_{l-1}) R_{t,l}^T + b_{t,l})
    c_l = sigmoid([l = 1] (m_x * x_t) W_c^T + (m_s * s_{l-1}) R_{c,l}^T + b_{c,l})
    or, with a coupled carry, c_l = 1 - t_l
    s_l = h_l * t_l + s_{l-1} * c_l
    y_t = s_L

The carry sees the state without the mask m_s.

Sources: Zilly, Srivastava, Koutnik and Schmidhuber 2017 (arXiv:1607.03474); variational masks
of Gal and Ghahramani 2016 (arXiv:1512.05287).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.reference._steps import activations, freeze, make_steps, stack_steps

__all__ = ["rhn_layer"]


def rhn_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    x_mask: Tensor | None = None,
    s_mask: Tensor | None = None,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    linear: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one direction of a Recurrent Highway layer.

    Args:
        x: (T, N, I), padded where ``lengths`` is given; values past an end are never read.
        h0: (N, H).
        weights: w_ih (G*H, I), w_hh (L, G*H, H)[, bias (L, G*H)]; G = 2 gates h, t with a coupled
            carry, G = 3 gates h, t, c without. Depth and G are read from these shapes.
        x_mask, s_mask: (g, N, I) and (g, N, H), multiplied into x_t and into the state wherever
            they enter a matrix product, at every step and depth; g = 1 for one mask that all
            gates share, g = G for one each. None: no mask.
        reverse: process t = T-1 .. 0.
        lengths: (N,) integers; row n is frozen at every t >= lengths[n]: its state is kept and y
            is 0 there.
        reset: (T, N) bool; where True, the state is zeroed before step t is processed, in either
            direction, unless the row is frozen.
        linear: tests only; sigmoid(a) becomes 0.5 + 0.25 a and tanh(a) becomes a.

    Returns:
        y (T, N, H), h_n (N, H).
    """
    w_ih, w_hh, *biases = weights
    depth, rows, hidden = w_hh.shape
    gates = rows // hidden
    sigmoid, tanh = activations(linear)
    w_inputs = w_ih.chunk(gates)
    w_states = [w.chunk(gates) for w in w_hh.unbind(0)]
    bias = [b.chunk(gates) for b in biases[0].unbind(0)] if biases else [[None] * gates] * depth

    def masked(value: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The operand of each gate."""
        if mask is None:
            return [value] * gates
        operands = [value * m for m in mask.unbind(0)]
        return operands * gates if len(operands) == 1 else operands

    state = h0
    ys: list[Tensor] = []
    for step in make_steps(x, lengths, reset, reverse):
        s = step.start(state)
        inputs = masked(step.x, x_mask)
        for level in range(depth):
            a = [
                torch.nn.functional.linear(u, w, b)
                for u, w, b in zip(masked(s, s_mask), w_states[level], bias[level], strict=True)
            ]
            if level == 0:
                terms = zip(a, inputs, w_inputs, strict=True)
                a = [z + torch.nn.functional.linear(u, w) for z, u, w in terms]
            h, t = tanh(a[0]), sigmoid(a[1])
            c = sigmoid(a[2]) if gates == 3 else 1 - t
            s = h * t + s * c
        state, y = freeze(step, s, state)
        ys.append(y)
    return stack_steps(ys, state, x, reverse), state
