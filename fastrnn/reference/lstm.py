"""LSTM with optional projection: one layer, one direction, in plain PyTorch.

For every step t, with the gate rows of the weights in torch's order i, f, g, o:

    (a_i, a_f, a_g, a_o) = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh
    i = sigmoid(a_i)    f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)                     with projection: (o * tanh(c_t)) W_hr^T

With layer norm the two products and the cell on its way to the output are normalised, each over the
features of a row (all gates together), LN(u) = (u - mean(u)) / sqrt(var(u) + 1e-5), var biased:

    a   = LN(x_t W_ih^T) ln_ih + LN(h_{t-1} W_hh^T) ln_hh + b_ih + b_hh
    h_t = o * tanh(LN(c_t) ln_c + ln_bias_c)

Sources: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; projection of
Sak et al. 2014 (arXiv:1402.1128); parameters and gate order of torch.nn.LSTM; layer norm of Ba
et al. 2016 (arXiv:1607.06450), separate for the two products as in haste's layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.reference._steps import activations, freeze, make_steps, normalised, stack_steps
from fastrnn.reference.masks import NO_MASKS, Masks, mixed, scaled

__all__ = ["lstm_layer"]


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    linear: bool = False,
    masks: Masks = NO_MASKS,
    norm: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one direction of an LSTM layer.

    Args:
        x: (T, N, I), padded where ``lengths`` is given; values past an end are never read.
        h0: (N, Hout); Hout is H, or the projection size.
        c0: (N, H).
        weights: w_ih (4H, I), w_hh (4H, Hout)[, b_ih (4H), b_hh (4H)][, w_hr (Hout, H)].
        reverse: process t = T-1 .. 0.
        lengths: (N,) integers; row n is frozen at every t >= lengths[n]: its state is kept, y
            and cells are 0 there.
        reset: (T, N) bool; where True, h and c are zeroed before step t is processed, in either
            direction, unless the row is frozen.
        linear: tests only; sigmoid(a) becomes 0.5 + 0.25 a and tanh(a) becomes a.
        masks: recurrent dropout and zoneout, see ``fastrnn.reference.masks``.
        norm: ln_ih, ln_hh (4H each), ln_c and ln_bias_c (H), or nothing for no layer norm.

    Returns:
        y (T, N, Hout), h_n (N, Hout), c_n (N, H), cells (T, N, H).
    """
    w_ih, w_hh, *rest = weights
    w_hr = rest.pop() if len(rest) in (1, 3) else None
    bias = rest[0] + rest[1] if rest else None
    sigmoid, tanh = activations(linear)

    h, c = h0, c0
    ys: list[Tensor] = []
    cells: list[Tensor] = []
    for step in make_steps(x, lengths, reset, reverse):
        h_prev, c_prev = step.start(h), step.start(c)
        h_in = scaled(masks.state, step.t, h_prev)
        if norm:
            a = normalised(torch.nn.functional.linear(step.x, w_ih), norm[0], bias)
            a = a + normalised(torch.nn.functional.linear(h_in, w_hh), norm[1])
        else:
            a = torch.nn.functional.linear(step.x, w_ih, bias)
            a = a + torch.nn.functional.linear(h_in, w_hh)
        a_i, a_f, a_g, a_o = a.chunk(4, dim=-1)
        update = scaled(masks.update, step.t, sigmoid(a_i) * tanh(a_g))
        c_new = scaled(masks.cell, step.t, sigmoid(a_f) * c_prev + update)
        h_new = sigmoid(a_o) * tanh(normalised(c_new, *norm[2:]) if norm else c_new)
        if w_hr is not None:
            h_new = torch.nn.functional.linear(h_new, w_hr)
        h, y = freeze(step, mixed(masks.zoneout_h, step.t, h_new, h_prev), h)
        c, cell = freeze(step, mixed(masks.zoneout_c, step.t, c_new, c_prev), c)
        ys.append(y)
        cells.append(cell)
    return stack_steps(ys, h, x, reverse), h, c, stack_steps(cells, c, x, reverse)
