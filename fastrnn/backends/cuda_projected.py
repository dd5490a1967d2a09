"""LSTM layers with projection on the native CUDA library; ``fastrnn.backends.cuda`` calls these.

Steps are those of the plain LSTM, with two exchanges each. Rows of h are P wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid, states_before
from fastrnn.backends.cuda_native import Launcher, Need, launcher_of, padded
from fastrnn.backends.cuda_terms import (
    Arriving,
    Kept,
    input_gradients,
    input_terms,
    weight_list,
)
from fastrnn.backends.rows import Weights

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w: Weights,
    grid: Grid,
    need: Need,
    want_cells: bool,
    want_gates: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, c_n, cells, gates; None for what the call does not want."""
    directions, hidden, out = w.directions, w.hidden, w.out
    h0, c0 = h0.contiguous(), c0.contiguous()
    y = x.new_empty((grid.count, directions * out))
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    cells = gates = None
    if want_cells:
        cells = x.new_empty((grid.count, directions * hidden), dtype=torch.float32)
    if want_gates:
        gates = x.new_empty((directions, grid.count, 4 * hidden))
    if grid.size:
        launcher = launcher_of(need, x, False, plan)
        wx, _ = input_terms(x, grid, w, "lstm")
        addresses = launcher.pack(w.w_hh, w.w_hr)
        wide, narrow = padded(hidden, x.dtype), padded(out, x.dtype)
        middle = x.new_empty((grid.count, directions * wide))
        # h is exchanged in the output itself where its rows are whole vectors.
        states = y if narrow == out else x.new_empty((grid.count, directions * narrow))
        for mail in (middle, states):
            launcher.prepare_mail(mail)
        for first, end in launcher.parts(grid.size):
            fields: list[int] = []
            for d in range(directions):
                fields += [addresses[d], *(grid.state(t, d, first) for t in (h0, c0, h_n, c_n))]
                fields += grid.at(wx, d * 4 * hidden, first) + grid.at(y, d * out, first)
                fields += grid.at(None if gates is None else gates[d], 0, first)
                fields += grid.at(cells, d * hidden, first)
                fields += grid.at(middle, d * wide, first) + grid.at(states, d * narrow, first)
            launcher.start("projected_forward", grid, (first, end), fields, out)
    y = grid.gather(y).view(*x.shape[:-1], directions * out)
    if cells is not None:
        cells = grid.gather(cells).view(*x.shape[:-1], directions * hidden)
    return y, h_n, c_n, cells, gates


def backward(
    launcher: Launcher,
    grid: Grid,
    w: Weights,
    x: Tensor,
    kept: Kept,
    arriving: Arriving,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor]]:
    """dx, dh0, dc0 and the gradients of the weights in their order."""
    directions, hidden, out = w.directions, w.hidden, w.out
    y, cells, gates, h0, c0 = kept
    assert c0 is not None
    assert gates is not None
    dgates = x.new_empty((grid.count, directions * 4 * hidden))
    dh = x.new_empty((grid.count, directions * out))
    middle = x.new_empty((grid.count, directions * hidden))
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0)
    addresses = launcher.pack(w.w_hh, w.w_hr)
    wide, narrow = padded(hidden, x.dtype), padded(out, x.dtype)
    gradients = dgates if wide == hidden else x.new_empty((grid.count, directions * 4 * wide))
    states = dh if narrow == out else x.new_empty((grid.count, directions * narrow))
    for mail in (gradients, states):
        launcher.prepare_mail(mail)
    for first, end in launcher.parts(grid.size):
        fields: list[int] = []
        for d in range(directions):
            initial = (c0, arriving.dh_n, arriving.dc_n, dh0, dc0)
            fields += [addresses[d], *(grid.state(t, d, first) for t in initial)]
            fields += grid.at(arriving.dy, d * out, first)
            fields += grid.at(arriving.dcells, d * hidden, first)
            fields += grid.at(gates[d], 0, first) + grid.at(cells, d * hidden, first)
            fields += grid.at(dgates, d * 4 * hidden, first) + grid.at(dh, d * out, first)
            fields += grid.at(middle, d * hidden, first)
            fields += grid.at(gradients, d * 4 * wide, first)
            fields += grid.at(states, d * narrow, first)
        launcher.start("projected_backward", grid, (first, end), fields, out)
    dx, dw_ih = input_gradients(x, grid, w, grid.gather(dgates), need_dx, need_dw)
    if not need_dw:
        return dx, dh0, dc0, []
    dw_hh, dw_hr, biases = [], [], []
    for d in range(directions):
        own = dgates[:, d * 4 * hidden : (d + 1) * 4 * hidden]
        before = states_before(grid, y[:, d * out : (d + 1) * out], h0[d], d == 1)
        dw_hh.append(torch.mm(own.t(), before))
        own_dh = dh[:, d * out : (d + 1) * out]
        dw_hr.append(torch.mm(own_dh.t(), middle[:, d * hidden : (d + 1) * hidden]))
        if w.b_ih:
            biases.append(own.sum(0))
    copies = [b.clone() for b in biases]
    return dx, dh0, dc0, weight_list(dw_ih, dw_hh, biases, copies, dw_hr)
