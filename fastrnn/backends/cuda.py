"""LSTM, GRU and RNN layers on the native CUDA library: the operators of ``fastrnn.ops.layer``.

The time loop is one launch for both directions (several where the batch does not fit on the device
at once), or every step is launched by itself (``fastrnn.backends.cuda_steps``). Products over all
steps at once (input terms, gradients of input and weights) are torch's, before and after it. The
tape holds activated gates in the layer's own dtype. Weights are packed in each call: their order
depends on the kernel, which depends on the batch.

The plan is "cuda", or "cuda,<exchange>" for kernels of one exchange only (docs/cuda-kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.backends import cuda_layer_norm, cuda_projected, cuda_steps
from fastrnn.backends.cuda_grid import Grid, states_before
from fastrnn.backends.cuda_native import (
    Launcher,
    Need,
    launcher_of,
    on_its_device,
    padded,
    with_next_plan,
)
from fastrnn.backends.cuda_need import layer_need
from fastrnn.backends.cuda_noise import Regulariser
from fastrnn.backends.cuda_steps import NormedInput
from fastrnn.backends.cuda_terms import (
    Arriving,
    Kept,
    input_gradients,
    input_terms,
    split_bias,
    weight_list,
)
from fastrnn.backends.rows import Weights, dense
from fastrnn.kinds import KINDS
from fastrnn.noise import tape_slots

__all__ = ["layer_backward", "layer_forward", "layer_forward_train", "tape_width"]

_Forward = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

# Gates whose gradients the phases of a step publish in backward: first, count (core/geometry.h).
_PUBLISHED = {"gru_reset_before": ((2, 1), (0, 2))}


def _need(w: Weights, x: Tensor, cell: str, size: int, noise: Regulariser, plan: str) -> Need:
    """What a kernel is chosen by; modules have told the reasons of what is refused before."""
    return layer_need(
        cell, x.dtype, size, w.hidden, w.directions, out=w.out if w.w_hr else 0,
        regularised=noise.acts, exchange=plan.partition(",")[2],
    )  # fmt: skip


def tape_width(need: Need, cell: str, noise: str, plan: str) -> int:
    """Elements of a row of the tape."""
    itemsize = need.dtype.itemsize
    if need.out or need.normed:
        return cuda_steps.tape_columns(cell, need.hidden, itemsize, bool(need.out))[2]
    statistics = 12 // itemsize if KINDS[cell].norms else 0  # three float32
    return tape_slots(cell, noise, plan) * need.hidden + statistics


def _input_terms(x: Tensor, grid: Grid, w: Weights, cell: str) -> tuple[Tensor, list[Tensor]]:
    """W_ih x, normalised where the layer is, and the biases added to it, (rows, D*G*H), and b_hn of
    each direction of a GRU."""
    if not w.norms:
        return input_terms(x, grid, w, cell)
    bias, inner = split_bias(w, cell.startswith("gru"))
    normed = NormedInput(grid.rows.flat(x), w)
    return grid.spread(normed.terms(bias).to(x.dtype)), inner


def _forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    want_cells: bool,
    want_gates: bool,
    plan: str,
    seed: Tensor | None,
    noise: str,
) -> _Forward:
    """y, h_n, c_n, cells, gates; None for what the cell or the call does not have."""
    directions, size, _ = h0.shape
    w = Weights(weights, cell, directions)
    drawn = Regulariser(noise, seed, x)
    need = _need(w, x, cell, size, drawn, plan)
    grid = Grid(x, size, batch_sizes, lengths, reset, batch_first)
    if need.cell == "lstm_projected":
        assert c0 is not None
        return cuda_projected.forward(x, h0, c0, w, grid, need, want_cells, want_gates, plan)
    if need.cell.endswith("_layer_norm"):
        norms = [norm for own in w.norms for norm in own]
        return cuda_layer_norm.forward(
            x, h0, c0, w, norms, grid, need, want_cells, want_gates, plan
        )
    hidden, width = w.hidden, tape_width(need, cell, noise, plan) if want_gates else 0
    h0, c0 = h0.contiguous(), dense(c0)
    y = x.new_empty((grid.count, directions * w.out))
    h_n = torch.empty_like(h0)
    c_n = None if c0 is None else torch.empty_like(c0)
    cells = gates = None
    if c0 is not None and want_cells:
        cells = x.new_empty((grid.count, directions * hidden), dtype=torch.float32)
    if width:
        gates = x.new_empty((directions, grid.count, width))
    if size:
        launcher = launcher_of(need, x, False, plan)
        wx, inner = _input_terms(x, grid, w, cell)
    if size and launcher.plan.exchange == "steps":
        states = (h0, c0, h_n, c_n)
        cuda_steps.forward(launcher, drawn, grid, w, cell, wx, inner, states, y, gates, cells)
    elif size:
        addresses = launcher.pack(w.w_hh)
        masked = drawn.initial(launcher, grid, h0) if drawn.masks_state else None
        phases = 2 if cell == "gru_reset_before" else 1
        wide = padded(hidden, x.dtype)
        # The mail of the last phase is the output itself, where its rows are whole vectors and
        # states are exchanged as they are.
        shared = launcher.plan.through_memory and wide == hidden and masked is None
        private = []
        if launcher.plan.through_memory:
            private = [
                x.new_empty((grid.count, directions * wide)) for _ in range(phases - int(shared))
            ]
            for mail in (*private, *([y] if shared else [])):
                launcher.prepare_mail(mail)
        for first, end in launcher.parts(size):
            fields: list[int] = []
            of_first: list[int] = []
            for d in range(directions):
                of_first.append(grid.state(masked, d, first))
                fields += [addresses[d], inner[d].data_ptr() if inner else 0]
                fields += [grid.state(t, d, first) for t in (h0, c0, h_n, c_n)]
                fields += grid.at(wx, d * w.gates * hidden, first)
                fields += grid.at(y, d * hidden, first)
                fields += grid.at(None if gates is None else gates[d], 0, first)
                fields += grid.at(cells, d * hidden, first)
                mails = [grid.at(mail, d * wide, first) for mail in private]
                mails += [grid.at(y, d * hidden, first)] * shared
                fields += [field for mail in (mails + [[0, 0, 0]] * 2)[:2] for field in mail]
            if drawn.acts:
                noisy = (drawn.fields(first), tuple(of_first))
                launcher.start("regularised_forward", grid, (first, end), fields, *noisy)
            else:
                launcher.start("forward", grid, (first, end), fields)
    y = grid.gather(y).view(*x.shape[:-1], directions * w.out)
    if cells is not None:
        cells = grid.gather(cells).view(*x.shape[:-1], directions * hidden)
    return y, h_n, c_n, cells, gates


@on_its_device
@with_next_plan
def layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    return_cells: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return _forward(
        x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, return_cells, False,
        plan, seed, noise,
    )[:4]  # fmt: skip


@on_its_device
@with_next_plan
def layer_forward_train(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    recompute: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> _Forward:
    return _forward(
        x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, True, not recompute,
        plan, seed, noise,
    )  # fmt: skip


@on_its_device
@with_next_plan
def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    cells: Tensor | None,
    gates: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    directions, size, _ = h0.shape
    w = Weights(weights, cell, directions)
    drawn = Regulariser(noise, seed, x)
    need = _need(w, x, cell, size, drawn, plan)
    if not size:
        zeros = [torch.zeros_like(t) for t in weights] if need_dw else []
        dc0 = torch.empty_like(c0) if need_dstate and c0 is not None else None
        dx = torch.empty_like(x) if need_dx else None
        return dx, torch.empty_like(h0) if need_dstate else None, dc0, zeros
    width = tape_width(need, cell, noise, plan)
    if not width:
        gates = None
    elif gates is None or not gates.numel():
        gates = _forward(
            x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, False, True,
            plan, seed, noise,
        )[4]  # fmt: skip
    elif gates.size(-1) != width:
        raise RuntimeError(
            f"the tape has {gates.size(-1)} values a row, expected {width}: the driver has refused "
            "the kernels that wrote it since, and others would run the backward; call the forward "
            "again"
        )
    grid = Grid(x, size, batch_sizes, lengths, reset, batch_first)
    # A hook on what is saved may have given it other strides.
    h0, c0, gates = h0.contiguous(), dense(c0), dense(gates)
    states = grid.spread(grid.rows.flat(y).contiguous())
    launcher = launcher_of(need, x, True, plan)
    kept = Kept(
        states,
        None if cells is None or c0 is None else grid.spread(grid.rows.flat(cells).contiguous()),
        gates,
        h0,
        c0,
    )
    arriving = Arriving(
        None if dy is None else grid.spread(grid.rows.flat(dy.to(x.dtype)).contiguous()),
        None if dcells is None else grid.spread(grid.rows.flat(dcells.float()).contiguous()),
        dense(dh_n),
        dense(dc_n),
    )
    if need.cell == "lstm_projected":
        dx, dh0, dc0, dweights = cuda_projected.backward(
            launcher, grid, w, x, kept, arriving, need_dx, need_dw
        )
        return dx, dh0 if need_dstate else None, dc0 if need_dstate else None, dweights
    if need.cell.endswith("_layer_norm"):
        norms = [norm for own in w.norms for norm in own]
        dx, dh0, dc0, dweights = cuda_layer_norm.backward(
            launcher, grid, w, norms, x, kept, arriving, need_dx, need_dw
        )
        return dx, dh0 if need_dstate else None, dc0 if need_dstate else None, dweights
    dy, dcells, dh_n, dc_n = arriving
    if launcher.plan.exchange == "steps":
        found = cuda_steps.backward(
            launcher, drawn, grid, w, cell, states, (h0, c0, dh_n, dc_n), kept.cells, gates, dy,
            dcells,
        )  # fmt: skip
    else:
        found = _gate_gradients(
            launcher, drawn, grid, w, cell, x, states, h0, c0, kept.cells, gates, *arriving
        )
    dgates, recurrent, dh0, dc0 = found[:4]
    # In the rows of x: packed data have fewer.
    own, dgain = grid.gather(dgates), None
    if w.norms:
        raw, dgain = NormedInput(grid.rows.without_padding(x), w).backward(own)
        own = raw.to(x.dtype)
    dx, dw_ih = input_gradients(x, grid, w, own, need_dx, need_dw)
    dweights = []
    if need_dw:
        dw_hh = _recurrent_products(launcher, drawn, grid, w, cell, recurrent, states, h0, gates)
        db_ih = list(dgates.sum(0).chunk(directions)) if w.b_ih else []
        db_hh = list(recurrent.sum(0).chunk(directions)) if w.b_ih else []
        dw_hr = [
            _projection_product(grid, w, cell, found, gates, d) for d in range(directions) if w.w_hr
        ]
        of_norms: list[list[Tensor]] = []
        if dgain is not None:
            assert gates is not None
            biases, norm_gradients = cuda_steps.norm_gradients(grid, w, cell, found, gates)
            db_hh = [b.to(x.dtype) for b in biases] if w.b_ih else []
            each = [[dgain[d], *norm_gradients[d]] for d in range(directions)]
            of_norms = [[g.to(x.dtype) for g in kind] for kind in zip(*each, strict=True)]
        dweights = weight_list(dw_ih, dw_hh, db_ih, db_hh, dw_hr, *of_norms)
    if not need_dstate:
        return dx, None, None, dweights
    return dx, dh0, dc0, dweights


def _gate_gradients(
    launcher: Launcher,
    drawn: Regulariser,
    grid: Grid,
    w: Weights,
    cell: str,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    cells: Tensor | None,
    gates: Tensor | None,
    dy: Tensor | None,
    dcells: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
) -> cuda_steps.Gradients:
    """Gradients of the gates' input terms and of their recurrent ones, which differ for a GRU only;
    and of the initial states."""
    directions, hidden, twofold = w.directions, w.hidden, cell == "gru"
    dgates = x.new_empty((grid.count, directions * w.gates * hidden))
    recurrent = torch.empty_like(dgates) if twofold else dgates
    dh0 = torch.empty_like(h0)
    dc0 = None if c0 is None else torch.empty_like(c0)
    addresses = launcher.pack(w.w_hh)
    published = _PUBLISHED.get(cell, ((0, w.gates),))
    wide = padded(hidden, x.dtype)
    shared = launcher.plan.through_memory and wide == hidden
    private = []
    if launcher.plan.through_memory and not shared:
        private = [x.new_empty((grid.count, directions * n * wide)) for _, n in published]
    for mail in [recurrent] * shared or private:
        launcher.prepare_mail(mail)
    for first, end in launcher.parts(grid.size):
        fields: list[int] = []
        for d in range(directions):
            column = d * w.gates * hidden
            fields += [int(shared), addresses[d]]
            fields += [grid.state(t, d, first) for t in (h0, c0, dh_n, dc_n, dh0, dc0)]
            fields += grid.at(dy, d * hidden, first) + grid.at(dcells, d * hidden, first)
            fields += grid.at(y, d * hidden, first)
            fields += grid.at(None if gates is None else gates[d], 0, first)
            fields += grid.at(cells, d * hidden, first)
            fields += grid.at(dgates, column, first)
            fields += grid.at(recurrent if twofold else None, column, first)
            mails = [grid.at(recurrent, column + k * hidden, first) for k, _ in published] * shared
            for mail, (_, n) in zip(private, published, strict=False):
                mails.append(grid.at(mail, d * n * wide, first))
            fields += [field for mail in (mails + [[0, 0, 0]] * 2)[:2] for field in mail]
        if drawn.acts:
            noisy = drawn.fields(first)
            launcher.start("regularised_backward", grid, (first, end), fields, noisy)
        else:
            launcher.start("backward", grid, (first, end), fields)
    return cuda_steps.Gradients(dgates, recurrent, dh0, dc0, None, None)


def _projection_product(
    grid: Grid, w: Weights, cell: str, found: cuda_steps.Gradients, gates: Tensor | None, d: int
) -> Tensor:
    """Gradient of W_hr."""
    assert found.dmid is not None
    assert gates is not None
    middle = cuda_steps.tape_columns(cell, w.hidden, gates.element_size(), True)[0]
    mid = grid.without_padding(gates[d][:, middle : middle + w.hidden])
    return torch.mm(found.dmid[:, d * w.out : (d + 1) * w.out].t(), mid)


def _recurrent_products(
    launcher: Launcher,
    drawn: Regulariser,
    grid: Grid,
    w: Weights,
    cell: str,
    recurrent: Tensor,
    y: Tensor,
    h0: Tensor,
    gates: Tensor | None,
) -> list[Tensor]:
    """Gradients of W_hh of each direction."""
    found = []
    hidden = w.hidden
    for d, own in enumerate(recurrent.chunk(w.directions, 1)):
        before = states_before(grid, y[:, d * w.out : (d + 1) * w.out], h0[d], d == 1)
        if drawn.masks_state:
            before = drawn.of_steps(launcher, grid, before, d)
        if cell != "gru_reset_before":
            found.append(torch.mm(own.t(), before))
            continue
        # The candidate's matrix multiplies r * h; no tape was written past a sequence's end.
        assert gates is not None
        factor = grid.without_padding(gates[d][:, :hidden])
        gated = torch.mm(own[:, : 2 * hidden].t(), before)
        found.append(torch.cat([gated, torch.mm(own[:, 2 * hidden :].t(), factor * before)]))
    return found
