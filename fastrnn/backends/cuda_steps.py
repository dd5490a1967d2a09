"""Layers whose steps are launched one by one (csrc/cuda/steps): any size, projections, layer norm.

The products over all steps at once stay with ``fastrnn.backends.cuda``; here is what one call of
the library is told, and what layer norm adds before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid
from fastrnn.backends.cuda_native import Launcher
from fastrnn.backends.cuda_noise import Regulariser
from fastrnn.backends.rows import Weights
from fastrnn.kinds import KINDS

__all__ = ["Gradients", "NormedInput", "backward", "forward", "norm_gradients", "tape_columns"]

_EPS = 1e-5


class Gradients(NamedTuple):
    """What the library leaves, in the kernels' rows.

    Attributes:
        dgates: of the gates' input terms, (rows, D*G*H).
        recurrent: of their recurrent ones, before their norm.
        dmid: of the states as the projection made them, (rows, D*O).
        dm: of the normalised cell times its gain plus its bias, (rows, D*H).
    """

    dgates: Tensor
    recurrent: Tensor
    dh0: Tensor
    dc0: Tensor | None
    dmid: Tensor | None
    dm: Tensor | None


def tape_columns(cell: str, hidden: int, itemsize: int, projected: bool) -> tuple[int, int, int]:
    """Where a tape row has what the projection multiplied and the scales of the norms, and its
    width: activated gates come first, then the normalised terms of each gate and of the cell."""
    plain = KINDS[cell.removesuffix("_layer_norm")]
    normed = cell.endswith("_layer_norm")
    slots = plain.tape + (plain.gates + plain.has_cell if normed else 0)
    middle = slots * hidden
    width = middle + (hidden if projected else 0)
    if not normed:
        return middle, 0, width
    # Two float32, aligned.
    each = 8 // itemsize
    scales = -(-width // each) * each
    return middle, scales, scales + each


class NormedInput:
    """The normalised input terms of all directions; x's rows, zero past the ends."""

    def __init__(self, flat: Tensor, w: Weights) -> None:
        self.width = w.gates * w.hidden
        product = torch.mm(flat, w.inputs().t()).float().view(-1, w.directions, self.width)
        self.raw = product
        self.hat, self.mean, self.scale = torch.native_layer_norm(
            product, [self.width], None, None, _EPS
        )
        self.gain = torch.stack([n[0] for n in w.norms]).float()

    def terms(self, bias: Tensor | None) -> Tensor:
        """(rows, D*G*H); bias: (D, G*H)."""
        scaled = self.hat * self.gain
        return (scaled if bias is None else scaled + bias).flatten(1)

    def backward(self, dz: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the raw products (rows, D*G*H) and of the gains (D, G*H)."""
        dz = dz.float().view_as(self.hat)
        found = torch.ops.aten.native_layer_norm_backward(
            dz * self.gain, self.raw, [self.width], self.mean, self.scale, None, None,
            [True, False, False],
        )[0]  # fmt: skip
        return found.flatten(1), (dz * self.hat).sum(0)


def _call(
    run: str,
    launcher: Launcher,
    drawn: Regulariser,
    grid: Grid,
    w: Weights,
    normed: bool,
    directions: Sequence[int],
) -> None:
    reset = grid.reset_of(0, grid.size)
    shape = (
        grid.steps, grid.size, w.hidden, w.out if w.w_hr else 0, w.directions, normed,
        grid.lengths_at(0), 0 if reset is None else reset.data_ptr(),
    )  # fmt: skip
    matrices = [m.contiguous() for m in w.w_hh]
    projections = [m.contiguous() for m in w.w_hr]
    addresses: list[int] = []
    for d, matrix in enumerate(matrices):
        addresses += [matrix.data_ptr(), projections[d].data_ptr() if projections else 0]
    launcher.steps(run, shape, tuple(addresses), directions, drawn.fields(0))


def _norms(w: Weights, d: int, keep: list[Tensor]) -> list[int]:
    """Addresses of the gains of the recurrent term and of the cell, and the cell's bias."""
    found = [0, 0, 0]
    for i, norm in enumerate(w.norms[d][1:] if w.norms else ()):
        keep.append(norm.float().contiguous())
        found[i] = keep[-1].data_ptr()
    return found


def _scales(grid: Grid, tape: Tensor | None, column: int) -> list[int]:
    if tape is None or not column:
        return [0, 0, 0]
    address, stride_t, stride_n = grid.at(tape, column, 0)
    return [address, stride_t * tape.element_size() // 4, stride_n * tape.element_size() // 4]


def forward(
    launcher: Launcher,
    drawn: Regulariser,
    grid: Grid,
    w: Weights,
    cell: str,
    wx: Tensor,
    inner: Sequence[Tensor],
    states: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    y: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
) -> None:
    """All steps; ``states``: h0, c0, h_n, c_n. Writes y, gates, cells and the final states."""
    projected, keep = bool(w.w_hr), list(inner)
    middle, scales, _ = tape_columns(cell, w.hidden, y.element_size(), projected)
    fields: list[int] = []
    for d in range(w.directions):
        tape = None if gates is None else gates[d]
        fields += [inner[d].data_ptr() if inner else 0, *_norms(w, d, keep)]
        fields += [grid.state(t, d, 0) for t in states]
        fields += grid.at(wx, d * w.gates * w.hidden, 0) + grid.at(y, d * w.out, 0)
        fields += grid.at(tape, 0, 0) + grid.at(cells, d * w.hidden, 0)
        fields += grid.at(tape if projected else None, middle, 0) + _scales(grid, tape, scales)
    _call("steps_forward", launcher, drawn, grid, w, bool(w.norms), fields)


def backward(
    launcher: Launcher,
    drawn: Regulariser,
    grid: Grid,
    w: Weights,
    cell: str,
    y: Tensor,
    states: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    cells: Tensor | None,
    gates: Tensor | None,
    dy: Tensor | None,
    dcells: Tensor | None,
) -> Gradients:
    """All steps backward; ``states``: h0, c0, dh_n, dc_n."""
    h0, c0 = states[:2]
    hidden, normed, projected = w.hidden, bool(w.norms), bool(w.w_hr)
    dgates = y.new_empty((grid.count, w.directions * w.gates * hidden))
    recurrent = torch.empty_like(dgates) if cell == "gru" or normed else dgates
    dh0 = torch.empty_like(h0)
    dc0 = None if c0 is None else torch.empty_like(c0)
    dmid = y.new_empty((grid.count, w.directions * w.out)) if projected else None
    dm = y.new_empty((grid.count, w.directions * hidden)) if normed and c0 is not None else None
    scales = tape_columns(cell, hidden, y.element_size(), projected)[1]
    fields: list[int] = []
    keep: list[Tensor] = []
    for d in range(w.directions):
        column, tape = d * w.gates * hidden, None if gates is None else gates[d]
        fields += _norms(w, d, keep)
        fields += [grid.state(t, d, 0) for t in (*states, dh0, dc0)]
        fields += grid.at(dy, d * w.out, 0) + grid.at(dcells, d * hidden, 0)
        fields += grid.at(y, d * w.out, 0) + grid.at(tape, 0, 0) + grid.at(cells, d * hidden, 0)
        fields += _scales(grid, tape, scales) + grid.at(dgates, column, 0)
        fields += grid.at(None if recurrent is dgates else recurrent, column, 0)
        fields += grid.at(dmid, d * w.out, 0) + grid.at(dm, d * hidden, 0)
    _call("steps_backward", launcher, drawn, grid, w, normed, fields)
    return Gradients(dgates, recurrent, dh0, dc0, dmid, dm)


def norm_gradients(
    grid: Grid, w: Weights, cell: str, found: Gradients, gates: Tensor
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Of each direction: that of b_hh (G*H), and those of the recurrent term's gain and, of an
    LSTM, the cell's gain and bias."""
    biases, norms = [], []
    plain = KINDS[cell.removesuffix("_layer_norm")]
    hidden, width = w.hidden, w.gates * w.hidden
    for d in range(w.directions):
        # No tape was written past a sequence's end.
        tape = grid.without_padding(gates[d]).float()
        at = plain.tape * hidden
        dz = found.dgates[:, d * width : (d + 1) * width].float()
        if not plain.has_cell:  # the candidate's recurrent part is behind the reset gate
            n = dz[:, 2 * hidden :] * tape[:, :hidden]
            dz = torch.cat([dz[:, : 2 * hidden], n], 1)
        biases.append(dz.sum(0))
        own = [(dz * tape[:, at : at + width]).sum(0)]
        if plain.has_cell:
            assert found.dm is not None
            dm = found.dm[:, d * hidden : (d + 1) * hidden].float()
            own += [(dm * tape[:, at + width : at + width + hidden]).sum(0), dm.sum(0)]
        norms.append(own)
    return biases, norms
