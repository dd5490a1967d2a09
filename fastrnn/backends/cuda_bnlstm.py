"""Batch-normalised LSTM layers on the native CUDA library: the operators of ``fastrnn.ops.bnlstm``.

The input term is normalised here, over all steps at once; statistics of the recurrent term and of
the cell are made inside the one launch or, where it cannot hold the layer, inside those of each
step, with the same tape. Sums over rows that are no recurrence are torch's. Statistics, cells and
sums are float32, the tape is in the tensors' dtype: activated gates, the normalised recurrent term
and the normalised input term, (T * N, 12 * H) by time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid, states_before
from fastrnn.backends.cuda_native import (
    Launcher,
    Need,
    launcher_of,
    on_its_device,
    padded,
    with_next_plan,
)
from fastrnn.backends.rows import dense

__all__ = ["bnlstm_backward", "bnlstm_forward"]

_TAPE = 12  # values per unit
_OF_KERNEL = 8


class _Layer:
    """Weights of a layer by kind and direction; vectors in float32."""

    def __init__(self, x: Tensor, h0: Tensor, weights: Sequence[Tensor]) -> None:
        self.directions, size, self.hidden = h0.shape
        per = len(weights) // self.directions

        def every(i: int) -> list[Tensor]:
            return [weights[d * per + i] for d in range(self.directions)]

        def vectors(i: int) -> list[Tensor]:
            return [v.float().contiguous() for v in every(i)]

        self.w_ih, self.w_hh = every(0), every(1)
        self.bias = vectors(2) if per == 7 else []
        self.gamma_x, self.gamma_h, self.gamma_c, self.beta_c = (
            vectors(i) for i in range(per - 4, per)
        )
        self.need = Need("bnlstm", x.dtype, size, self.hidden, self.directions)

    def inputs(self) -> Tensor:
        """(D*4H, I)."""
        return self.w_ih[0] if self.directions == 1 else torch.cat(self.w_ih)


class _Steps:
    """Rows by step: counted from each sequence's own first one, at its end in reverse."""

    def __init__(self, grid: Grid, batch: bool, device: torch.device) -> None:
        dead = grid.padding()
        self._dead, self._lengths, self._steps = dead, grid.lengths, grid.steps
        live = None if dead is None else ~dead
        # (T, 1) rows that reach each step, int32; None: all.
        self.alive = None if live is None else live.sum(1).to(torch.int32)
        self._size = grid.size
        self._batch = batch
        self._t = torch.arange(grid.steps, device=device).unsqueeze(1)

    def of(self, data: Tensor, reverse: bool) -> Tensor:
        """(T, N, width) by time as by step, and back."""
        if not reverse:
            return data
        if self._lengths is None:
            return data.flip(0)
        mirrored = torch.where(self._t < self._lengths, self._lengths - 1 - self._t, self._t)
        return data.gather(0, mirrored.unsqueeze(-1).expand_as(data).long())

    def given(self, rows: Tensor) -> Tensor:
        """(T, 1, width): row min(s, rows - 1) of given statistics."""
        return rows.float()[self._t.clamp(max=rows.size(0) - 1)]

    def live(self, data: Tensor) -> Tensor:
        """Zero where a sequence has ended."""
        return data if self._dead is None else data.masked_fill(self._dead, 0.0)

    def mean(self, data: Tensor, sequence: bool) -> Tensor:
        """(T, 1, width), or (1, 1, width) over all steps of a ``sequence``, over live rows."""
        total = self.live(data).sum((0, 1) if sequence else 1, keepdim=True)
        if self.alive is None:
            return total / (self._size * (self._steps if sequence else 1))
        count = self.alive.sum() if sequence else self.alive.clamp(min=1).unsqueeze(-1)
        return total / count

    def measured(self, sequence: bool) -> Tensor | bool:
        """Whether statistics are the batch's: of every step, (T, 1, 1), where that differs."""
        if not self._batch or sequence or self.alive is None:
            return self._batch and self._size >= 2
        return (self.alive >= 2).unsqueeze(-1)


