"""LSTM, GRU and RNN layers on Triton: the operators of ``fastrnn.ops.layer``.

The time loop is one launch. Products over all steps at once (input terms, gradients of input and
weights) are torch's, before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import triton_shared_memory
from fastrnn.backends.rows import Rows, Weights, alone, dense, describe
from fastrnn.backends.triton.gru import gru_backward_kernel, gru_forward_kernel
from fastrnn.backends.triton.host import (
    launch,
    noise_arguments,
    precision,
    stacked,
)
from fastrnn.backends.triton.lstm import lstm_backward_kernel, lstm_forward_kernel
from fastrnn.backends.triton.plan import Plan, choose
from fastrnn.backends.triton.rnn import rnn_backward_kernel, rnn_forward_kernel
from fastrnn.noise import tape_slots

__all__ = ["layer_backward", "layer_forward", "layer_forward_train"]


def _bias(w: Weights, cell: str) -> Tensor | None:
    """What the kernels add to the terms: (D, G*H) float32, (D, 4H) for a GRU."""
    if not w.b_ih:
        return None
    b_ih, b_hh = torch.stack(w.b_ih).float(), torch.stack(w.b_hh).float()
    if not cell.startswith("gru"):
        return b_ih + b_hh
    at = 2 * w.hidden
    return torch.cat([b_ih[:, :at] + b_hh[:, :at], b_ih[:, at:], b_hh[:, at:]], 1)


def _plan(w: Weights, cell: str, size: int, x: Tensor) -> Plan:
    sizes = (w.hidden, w.out, x.element_size(), size, w.directions)
    return choose(cell, w.gates, *sizes, triton_shared_memory(x.device.type, x.device.index))


def _shape_arguments(w: Weights, plan: Plan, cell: str, dtype: torch.dtype) -> dict[str, Any]:
    found: dict[str, Any] = {
        "H": w.hidden,
        "D": w.directions,
        "HP": plan.units,
        "BT": plan.rows,
        "STREAM": plan.stream,
        "PRECISION": precision(dtype),
        "w_hh": stacked(w.w_hh),
    }
    if cell == "lstm":
        found["P"], found["PP"] = w.out, plan.outputs
        found["w_hr"] = stacked(w.w_hr) if w.w_hr else None
    elif cell.startswith("gru"):
        found["AFTER"] = cell == "gru"
    else:
        found["RELU"] = cell == "rnn_relu"
    return found


_FORWARD = {"lstm": lstm_forward_kernel, "gru": gru_forward_kernel, "rnn": rnn_forward_kernel}
_BACKWARD = {"lstm": lstm_backward_kernel, "gru": gru_backward_kernel, "rnn": rnn_backward_kernel}

_Forward = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


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
    seed: Tensor | None,
    noise: str,
) -> _Forward:
    """y, h_n, c_n, cells, gates; None for what the cell or the call does not have."""
    directions, size, out = h0.shape
    w = Weights(weights, cell, directions)
    rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
    plan = _plan(w, cell, size, x)
    h0 = h0.contiguous()
    y = x.new_empty((*x.shape[:-1], directions * out))
    h_n = torch.empty_like(h0)
    slots = tape_slots(cell, noise) if want_gates else 0
    gates = None
    if slots:
        shape = (directions, rows.rows, slots * w.hidden)
        gates = x.new_empty(shape, dtype=torch.float32)
    states: dict[str, Tensor | None] = {}
    if c0 is not None:
        cells = None
        if want_cells:
            shape = (*x.shape[:-1], directions * w.hidden)
            cells = x.new_empty(shape, dtype=torch.float32)
        c0 = c0.contiguous()
        states = {"c0": c0, "c_n": torch.empty_like(c0), "cells": cells}
    if size:
        launch(
            _FORWARD[cell.split("_")[0]],
            (-(-size // plan.rows), directions),
            x,
            plan.warps,
            xg=torch.mm(rows.flat(x), w.inputs().t()),
            bias=_bias(w, cell),
            h0=h0,
            y=y,
            gates=gates,
            h_n=h_n,
            **states,
            **rows.arguments(),
            **_shape_arguments(w, plan, cell, x.dtype),
            **noise_arguments(noise, seed, x.device, cell == "lstm"),
        )
    return y, h_n, states.get("c_n"), states.get("cells"), gates


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
        seed, noise,
    )[:4]  # fmt: skip


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
        seed, noise,
    )  # fmt: skip


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
    directions, size, out = h0.shape
    lstm = cell == "lstm"
    if size == 0:
        dweights = [torch.zeros_like(w) for w in weights] if need_dw else []
        dc0 = torch.empty_like(c0) if need_dstate and c0 is not None else None
        dx = torch.empty_like(x) if need_dx else None
        return dx, torch.empty_like(h0) if need_dstate else None, dc0, dweights
    w = Weights(weights, cell, directions)
    rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
    cut = _plan(w, cell, size, x)
    if tape_slots(cell, noise) == 0:
        gates = None
    elif gates is None or gates.numel() == 0:
        gates = _forward(
            x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, False, True, seed,
            noise,
        )[4]  # fmt: skip
    h0 = h0.contiguous()
    slots = 4 if cell == "gru" else w.gates
    dz = x.new_empty((rows.rows, directions * slots * w.hidden))
    h_ins = x.new_empty((rows.rows, directions * out))
    extra: dict[str, Tensor | None] = {}
    dc0 = None
    if lstm:
        assert c0 is not None
        dc0 = torch.empty(c0.shape, dtype=c0.dtype, device=c0.device)
        proj = bool(w.w_hr)
        extra = {
            "c0": c0.contiguous(), "cells": dense(cells), "dc_n": dense(dc_n),
            "dcells": dense(dcells), "dc0": dc0,
            "dh_out": torch.empty_like(h_ins) if proj else None,
            "outs": x.new_empty((rows.rows, directions * w.hidden)) if proj else None,
        }  # fmt: skip
    elif cell.startswith("gru"):
        extra["products"] = torch.empty_like(h_ins) if cell == "gru_reset_before" else None
    dh0 = torch.empty_like(h0)
    launch(
        _BACKWARD[cell.split("_")[0]],
        (-(-size // cut.rows), directions),
        x,
        cut.warps,
        h0=h0,
        y=y.contiguous(),
        gates=dense(gates),  # a hook on what is saved may have given it other strides
        dy=dense(dy),
        dh_n=dense(dh_n),
        dz=dz,
        h_ins=h_ins,
        dh0=dh0,
        **extra,
        **rows.arguments(),
        **_shape_arguments(w, cut, cell, x.dtype),
        **noise_arguments(noise, seed, x.device, lstm),
    )
    if cell.startswith("gru"):
        dx, dweights = _gru_products(x, rows, w, dz, h_ins, extra["products"], need_dx, need_dw)
    else:
        dx = torch.mm(dz, w.inputs()).view(x.shape) if need_dx else None
        dweights = _products(x, rows, w, dz, h_ins, extra) if need_dw else []
    if not need_dstate:
        return dx, None, None, dweights
    return dx, dh0, dc0, dweights


def _products(
    x: Tensor,
    rows: Rows,
    w: Weights,
    dz: Tensor,
    h_ins: Tensor,
    extra: dict[str, Tensor | None],
) -> list[Tensor]:
    """Gradients of an LSTM's or RNN's weights from the pre-activations'."""
    found: list[Tensor] = []
    dw_ih = torch.mm(dz.t(), rows.without_padding(x)).chunk(w.directions)
    db = dz.sum(0).chunk(w.directions) if w.b_ih else ()
    h_parts = h_ins.chunk(w.directions, 1)
    for d, own in enumerate(dz.chunk(w.directions, 1)):
        found += [alone(dw_ih[d]), torch.mm(own.t(), h_parts[d])]
        if db:
            found += [alone(db[d]), db[d].clone()]
        if w.w_hr:
            dh_out, outs = extra["dh_out"], extra["outs"]
            assert dh_out is not None
            assert outs is not None
            dh_out, outs = (t.chunk(w.directions, 1)[d] for t in (dh_out, outs))
            found.append(torch.mm(dh_out.t(), outs))
    return found


