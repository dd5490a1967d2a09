"""Recurrent Highway layers on the native CUDA library: the operators of ``fastrnn.ops.rhn``.

All micro-steps of all steps are one launch for both directions, or each is launched by itself; the
tape is the same. The input's terms, masked where they are, and the gradients of input and weights
are torch's products over all steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid
from fastrnn.backends.cuda_native import (
    Launcher,
    Need,
    launcher_of,
    on_its_device,
    padded,
    with_next_plan,
)
from fastrnn.backends.rows import dense

__all__ = ["rhn_backward", "rhn_forward", "rhn_forward_train"]


class _Layer:
    """Weights and masks of a layer by kind."""

    def __init__(
        self,
        x: Tensor,
        h0: Tensor,
        weights: Sequence[Tensor],
        x_mask: Tensor | None,
        s_mask: Tensor | None,
    ) -> None:
        self.directions, size, _ = h0.shape
        per = len(weights) // self.directions
        self.w_ih = [weights[d * per] for d in range(self.directions)]
        self.w_hh = [weights[d * per + 1] for d in range(self.directions)]
        self.bias = [weights[d * per + 2] for d in range(self.directions) if per == 3]
        self.depth, width, self.hidden = self.w_hh[0].shape
        self.gates = width // self.hidden
        if s_mask is not None and s_mask.size(1) not in (1, self.gates):
            raise ValueError(
                f"s_mask: got {s_mask.size(1)} masks a direction, expected one for all gates or "
                f"one for each, shape (D, 1, N, H) or (D, {self.gates}, N, H)"
            )
        self.x_mask = x_mask
        # (D, 1 or G, N, H), in the dtype of the states that it meets.
        self.s_mask = None if s_mask is None else s_mask.to(x.dtype).contiguous()
        cell = "rhn" if self.gates == 2 else "rhn_uncoupled"
        self.need = Need(
            cell, x.dtype, size, self.hidden, self.directions, self.depth,
            gate_masks=s_mask is not None and s_mask.size(1) > 1,
        )  # fmt: skip

    def masked(self, value: Tensor, d: int, of_row: Tensor) -> list[Tensor]:
        """Rows of the input as the matrices of one gate, or of all, meet them."""
        if self.x_mask is None:
            return [value]
        return [value * own[of_row] for own in self.x_mask[d].to(value.dtype).unbind(0)]

    def masked_states(self, states: Tensor) -> Tensor:
        mask = self.tied_mask()
        return states if mask is None else states * mask

    def tied_mask(self) -> Tensor | None:
        """The mask for all gates, (D, N, H)."""
        return None if self.s_mask is None else self.s_mask[:, 0]

    def state_mask(self, d: int) -> int:
        """Address of a direction's masks."""
        return 0 if self.s_mask is None else self.s_mask[d].data_ptr()

    def steps(self, launcher: Launcher, run: str, grid: Grid, fields: Sequence[int]) -> None:
        """All micro-steps, launched one by one."""
        reset = grid.reset_of(0, grid.size)
        shape = (
            grid.steps, grid.size, self.hidden, 0, self.directions, 0, grid.lengths_at(0),
            0 if reset is None else reset.data_ptr(), self.depth, int(self.need.gate_masks),
        )  # fmt: skip
        slabs = [w.contiguous() for w in self.w_hh]
        addresses = [a for own in slabs for a in (own.data_ptr(), 0)]
        launcher.steps(run, shape, tuple(addresses), fields)


def _input_terms(layer: _Layer, grid: Grid, x: Tensor) -> Tensor:
    """W_ih x of the first micro-step and its bias, (rows, D*G*H)."""
    flat, of_row = grid.rows.flat(x), grid.rows.sequence_of_row(x.device)
    if layer.x_mask is None:
        w = layer.w_ih[0] if layer.directions == 1 else torch.cat(layer.w_ih)
        if not layer.bias:
            return grid.spread(torch.mm(flat, w.t()))
        return grid.spread(torch.addmm(torch.cat([b[0] for b in layer.bias]), flat, w.t()))
    terms = [
        torch.mm(operand, block.t())
        for d, w in enumerate(layer.w_ih)
        for operands in (layer.masked(flat, d, of_row),)
        for operand, block in zip(operands, w.chunk(len(operands)), strict=True)
    ]
    wx = torch.cat(terms, 1)
    return grid.spread(wx + torch.cat([b[0] for b in layer.bias]) if layer.bias else wx)