def _where(measured: Tensor | bool, ours: Tensor, given: Tensor) -> Tensor:
    if isinstance(measured, bool):
        return ours if measured else given
    return torch.where(measured, ours, given)


def _input_statistics(
    steps: _Steps, bx: Tensor, running: Sequence[Tensor], sequence: bool
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the input term by step, (T, 1, 4H), or (1, 1, 4H)."""
    given = [t[:1].float().unsqueeze(1) if sequence else steps.given(t) for t in running]
    measured = steps.measured(sequence)
    if measured is False:
        return given[0], given[1]
    ours = steps.mean(bx, sequence)
    # Two passes, because squares cancel.
    spread = steps.mean((bx - ours).square(), sequence)
    return _where(measured, ours, given[0]), _where(measured, spread, given[1])


@on_its_device
@with_next_plan
def bnlstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    running: Sequence[Tensor],
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    eps: float,
    batch_stats: bool,
    sequence: bool,
    batch_first: bool,
    return_cells: bool,
    record: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    directions, size, hidden = h0.shape
    layer = _Layer(x, h0, weights)
    grid = Grid(x, size, batch_sizes, lengths, reset, batch_first)
    h0, c0 = h0.contiguous(), c0.contiguous()
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    wide, known = 4 * hidden, batch_stats or record
    y = x.new_empty((grid.count, directions * hidden))
    cells = None
    if return_cells or record:
        cells = x.new_empty((grid.count, directions * hidden), dtype=torch.float32)
    tape = x.new_empty((directions, grid.count if record else 0, _TAPE * hidden))
    rows = grid.steps if known else 0
    used = [
        x.new_empty((directions, 2, n, width), dtype=torch.float32)
        for n, width in ((int(known) if sequence else rows, wide), (rows, wide), (rows, hidden))
    ]
    if size:
        launcher = launcher_of(layer.need, x, False, plan)
        steps = _Steps(grid, batch_stats, x.device)
        bx = grid.spread(torch.mm(grid.rows.flat(x), layer.inputs().t()))
        per = len(running) // directions
        wx = x.new_empty((directions, grid.count, wide), dtype=torch.float32)
        for d in range(directions):
            own = steps.of(grid.time_major(bx[:, d * wide : (d + 1) * wide].float()), d == 1)
            mean, var = _input_statistics(steps, own, running[d * per : d * per + 2], sequence)
            if known:
                used[0][d].copy_(torch.stack([mean.squeeze(1), var.squeeze(1)]))
            hat = (own - mean) * torch.rsqrt(var + eps)
            term = hat * layer.gamma_x[d]
            term = term + layer.bias[d] if layer.bias else term
            wx[d].copy_(grid.as_rows(steps.of(term, d == 1)))
            if record:
                tape[d, :, _OF_KERNEL * hidden :].copy_(grid.as_rows(steps.of(hat, d == 1)))
        given = [t.float().contiguous() for t in running]
        fields = _forward_fields(
            launcher, layer, grid, per, given, used if known else None,
            (h0, c0, h_n, c_n), wx, y, tape if record else None, cells,
        )  # fmt: skip
        _run("bnlstm_forward", launcher, layer, grid, fields, _options(steps, eps, batch_stats))
    y = grid.gather(y).view(*x.shape[:-1], directions * hidden)
    found = x.new_empty(0, dtype=torch.float32) if cells is None else grid.gather(cells).view_as(y)
    return y, h_n, c_n, found, tape, used[0], used[1], used[2]


def _options(steps: _Steps, eps: float, batch_stats: bool) -> tuple[int, float, bool]:
    return 0 if steps.alive is None else steps.alive.data_ptr(), eps, batch_stats


def _run(
    name: str,
    launcher: Launcher,
    layer: _Layer,
    grid: Grid,
    fields: list[int],
    options: tuple[int, float, bool],
) -> None:
    """The one launch of a persistent kernel, or all launches step by step."""
    if launcher.plan.exchange != "steps":
        return launcher.start(name, grid, (0, grid.size), fields, options)
    reset = grid.reset_of(0, grid.size)
    shape = (
        grid.steps, grid.size, layer.hidden, 0, layer.directions, False, grid.lengths_at(0),
        0 if reset is None else reset.data_ptr(),
    )  # fmt: skip
    matrices = [launcher.keep(m.contiguous()) for m in layer.w_hh]
    weights = tuple(a for m in matrices for a in (m.data_ptr(), 0))
    launcher.steps("steps_" + name, shape, weights, fields, options)
    return None


def _packed(launcher: Launcher, layer: _Layer) -> list[int]:
    """Addresses of packed weight_hh; step by step the library packs it into its scratch."""
    if launcher.plan.exchange == "steps":
        return [0] * layer.directions
    return launcher.pack(layer.w_hh)


def _forward_fields(
    launcher: Launcher,
    layer: _Layer,
    grid: Grid,
    per: int,
    given: list[Tensor],
    used: list[Tensor] | None,
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    wx: Tensor,
    y: Tensor,
    tape: Tensor | None,
    cells: Tensor | None,
) -> list[int]:
    hidden = layer.hidden
    addresses = _packed(launcher, layer)
    mail = _mail(launcher, layer, grid, y, 1)
    fields: list[int] = []
    for d in range(layer.directions):
        fields += [addresses[d]]
        fields += [v[d].data_ptr() for v in (layer.gamma_h, layer.gamma_c, layer.beta_c)]
        for term in (1, 2):
            mean, var = given[d * per + 2 * term : d * per + 2 * term + 2]
            fields += [mean.data_ptr(), var.data_ptr(), mean.size(0)]
            fields += [0 if used is None else used[term][d].data_ptr()]
        fields += [grid.state(t, d, 0) for t in states]
        fields += grid.at(wx[d], 0, 0) + grid.at(y, d * hidden, 0)
        fields += grid.at(None if tape is None else tape[d], 0, 0)
        fields += grid.at(cells, d * hidden, 0)
        fields += grid.steps_at(None if mail is None else mail[d], 0, 0)
    return fields


def _mail(
    launcher: Launcher, layer: _Layer, grid: Grid, like: Tensor, values: int
) -> Tensor | None:
    """By step, (D, T, N, values * H up to whole vectors); None where none is needed. It stays alive
    as long as the launcher."""
    if not launcher.plan.through_memory:
        return None
    width = values * padded(layer.hidden, like.dtype)
    mail = like.new_empty((layer.directions, grid.steps, grid.size, width))
    launcher.prepare_mail(mail)
    return launcher.keep(mail)


@on_its_device
@with_next_plan
def bnlstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor,
    cells: Tensor,
    tape: Tensor,
    used: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    eps: float,
    batch_stats: bool,
    sequence: bool,
    batch_first: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    plan: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    directions, size, hidden = h0.shape
    if not size:
        zeros = [torch.zeros_like(w) for w in weights] if need_dw else []
        empty = [torch.empty_like(t) if need_dstate else None for t in (h0, c0)]
        return torch.empty_like(x) if need_dx else None, empty[0], empty[1], zeros
    layer = _Layer(x, h0, weights)
    grid = Grid(x, size, batch_sizes, lengths, reset, batch_first)
    launcher = launcher_of(layer.need, x, True, plan)
    steps = _Steps(grid, batch_stats, x.device)
    h0, c0 = h0.contiguous(), c0.contiguous()
    # A hook on what is saved may have given it other strides.
    tape, used = tape.contiguous(), [t.contiguous() for t in used]

    def spread(data: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if data is None else grid.spread(grid.rows.flat(data.to(dtype)).contiguous())

    memory = spread(cells, torch.float32)
    assert memory is not None
    wide = 4 * hidden
    dz, da = (x.new_empty((directions, grid.count, wide)) for _ in range(2))
    dm = x.new_empty((directions, grid.count, hidden))
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0)
    upstream = (spread(dy, x.dtype), spread(dcells, torch.float32))
    finals = (dense(dh_n), dense(dc_n))
    addresses = _packed(launcher, layer)
    mail = _mail(launcher, layer, grid, x, 4)
    fields: list[int] = []
    for d in range(directions):
        fields += [addresses[d]]
        fields += [v[d].data_ptr() for v in (layer.gamma_h, layer.gamma_c, layer.beta_c)]
        fields += [used[1][d].data_ptr(), used[2][d].data_ptr()]
        fields += [grid.state(t, d, 0) for t in (c0, *finals, dh0, dc0)]
        for rows in upstream:
            fields += grid.at(rows, d * hidden, 0)
        fields += grid.at(tape[d], 0, 0) + grid.at(memory, d * hidden, 0)
        fields += grid.at(dz[d], 0, 0) + grid.at(da[d], 0, 0) + grid.at(dm[d], 0, 0)
        fields += grid.steps_at(None if mail is None else mail[d], 0, 0)
    _run("bnlstm_backward", launcher, layer, grid, fields, _options(steps, eps, batch_stats))

    tape = tape if grid.lengths is None else torch.stack([grid.without_padding(t) for t in tape])
    db = _input_terms(layer, grid, steps, dz, tape, used[0], eps, sequence)
    # In the rows of x: packed data have fewer.
    own = grid.gather(torch.cat(db, 1))
    dx = torch.mm(own, layer.inputs()).view(x.shape) if need_dx else None
    dweights: list[Tensor] = []
    if need_dw:
        inputs = grid.rows.without_padding(x)
        states = grid.spread(grid.rows.flat(y).contiguous())
        for d, part in enumerate(own.chunk(directions, 1)):
            before = states_before(grid, states[:, d * hidden : (d + 1) * hidden], h0[d], d == 1)
            dweights += [torch.mm(part.t(), inputs), torch.mm(da[d].t(), before)]
            column = memory[:, d * hidden : (d + 1) * hidden]
            dweights += _vectors(
                layer, grid, steps, dz[d], dm[d], tape[d], column, used[2][d], eps, d
            )
    if not need_dstate:
        return dx, None, None, dweights
    return dx, dh0, dc0, dweights


def _vectors(
    layer: _Layer,
    grid: Grid,
    steps: _Steps,
    dz: Tensor,
    dm: Tensor,
    tape: Tensor,
    cells: Tensor,
    used_c: Tensor,
    eps: float,
    d: int,
) -> list[Tensor]:
    """Gradients of bias, gamma_ih, gamma_hh, gamma_c and beta_c of a direction."""
    dz, wide = dz.float(), 4 * layer.hidden
    found = [dz.sum(0)] if layer.bias else []
    hats = tape[:, wide:].float()
    found += [(dz * hats[:, wide:]).sum(0), (dz * hats[:, :wide]).sum(0)]
    by_step = steps.of(grid.time_major(cells.contiguous()), d == 1)
    c_hat = (by_step - used_c[0].unsqueeze(1)) * torch.rsqrt(used_c[1].unsqueeze(1) + eps)
    dm_by_step = steps.of(grid.time_major(dm.float()), d == 1)
    found += [(dm_by_step * steps.live(c_hat)).sum((0, 1)), dm.float().sum(0)]
    return [g.to(tape.dtype) for g in found]


def _input_terms(
    layer: _Layer,
    grid: Grid,
    steps: _Steps,
    dz: Tensor,
    tape: Tensor,
    used: Tensor,
    eps: float,
    sequence: bool,
) -> list[Tensor]:
    """Gradients of the input terms before their normalisation, (rows, 4H) of each direction."""
    wide, found = 4 * layer.hidden, []
    measured = steps.measured(sequence)
    for d in range(layer.directions):
        dy = steps.of(grid.time_major(dz[d].float() * layer.gamma_x[d]), d == 1)
        if measured is not False:
            hat = steps.of(grid.time_major(tape[d, :, 2 * wide :].float()), d == 1)
            mean, product = steps.mean(dy, sequence), steps.mean(dy * hat, sequence)
            dy = _where(measured, steps.live(dy - mean - hat * product), dy)
        db = dy * torch.rsqrt(used[d, 1].unsqueeze(1) + eps)
        found.append(grid.as_rows(steps.of(db, d == 1)).to(dz.dtype))
    return found