def _gru_products(
    x: Tensor,
    rows: Rows,
    w: Weights,
    dz: Tensor,
    h_ins: Tensor,
    products: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of a GRU's input and weights; dz is n, r, z[, n's recurrent side]."""
    hidden, three = w.hidden, 3 * w.hidden
    parts = dz.chunk(w.directions, 1)
    dx = None
    if need_dx:
        for own, w_ih in zip(parts, w.w_ih, strict=True):
            # Rows n, r, z, as dz has them.
            term = torch.mm(own[:, :three], w_ih.roll(hidden, 0))
            dx = term if dx is None else dx.add_(term)
        assert dx is not None
        dx = dx.view(x.shape)
    found: list[Tensor] = []
    if not need_dw:
        return dx, found
    inputs = rows.without_padding(x)
    h_parts = h_ins.chunk(w.directions, 1)
    for d, own in enumerate(parts):
        found.append(torch.mm(own[:, :three].t(), inputs).roll(-hidden, 0))
        if products is None:
            found.append(torch.mm(own[:, hidden:].t(), h_parts[d]))
        else:
            r_h = products.chunk(w.directions, 1)[d]
            gated = torch.mm(own[:, hidden:].t(), h_parts[d])
            found.append(torch.cat([gated, torch.mm(own[:, :hidden].t(), r_h)]))
        if w.b_ih:
            db = own.sum(0)
            db_ih = db[:three].roll(-hidden, 0)
            found += [db_ih, db[hidden:].clone() if products is None else db_ih.clone()]
    return dx, found
