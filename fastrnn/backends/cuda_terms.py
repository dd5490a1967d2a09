"""What the layers of the CUDA backend make of all steps at once, in torch: input terms before a
launch, gradients of input and input weights after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid
from fastrnn.backends.rows import Weights, alone

__all__ = ["Arriving", "Kept", "input_gradients", "input_terms", "split_bias", "weight_list"]


class Kept(NamedTuple):
    """What backward has of forward, by the kernels' rows: y, cells and tape; and initial states."""

    y: Tensor
    cells: Tensor | None
    gates: Tensor | None
    h0: Tensor
    c0: Tensor | None


class Arriving(NamedTuple):
    """Gradients of a layer's results, by the kernels' rows; None: zeros."""

    dy: Tensor | None
    dcells: Tensor | None
    dh_n: Tensor | None
    dc_n: Tensor | None


def split_bias(w: Weights, after: bool) -> tuple[Tensor | None, list[Tensor]]:
    """The biases that the input term has, (D, G*H) in float32, and b_hn of each direction where
    the reset gate multiplies it (``after``)."""
    if not w.b_ih:
        return None, []
    b_ih, b_hh = torch.stack(w.b_ih).float(), torch.stack(w.b_hh).float()
    inner: list[Tensor] = []
    if after:
        at = 2 * w.hidden
        inner = [b[at:].clone() for b in b_hh]
        b_hh = torch.cat([b_hh[:, :at], torch.zeros_like(b_hh[:, at:])], 1)
    return b_ih + b_hh, inner


def input_terms(x: Tensor, grid: Grid, w: Weights, cell: str) -> tuple[Tensor, list[Tensor]]:
    """W_ih x and the biases added to it, (rows, D*G*H), and b_hn of each direction of a GRU."""
    flat = grid.rows.flat(x)
    bias, inner = split_bias(w, cell == "gru")
    if bias is None:
        return grid.spread(torch.mm(flat, w.inputs().t())), []
    return grid.spread(torch.addmm(bias.to(x.dtype).flatten(), flat, w.inputs().t())), inner


def input_gradients(
    x: Tensor, grid: Grid, w: Weights, own: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dx, and dw_ih of each direction, from the input terms' gradients in the rows of x."""
    dx = torch.mm(own, w.inputs()).view(x.shape) if need_dx else None
    if not need_dw:
        return dx, []
    dw_ih = torch.mm(own.t(), grid.rows.without_padding(x)).chunk(w.directions)
    return dx, [alone(dw) for dw in dw_ih]


def weight_list(*kinds: list[Tensor]) -> list[Tensor]:
    """Gradients by kind, of each direction, in the order of a layer's weights; empty kinds are
    those that the layer does not have."""
    return [alone(dw) for own in zip(*(kind for kind in kinds if kind), strict=True) for dw in own]
