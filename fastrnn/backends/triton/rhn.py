"""Recurrent Highway layers on Triton: the operators of ``fastrnn.ops.rhn``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import triton_shared_memory
from fastrnn.backends.rows import Rows, dense, describe
from fastrnn.backends.triton.host import (
    launch,
    precision,
    stacked,
)
from fastrnn.backends.triton.plan import Plan, choose
from fastrnn.backends.triton.rhn_kernels import rhn_backward_kernel, rhn_forward_kernel

__all__ = ["rhn_backward", "rhn_forward", "rhn_forward_train"]


class _Layer:
    """Weights and masks of a layer, and its plan."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        x_mask: Tensor | None,
        s_mask: Tensor | None,
        size: int,
        directions: int,
    ) -> None:
        per = len(weights) // directions
        self.w_ih = [weights[d * per] for d in range(directions)]
        self.w_hh = [weights[d * per + 1] for d in range(directions)]
        self.bias = [weights[d * per + 2] for d in range(directions) if per == 3]
        self.depth, width, self.hidden = self.w_hh[0].shape
        self.gates = width // self.hidden
        self.x_mask, self.s_mask, self.directions = x_mask, s_mask, directions
        sizes = (self.hidden, self.hidden, x.element_size(), size, directions)
        shared = triton_shared_memory(x.device.type, x.device.index)
        self.plan: Plan = choose("rhn", self.gates, *sizes, shared)
        self.grid = (-(-size // self.plan.rows), directions)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "w_hh": stacked(self.w_hh),
            "s_mask": dense(self.s_mask),
            "GROUPS": 0 if self.s_mask is None else self.s_mask.size(1),
            "H": self.hidden,
            "L": self.depth,
            "G": self.gates,
            "D": self.directions,
            "HP": self.plan.units,
            "BT": self.plan.rows,
            "PRECISION": precision(dtype),
        }

    def operands(self, mask: Tensor | None, d: int, of_row: Tensor, value: Tensor) -> list[Tensor]:
        """``value``, a row for each step, as each gate's matrices meet it."""
        if mask is None:
            return [value]
        return [value * own[of_row] for own in mask[d].to(value.dtype).unbind(0)]


def _blocks(operands: list[Tensor], matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Operands beside the columns, or rows, of the gates that they are for."""
    return list(zip(operands, matrix.chunk(len(operands)), strict=True))


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
) -> tuple[Tensor, Tensor, Tensor]:
    directions, size, _ = h0.shape
    layer = _Layer(x, weights, x_mask, s_mask, size, directions)
    rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
    y = x.new_empty((*x.shape[:-1], directions * layer.hidden))
    h_n = torch.empty(h0.shape, dtype=h0.dtype, device=h0.device)
    width = layer.gates * layer.hidden if want_gates else 0
    gates = x.new_empty((directions, layer.depth, rows.rows, width), dtype=torch.float32)
    if size:
        flat, of_row = rows.flat(x), rows.sequence_of_row(x.device)
        terms = [
            torch.mm(operand, block.t())
            for d, w in enumerate(layer.w_ih)
            for operand, block in _blocks(layer.operands(x_mask, d, of_row, flat), w)
        ]
        launch(
            rhn_forward_kernel,
            layer.grid,
            x,
            layer.plan.warps,
            xg=terms[0] if len(terms) == 1 else torch.cat(terms, 1),
            bias=stacked(layer.bias) if layer.bias else None,
            h0=h0.contiguous(),
            y=y,
            gates=gates if want_gates else None,
            h_n=h_n,
            **rows.arguments(),
            **layer.arguments(x.dtype),
        )
    return y, h_n, gates


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
    return _forward(x, h0, weights, x_mask, s_mask, *sequence, False)[:2]


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
    return _forward(x, h0, weights, x_mask, s_mask, *sequence, not recompute)


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
    directions, size, _ = h0.shape
    if size == 0:
        dx = torch.empty_like(x) if need_dx else None
        dh0 = torch.empty_like(h0) if need_dstate else None
        return dx, dh0, [torch.zeros_like(w) for w in weights] if need_dw else []
    layer = _Layer(x, weights, x_mask, s_mask, size, directions)
    rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
    if gates.numel() == 0:
        sequence = (batch_sizes, lengths, reset, batch_first)
        gates = _forward(x, h0, weights, x_mask, s_mask, *sequence, True)[2]
    depth, hidden = layer.depth, layer.hidden
    dz = x.new_empty((directions, depth, rows.rows, layer.gates * hidden))
    states = x.new_empty((directions, depth, rows.rows, hidden), dtype=torch.float32)
    dh0 = torch.empty(h0.shape, dtype=h0.dtype, device=h0.device)
    launch(
        rhn_backward_kernel,
        layer.grid,
        x,
        layer.plan.warps,
        h0=h0.contiguous(),
        y=y.contiguous(),
        gates=gates.contiguous(),
        dy=dense(dy),
        dh_n=dense(dh_n),
        dz=dz,
        states=states,
        dh0=dh0,
        **rows.arguments(),
        **layer.arguments(x.dtype),
    )
    of_row = rows.sequence_of_row(x.device)
    dx = _input_gradient(layer, dz, of_row).view(x.shape) if need_dx else None
    dweights = _weight_gradients(layer, rows, x, dz, states.to(x.dtype), of_row) if need_dw else []
    return dx, dh0 if need_dstate else None, dweights


def _input_gradient(layer: _Layer, dz: Tensor, of_row: Tensor) -> Tensor:
    dx: Tensor | None = None
    for d, w_ih in enumerate(layer.w_ih):
        masks = [None] if layer.x_mask is None else [m[of_row] for m in layer.x_mask[d].unbind(0)]
        blocks = zip(masks, w_ih.chunk(len(masks)), dz[d, 0].chunk(len(masks), 1), strict=True)
        for mask, w, own in blocks:
            term = torch.mm(own, w)
            term = term if mask is None else term.mul_(mask)
            dx = term if dx is None else dx.add_(term)
    assert dx is not None
    return dx


def _weight_gradients(
    layer: _Layer, rows: Rows, x: Tensor, dz: Tensor, states: Tensor, of_row: Tensor
) -> list[Tensor]:
    inputs = rows.without_padding(x)
    found: list[Tensor] = []
    for d in range(layer.directions):
        operands = layer.operands(layer.x_mask, d, of_row, inputs)
        parts = dz[d, 0].chunk(len(operands), 1)
        found.append(torch.cat([torch.mm(z.t(), u) for z, u in zip(parts, operands, strict=True)]))
        levels = []
        for level in range(layer.depth):
            operands = layer.operands(layer.s_mask, d, of_row, states[d, level])
            parts = dz[d, level].chunk(len(operands), 1)
            products = [torch.mm(z.t(), u) for z, u in zip(parts, operands, strict=True)]
            levels.append(torch.cat(products))
        found.append(torch.stack(levels))
        if layer.bias:
            found.append(dz[d].sum(1))
    return found
