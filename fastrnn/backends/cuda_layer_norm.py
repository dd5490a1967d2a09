"""Layer-normalised LSTM and GRU layers on the native CUDA library; ``fastrnn.backends.cuda`` calls
these.

The input term is normalised here, over all steps at once, and so is its gradient; the norms inside
a step are the kernels'. Gains and biases get their gradients from sums over all steps.

The last 12 bytes of a row of the tape are three float32, ``row_statistics`` of the library:
1 / sqrt(var + eps) of the recurrent term, and for an LSTM mean and 1 / sqrt(var + eps) of the cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid, states_before
from fastrnn.backends.cuda_native import Launcher, Need, launcher_of, padded, pair_line
from fastrnn.backends.cuda_terms import Arriving, Kept, input_gradients, split_bias, weight_list
from fastrnn.backends.rows import Weights

__all__ = ["backward", "forward"]

_EPS = 1e-5  # as in csrc/cpu/layer.h
_STATISTICS = 3


class _Norms(NamedTuple):
    """Parameters of the norms in float32, each of all directions; gain_c and bias_c of an LSTM."""

    gain_x: Tensor
    gain_h: Tensor
    gain_c: Tensor | None
    bias_c: Tensor | None

    @staticmethod
    def of(norms: list[Tensor], directions: int) -> _Norms:
        per = len(norms) // directions
        kinds = [torch.stack(norms[i::per]).float() for i in range(per)]
        return _Norms(kinds[0], kinds[1], *(kinds[2:] or (None, None)))

    def addresses(self, inner: list[Tensor], d: int) -> list[int]:
        """Of one direction, as a launch takes them."""
        b_hn = inner[d] if inner else None
        own = [self.gain_h[d], b_hn, *(None if t is None else t[d] for t in self[2:])]
        return [0 if t is None else t.data_ptr() for t in own]


def _normalised_inputs(x: Tensor, grid: Grid, w: Weights) -> tuple[Tensor, Tensor]:
    """W_ih x with each row normalised, (rows of x, D, G*H), and 1 / sqrt(var + eps); float32."""
    term = torch.mm(grid.rows.flat(x), w.inputs().t()).float()
    term = term.view(-1, w.directions, w.gates * w.hidden)
    var, mean = torch.var_mean(term, -1, correction=0, keepdim=True)
    factor = torch.rsqrt(var + _EPS)
    return (term - mean) * factor, factor


def _pairs(x: Tensor, grid: Grid, w: Weights, launcher: Launcher) -> list[Tensor]:
    """The mail of the row statistics: of the recurrent term and the cell."""
    line = pair_line(w.hidden)
    found = []
    for _ in range(1 + (w.gates == 4)):
        found.append(x.new_empty((grid.count, w.directions * line), dtype=torch.float32))
        launcher.prepare_mail(found[-1])
    return found


def _pairs_at(pairs: list[Tensor], grid: Grid, w: Weights, d: int, first: int) -> list[int]:
    fields = [grid.at(mail, d * pair_line(w.hidden), first) for mail in pairs]
    return [field for mail in [*fields, [0, 0, 0]][:2] for field in mail]


def _statistics(gates: Tensor) -> Tensor:
    """The rows of one direction's tape as float32, whose last columns are the statistics."""
    return gates.view(torch.float32)


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w: Weights,
    norms: list[Tensor],
    grid: Grid,
    need: Need,
    want_cells: bool,
    want_gates: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, h_n, c_n, cells, gates; None for what the cell or the call does not have."""
    directions, hidden, rows = w.directions, w.hidden, w.gates * w.hidden
    h0 = h0.contiguous()
    c0 = None if c0 is None else c0.contiguous()
    y = x.new_empty((grid.count, directions * hidden))
    h_n = torch.empty_like(h0)
    c_n = None if c0 is None else torch.empty_like(c0)
    cells = gates = None
    if c0 is not None and want_cells:
        cells = x.new_empty((grid.count, directions * hidden), dtype=torch.float32)
    if want_gates:
        width = 2 * rows + _STATISTICS * 4 // x.dtype.itemsize
        gates = x.new_empty((directions, grid.count, width))
    if grid.size:
        launcher = launcher_of(need, x, False, plan)
        own = _Norms.of(norms, directions)
        bias, inner = split_bias(w, c0 is None)
        term = _normalised_inputs(x, grid, w)[0] * own.gain_x
        if bias is not None:
            term = term + bias
        wx = grid.spread(term.to(x.dtype).flatten(1))
        addresses = launcher.pack(w.w_hh)
        wide = padded(hidden, x.dtype)
        mail = y if wide == hidden else x.new_empty((grid.count, directions * wide))
        launcher.prepare_mail(mail)
        pairs = _pairs(x, grid, w, launcher)
        for first, end in launcher.parts(grid.size):
            fields: list[int] = []
            for d in range(directions):
                fields += [addresses[d], *own.addresses(inner, d)]
                fields += [grid.state(t, d, first) for t in (h0, c0, h_n, c_n)]
                fields += grid.at(wx, d * rows, first) + grid.at(y, d * hidden, first)
                fields += grid.at(None if gates is None else gates[d], 0, first)
                fields += grid.at(cells, d * hidden, first)
                fields += _statistics_at(gates, grid, d, first)
                fields += grid.at(mail, d * wide, first) + _pairs_at(pairs, grid, w, d, first)
            launcher.start("layer_norm_forward", grid, (first, end), fields, _EPS)
    y = grid.gather(y).view(*x.shape[:-1], directions * hidden)
    if cells is not None:
        cells = grid.gather(cells).view(y.shape)
    return y, h_n, c_n, cells, gates


def _statistics_at(gates: Tensor | None, grid: Grid, d: int, first: int) -> list[int]:
    if gates is None:
        return [0, 0, 0]
    own = _statistics(gates[d])
    return grid.at(own, own.size(1) - _STATISTICS, first)


def backward(
    launcher: Launcher,
    grid: Grid,
    w: Weights,
    norms: list[Tensor],
    x: Tensor,
    kept: Kept,
    arriving: Arriving,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """dx, dh0, dc0 and the gradients of the weights in their order."""
    directions, hidden, rows = w.directions, w.hidden, w.gates * w.hidden
    y, cells, gates, h0, c0 = kept
    assert gates is not None
    dgates = x.new_empty((grid.count, directions * rows))
    recurrent = torch.empty_like(dgates)
    dm = None if c0 is None else torch.empty_like(y)
    dh0 = torch.empty_like(h0)
    dc0 = None if c0 is None else torch.empty_like(c0)
    own = _Norms.of(norms, directions)
    _, inner = split_bias(w, c0 is None)
    addresses = launcher.pack(w.w_hh)
    wide = padded(hidden, x.dtype)
    mail = recurrent
    if wide != hidden:
        mail = x.new_empty((grid.count, directions * w.gates * wide))
    launcher.prepare_mail(mail)
    pairs = _pairs(x, grid, w, launcher)
    for first, end in launcher.parts(grid.size):
        fields: list[int] = []
        for d in range(directions):
            initial = (h0, c0, arriving.dh_n, arriving.dc_n, dh0, dc0)
            fields += [addresses[d], *own.addresses(inner, d)]
            fields += [grid.state(t, d, first) for t in initial]
            fields += grid.at(arriving.dy, d * hidden, first)
            fields += grid.at(arriving.dcells, d * hidden, first) + grid.at(y, d * hidden, first)
            fields += grid.at(gates[d], 0, first) + grid.at(cells, d * hidden, first)
            fields += _statistics_at(gates, grid, d, first)
            fields += grid.at(dgates, d * rows, first) + grid.at(recurrent, d * rows, first)
            fields += grid.at(dm, d * hidden, first)
            fields += grid.at(mail, d * w.gates * wide, first)
            fields += _pairs_at(pairs, grid, w, d, first)
        launcher.start("layer_norm_backward", grid, (first, end), fields)

    # Through the input term's norm, in the rows of x.
    hat, factor = _normalised_inputs(x, grid, w)
    dz = grid.gather(dgates).view(-1, directions, rows).float()
    gained = dz * own.gain_x
    term = gained - gained.mean(-1, keepdim=True) - hat * (gained * hat).mean(-1, keepdim=True)
    dterm = (term * factor).to(x.dtype).flatten(1)
    if grid.rows.lengths is not None and grid.index is None:
        # Past the end of a sequence the input may be anything.
        dead = grid.rows.padding(x.device).reshape(-1, 1)
        dterm = dterm.masked_fill(dead, 0.0)
        hat = hat.masked_fill(dead.unsqueeze(-1), 0.0)
    dx, dw_ih = input_gradients(x, grid, w, dterm, need_dx, need_dw)
    if not need_dw:
        return dx, dh0, dc0, []
    dtype = x.dtype
    gains_x = list((dz * hat).sum(0).to(dtype))
    b_ih, b_hh, dw_hh, gains_h, gains_c, biases_c = [], [], [], [], [], []
    for d in range(directions):
        before = states_before(grid, y[:, d * hidden : (d + 1) * hidden], h0[d], d == 1)
        dw_hh.append(torch.mm(recurrent[:, d * rows : (d + 1) * rows].t(), before))
        tape = grid.without_padding(gates[d][:, : 2 * rows]).float()
        inside = dgates[:, d * rows : (d + 1) * rows].float()
        b_ih.append(inside.sum(0).to(dtype))
        if c0 is None:  # the reset gate is between the candidate and its recurrent term
            inside = torch.cat(
                [inside[:, : 2 * hidden], inside[:, 2 * hidden :] * tape[:, :hidden]], 1
            )
        b_hh.append(inside.sum(0).to(dtype))
        gains_h.append((inside * tape[:, rows:]).sum(0).to(dtype))
        if dm is None or cells is None:
            continue
        statistics = _statistics(gates[d])[:, -2:]
        c_hat = (cells[:, d * hidden : (d + 1) * hidden] - statistics[:, :1]) * statistics[:, 1:]
        own_dm = dm[:, d * hidden : (d + 1) * hidden].float()
        gains_c.append((own_dm * grid.without_padding(c_hat)).sum(0).to(dtype))
        biases_c.append(own_dm.sum(0).to(dtype))
    if not w.b_ih:
        b_ih, b_hh = [], []
    return dx, dh0, dc0, weight_list(dw_ih, dw_hh, b_ih, b_hh, gains_x, gains_h, gains_c, biases_c)