def _forward(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    want_gates: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = _Layer(x, h0, weights, x_mask, s_mask)
    size, directions, depth, hidden = h0.size(1), layer.directions, layer.depth, layer.hidden
    grid = Grid(x, size, batch_sizes, lengths, reset, batch_first)
    h0 = h0.contiguous()
    y = x.new_empty((grid.count, directions * hidden))
    h_n = torch.empty_like(h0)
    width = (layer.gates + 1) * hidden if want_gates else 0
    gates = x.new_empty((directions, depth, grid.count, width))
    if size:
        launcher = launcher_of(layer.need, x, False, plan)
        wx = _input_terms(layer, grid, x)
        bias = [b.float().contiguous() for b in layer.bias]
        micro = (directions, grid.steps * depth, size)
        tape = gates.view(*micro, width) if width else None
    if size and launcher.plan.exchange == "steps":
        given: list[int] = []
        for d in range(directions):
            given += [bias[d].data_ptr() if bias else 0, layer.state_mask(d)]
            given += [grid.state(t, d, 0) for t in (h0, h_n)]
            given += grid.at(wx, d * layer.gates * hidden, 0) + grid.at(y, d * hidden, 0)
            given += grid.steps_at(None if tape is None else tape[d], 0, 0)
        layer.steps(launcher, "steps_rhn_forward", grid, given)
    elif size:
        addresses = launcher.pack(layer.w_hh)
        h0_masked, mask = layer.masked_states(h0), layer.tied_mask()
        mail = None
        if launcher.plan.through_memory:
            mail = x.new_empty((*micro, padded(hidden, x.dtype)))
            launcher.prepare_mail(mail)
        for first, end in launcher.parts(size):
            fields: list[int] = []
            for d in range(directions):
                fields += [addresses[d], bias[d].data_ptr() if bias else 0]
                fields += [grid.state(t, d, first) for t in (mask, h0, h0_masked, h_n)]
                fields += grid.at(wx, d * layer.gates * hidden, first)
                fields += grid.at(y, d * hidden, first)
                fields += grid.steps_at(None if tape is None else tape[d], 0, first)
                fields += grid.steps_at(None if mail is None else mail[d], 0, first)
            launcher.start("rhn_forward", grid, (first, end), fields, depth)
    y = grid.gather(y).view(*x.shape[:-1], directions * hidden)
    return y, h_n, gates


@on_its_device
@with_next_plan
def rhn_forward(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    plan: str,
) -> tuple[Tensor, Tensor]:
    sequence = (batch_sizes, lengths, reset, batch_first)
    return _forward(x, h0, weights, x_mask, s_mask, *sequence, False, plan)[:2]


@on_its_device
@with_next_plan
def rhn_forward_train(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    recompute: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sequence = (batch_sizes, lengths, reset, batch_first)
    return _forward(x, h0, weights, x_mask, s_mask, *sequence, not recompute, plan)


@on_its_device
@with_next_plan
def rhn_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    gates: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    plan: str,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    layer = _Layer(x, h0, weights, x_mask, s_mask)
    if not layer.need.size:
        dx = torch.empty_like(x) if need_dx else None
        dh0 = torch.empty_like(h0) if need_dstate else None
        return dx, dh0, [torch.zeros_like(w) for w in weights] if need_dw else []
    sequence = (batch_sizes, lengths, reset, batch_first)
    if not gates.numel():
        gates = _forward(x, h0, weights, x_mask, s_mask, *sequence, True, plan)[2]
    grid = Grid(x, layer.need.size, *sequence)
    launcher = launcher_of(layer.need, x, True, plan)
    gates = gates.contiguous()  # a hook on what is saved may have given it other strides
    dz, dh0 = _gate_gradients(launcher, layer, grid, dy, dh_n, gates)
    # Gradients of the input's terms, in the rows of x.
    terms = [grid.gather(grid.as_rows(own[:, 0])) for own in dz.unbind(0)]
    of_row = grid.rows.sequence_of_row(x.device)
    dx = _input_gradient(layer, terms, of_row).view(x.shape) if need_dx else None
    dweights = _weight_gradients(layer, grid, x, dz, terms, gates, of_row) if need_dw else []
    return dx, dh0 if need_dstate else None, dweights


def _gate_gradients(
    launcher: Launcher,
    layer: _Layer,
    grid: Grid,
    dy: Tensor | None,
    dh_n: Tensor | None,
    gates: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations, (D, T, L, N, G*H), and of h0."""
    size, hidden, width = grid.size, layer.hidden, layer.gates * layer.hidden
    micro = (layer.directions, grid.steps * layer.depth, size)
    tape = gates.view(*micro, width + hidden)
    dz = gates.new_empty((*micro, width))
    dh0 = gates.new_empty((layer.directions, size, hidden))
    upstream = None
    if dy is not None:
        upstream = grid.spread(grid.rows.flat(dy.to(dz.dtype)).contiguous())
    dh_n = dense(dh_n)
    if launcher.plan.exchange == "steps":
        given: list[int] = []
        for d in range(layer.directions):
            given.append(layer.state_mask(d))
            given += [grid.state(t, d, 0) for t in (dh_n, dh0)]
            given += grid.at(upstream, d * hidden, 0)
            given += grid.steps_at(tape[d], 0, 0) + grid.steps_at(dz[d], 0, 0)
        layer.steps(launcher, "steps_rhn_backward", grid, given)
        return dz.view(layer.directions, grid.steps, layer.depth, size, width), dh0
    addresses, mask = launcher.pack(layer.w_hh), layer.tied_mask()
    wide = padded(hidden, dz.dtype)
    shared = launcher.plan.through_memory and wide == hidden
    mail = dz if shared else None
    if launcher.plan.through_memory and not shared:
        mail = dz.new_empty((*micro, layer.gates * wide))
    if mail is not None:
        launcher.prepare_mail(mail)
    for first, end in launcher.parts(size):
        fields: list[int] = []
        for d in range(layer.directions):
            fields += [int(shared), addresses[d]]
            fields += [grid.state(t, d, first) for t in (mask, dh_n, dh0)]
            fields += grid.at(upstream, d * hidden, first)
            for rows in (tape, dz, mail):
                fields += grid.steps_at(None if rows is None else rows[d], 0, first)
        launcher.start("rhn_backward", grid, (first, end), fields, layer.depth)
    return dz.view(layer.directions, grid.steps, layer.depth, size, width), dh0


def _input_gradient(layer: _Layer, terms: list[Tensor], of_row: Tensor) -> Tensor:
    dx: Tensor | None = None
    for d, (own, w_ih) in enumerate(zip(terms, layer.w_ih, strict=True)):
        masks: list[Tensor | None] = [None]
        if layer.x_mask is not None:
            masks = [m[of_row] for m in layer.x_mask[d].unbind(0)]
        count = len(masks)
        for mask, w, part in zip(masks, w_ih.chunk(count), own.chunk(count, 1), strict=True):
            term = torch.mm(part, w)
            term = term if mask is None else term.mul_(mask)
            dx = term if dx is None else dx.add_(term)
    assert dx is not None
    return dx


def _weight_gradients(
    layer: _Layer,
    grid: Grid,
    x: Tensor,
    dz: Tensor,
    terms: list[Tensor],
    gates: Tensor,
    of_row: Tensor,
) -> list[Tensor]:
    inputs = grid.rows.without_padding(x)
    hidden, depth, size = layer.hidden, layer.depth, grid.size
    micro = (layer.directions, grid.steps, depth, size, -1)
    # The state before each micro-step; no tape was written past a sequence's end.
    states = gates.view(*micro)[..., layer.gates * hidden :]
    dead = grid.padding()
    if dead is not None:
        states = states.masked_fill(dead.unsqueeze(1), 0.0)
    found: list[Tensor] = []
    for d in range(layer.directions):
        operands = layer.masked(inputs, d, of_row)
        parts = terms[d].chunk(len(operands), 1)
        found.append(torch.cat([torch.mm(z.t(), u) for z, u in zip(parts, operands, strict=True)]))
        # One product for each level, over all steps: (L, T*N, ..).
        by_level = dz[d].transpose(0, 1).reshape(depth, grid.steps * size, -1)
        befores = [states[d]] if layer.s_mask is None else [states[d] * m for m in layer.s_mask[d]]
        of_gates = zip(by_level.chunk(len(befores), 2), befores, strict=True)
        found.append(
            torch.cat(
                [
                    torch.bmm(
                        own.transpose(1, 2),
                        before.transpose(0, 1).reshape(depth, grid.steps * size, hidden),
                    )
                    for own, before in of_gates
                ],
                1,
            )
        )
        if layer.bias:
            found.append(by_level.sum(1))
    return found
