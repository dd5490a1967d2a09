"""Elman RNN with tanh or relu: one layer, one direction, in plain PyTorch.

For every step t:

    h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)      f = tanh or relu

Sources: Elman 1990; parameters of torch.nn.RNN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.reference._steps import activations, freeze, make_steps, stack_steps
from fastrnn.reference.masks import NO_MASKS, Masks, mixed, scaled

__all__ = ["rnn_layer"]


def rnn_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    linear: bool = False,
    masks: Masks = NO_MASKS,
) -> tuple[Tensor, Tensor]:
    """Run one direction of an Elman RNN layer.

    Args:
        x: (T, N, I), padded where ``lengths`` is given; values past an end are never read.
        h0: (N, H).
        weights: w_ih (H, I), w_hh (H, H)[, b_ih (H), b_hh (H)].
        nonlinearity: "tanh" or "relu".
        reverse: process t = T-1 .. 0.
        lengths: (N,) integers; row n is frozen at every t >= lengths[n]: its state is kept and y
            is 0 there.
        reset: (T, N) bool; where True, h is zeroed before step t is processed, in either
            direction, unless the row is frozen.
        linear: tests only; the activation becomes the identity.
        masks: recurrent dropout and zoneout, see ``fastrnn.reference.masks``.

    Returns:
        y (T, N, H), h_n (N, H).

    Raises:
        ValueError: ``nonlinearity`` is neither "tanh" nor "relu".
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: got {nonlinearity!r}, expected 'tanh' or 'relu'")
    w_ih, w_hh, *biases = weights
    bias = biases[0] + biases[1] if biases else None
    _, tanh = activations(linear)
    f = torch.relu if nonlinearity == "relu" and not linear else tanh

    h = h0
    ys: list[Tensor] = []
    for step in make_steps(x, lengths, reset, reverse):
        h_prev = step.start(h)
        a = torch.nn.functional.linear(step.x, w_ih, bias)
        h_new = f(a + torch.nn.functional.linear(scaled(masks.state, step.t, h_prev), w_hh))
        h, y = freeze(step, mixed(masks.zoneout_h, step.t, h_new, h_prev), h)
        ys.append(y)
    return stack_steps(ys, h, x, reverse), h
