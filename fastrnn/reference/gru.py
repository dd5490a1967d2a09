"""GRU in both reset forms: one layer, one direction, in plain PyTorch.

For every step t, with the gate rows of the weights in torch's order r, z, n:

    r = sigmoid(x_t W_ir^T + b_ir + h_{t-1} W_hr^T + b_hr)
    z = sigmoid(x_t W_iz^T + b_iz + h_{t-1} W_hz^T + b_hz)
    n = tanh(x_t W_in^T + b_in + r * (h_{t-1} W_hn^T + b_hn))      reset_after=True (torch, cuDNN)
    n = tanh(x_t W_in^T + b_in + (r * h_{t-1}) W_hn^T + b_hn)      reset_after=False
    h_t = (1 - z) * n + z * h_{t-1}

Sources: Cho et al. 2014 (arXiv:1406.1078), whose third version resets before the matrix product
and whose first resets after it; parameters and gate order of torch.nn.GRU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.reference._steps import activations, freeze, make_steps, normalised, stack_steps
from fastrnn.reference.masks import NO_MASKS, Masks, mixed, scaled

__all__ = ["gru_layer"]


def gru_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    linear: bool = False,
    masks: Masks = NO_MASKS,
    norm: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Run one direction of a GRU layer.

    Args:
        x: (T, N, I), padded where ``lengths`` is given; values past an end are never read.
        h0: (N, H).
        weights: w_ih (3H, I), w_hh (3H, H)[, b_ih (3H), b_hh (3H)].
        reset_after: apply the reset gate after the matrix product with h, as torch does.
        reverse: process t = T-1 .. 0.
        lengths: (N,) integers; row n is frozen at every t >= lengths[n]: its state is kept and y
            is 0 there.
        reset: (T, N) bool; where True, h is zeroed before step t is processed, in either
            direction, unless the row is frozen.
        linear: tests only; sigmoid(a) becomes 0.5 + 0.25 a and tanh(a) becomes a.
        masks: recurrent dropout and zoneout, see ``fastrnn.reference.masks``.
        norm: ln_ih and ln_hh (3H each), with reset_after only, or nothing for no layer norm.

    Returns:
        y (T, N, H), h_n (N, H).
    """
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases if biases else (None, None)
    w_hh_rz, w_hh_n = w_hh.tensor_split([2 * w_hh.shape[1]])
    b_hh_rz, b_hh_n = (None, None) if b_hh is None else b_hh.tensor_split([2 * w_hh.shape[1]])
    sigmoid, tanh = activations(linear)

    h = h0
    ys: list[Tensor] = []
    for step in make_steps(x, lengths, reset, reverse):
        h_prev = step.start(h)
        h_in = scaled(masks.state, step.t, h_prev)
        if norm:
            x_term = normalised(torch.nn.functional.linear(step.x, w_ih), norm[0], b_ih)
            h_term = normalised(torch.nn.functional.linear(h_in, w_hh), norm[1], b_hh)
            h_r, h_z, h_n = h_term.chunk(3, dim=-1)
        else:
            x_term = torch.nn.functional.linear(step.x, w_ih, b_ih)
            h_r, h_z = torch.nn.functional.linear(h_in, w_hh_rz, b_hh_rz).chunk(2, dim=-1)
        x_r, x_z, x_n = x_term.chunk(3, dim=-1)
        r = sigmoid(x_r + h_r)
        z = sigmoid(x_z + h_z)
        if norm:
            n = tanh(x_n + r * h_n)
        elif reset_after:
            n = tanh(x_n + r * torch.nn.functional.linear(h_in, w_hh_n, b_hh_n))
        else:
            n = tanh(x_n + torch.nn.functional.linear(r * h_in, w_hh_n, b_hh_n))
        h_new = (1 - z) * scaled(masks.update, step.t, n) + z * h_prev
        h, y = freeze(step, mixed(masks.zoneout_h, step.t, h_new, h_prev), h)
        ys.append(y)
    return stack_steps(ys, h, x, reverse), h
