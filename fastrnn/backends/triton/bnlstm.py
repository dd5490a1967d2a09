"""Batch-normalised LSTM layers on Triton: the operators of ``fastrnn.ops.bnlstm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import triton_shared_memory
from fastrnn.backends.rows import Rows, dense, describe
from fastrnn.backends.triton.bnlstm_kernels import bnlstm_backward_kernel, bnlstm_forward_kernel
from fastrnn.backends.triton.host import (
    launch,
    precision,
    stacked,
)
from fastrnn.backends.triton.plan import choose

__all__ = ["bnlstm_backward", "bnlstm_forward"]

_VECTORS = ("gamma_ih", "gamma_hh", "gamma_c", "beta_c")
_STATISTICS = ("mean_ih", "var_ih", "mean_hh", "var_hh", "mean_c", "var_c")


class _Layer:
    """Weights of a layer, one tensor for all directions but w_ih, and its plan."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], size: int, directions: int) -> None:
        per = len(weights) // directions

        def every(i: int) -> list[Tensor]:
            return [weights[d * per + i] for d in range(directions)]

        self.w_ih = every(0)
        self.hidden = weights[1].size(1)
        self.directions = directions
        self.biased = per == 7
        self.tensors: dict[str, Tensor | None] = {
            name: stacked(every(per - 4 + i)) for i, name in enumerate(_VECTORS)
        }
        self.tensors["w_hh"] = stacked(every(1))
        self.tensors["bias"] = stacked(every(2)) if self.biased else None
        # The size that the operator's schema fixes: 4H, up to a multiple of 16, twice.
        self.width = -(-4 * self.hidden // 16) * 32
        sizes = (self.hidden, self.hidden, x.element_size(), size, directions)
        self.plan = choose("bnlstm", 4, *sizes, triton_shared_memory(x.device.type, x.device.index))

    def inputs(self) -> Tensor:
        return self.w_ih[0] if self.directions == 1 else torch.cat(self.w_ih)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return self.tensors | {
            "H": self.hidden,
            "D": self.directions,
            "W": self.width,
            "HP": self.plan.units,
            "BT": self.plan.rows,
            "STREAM": self.plan.stream,
            "PRECISION": precision(dtype),
        }


def _live(rows: Rows, device: torch.device) -> Tensor | None:
    """(rows, 1) bool: which rows are steps of a sequence; None if all are."""
    if rows.lengths is None or rows.offsets is not None:
        return None
    return ~rows.padding(device).reshape(-1, 1)


def _over_all(values: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance over all live rows, and how many they are."""
    if live is None:
        return values.mean(0), values.var(0, correction=0), values.size(0)
    count = live.sum()
    mean = torch.where(live, values, 0.0).sum(0) / count
    var = torch.where(live, (values - mean).square(), 0.0).sum(0) / count
    return mean, var, count


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
    layer = _Layer(x, weights, size, directions)
    rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
    y = x.new_empty((*x.shape[:-1], directions * hidden))
    cells = torch.empty_like(y) if return_cells or record else x.new_empty(0)
    h_n, c_n = torch.empty_like(h0.contiguous()), torch.empty_like(c0.contiguous())
    tape = x.new_empty((directions, rows.rows if record and size else 0, layer.width))
    known = batch_stats or record
    steps = rows.steps if known else 0
    used = [
        x.new_empty((directions, 2, int(known) if sequence and i == 0 else steps, width))
        for i, width in enumerate((4 * hidden, 4 * hidden, hidden))
    ]
    if size == 0:
        return y, h_n, c_n, cells, tape, *(t.zero_() for t in used)  # type: ignore[return-value]
    per = len(running) // directions
    given = {
        name: stacked([running[d * per + i] for d in range(directions)])
        for i, name in enumerate(_STATISTICS)
    }
    bx = torch.mm(rows.flat(x), layer.inputs().t())
    if sequence:
        if batch_stats and size >= 2:
            mean, var, _ = _over_all(bx, _live(rows, x.device))
            shape = (directions, 1, 4 * hidden)
            given["mean_ih"], given["var_ih"] = mean.view(shape), var.view(shape)
        else:
            given["mean_ih"] = given["mean_ih"][:, :1].contiguous()
            given["var_ih"] = given["var_ih"][:, :1].contiguous()
        if known:
            used[0].copy_(torch.stack([given["mean_ih"], given["var_ih"]], 1))
    launch(
        bnlstm_forward_kernel,
        (directions,),
        x,
        layer.plan.warps,
        bx=bx,
        used_ih=None if sequence or not known else used[0],
        used_hh=used[1] if known else None,
        used_c=used[2] if known else None,
        h0=h0.contiguous(),
        c0=c0.contiguous(),
        y=y,
        cells=cells if cells.numel() else None,
        tape=tape if record else None,
        h_n=h_n,
        c_n=c_n,
        rows_ih=given["mean_ih"].size(1),
        rows_hh=given["mean_hh"].size(1),
        rows_c=given["mean_c"].size(1),
        eps=eps,
        BATCH=batch_stats,
        BATCH_IH=batch_stats and not sequence,
        **given,
        **rows.arguments(),
        **layer.arguments(x.dtype),
    )
    return y, h_n, c_n, cells, tape, used[0], used[1], used[2]


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
    dh0, dc0 = torch.empty_like(h0.contiguous()), torch.empty_like(c0.contiguous())
    if size == 0:
        zeros = [torch.zeros_like(w) for w in weights] if need_dw else []
        states = (dh0, dc0) if need_dstate else (None, None)
        return torch.empty_like(x) if need_dx else None, *states, zeros
    layer = _Layer(x, weights, size, directions)
    rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
    dz, da, db = (x.new_empty((rows.rows, directions * 4 * hidden)) for _ in range(3))
    h_ins = x.new_empty((rows.rows, directions * hidden))
    dgamma_c, dbeta_c = (x.new_empty((directions, hidden)) for _ in range(2))
    launch(
        bnlstm_backward_kernel,
        (directions,),
        x,
        layer.plan.warps,
        used_ih=used[0].contiguous(),
        used_hh=used[1].contiguous(),
        used_c=used[2].contiguous(),
        h0=h0.contiguous(),
        c0=c0.contiguous(),
        y=y.contiguous(),
        cells=cells.contiguous(),
        tape=tape.contiguous(),
        dy=dense(dy),
        dh_n=dense(dh_n),
        dc_n=dense(dc_n),
        dcells=dense(dcells),
        dz=dz,
        da=da,
        db=db,
        h_ins=h_ins,
        dh0=dh0,
        dc0=dc0,
        dgamma_c=dgamma_c,
        dbeta_c=dbeta_c,
        eps=eps,
        BATCH=batch_stats,
        SHARED_IH=sequence,
        **rows.arguments(),
        **layer.arguments(x.dtype),
    )
    live = _live(rows, x.device)
    if live is not None:
        # What the kernel never wrote: the tape of steps past an end.
        tape = tape.masked_fill(~live, 0.0)
    if sequence:
        own = batch_stats and size >= 2
        db = _shared_input_term(layer, dz, tape, used[0], live, eps, own)
    dx = torch.mm(db, layer.inputs()).view(x.shape) if need_dx else None
    dweights: list[Tensor] = []
    if need_dw:
        inputs = rows.without_padding(x)
        parts = (t.chunk(directions, 1) for t in (dz, da, db, h_ins))
        for d, (own_z, own_a, own_b, h_in) in enumerate(zip(*parts, strict=True)):
            a_hat, b_hat = (half[:, : 4 * hidden] for half in tape[d].chunk(2, 1))
            dweights += [torch.mm(own_b.t(), inputs), torch.mm(own_a.t(), h_in)]
            dweights += [own_z.sum(0)] if layer.biased else []
            dweights += [(own_z * b_hat).sum(0), (own_z * a_hat).sum(0)]
            dweights += [dgamma_c[d].clone(), dbeta_c[d].clone()]
    if not need_dstate:
        return dx, None, None, dweights
    return dx, dh0, dc0, dweights


def _shared_input_term(
    layer: _Layer,
    dz: Tensor,
    tape: Tensor,
    used: Tensor,
    live: Tensor | None,
    eps: float,
    batch_stats: bool,
) -> Tensor:
    """The gradient of b where one mean and variance of it serve all steps."""
    width = 4 * layer.hidden
    gamma = layer.tensors["gamma_ih"]
    assert gamma is not None
    count = dz.size(0) if live is None else live.sum()
    found = []
    for d, own in enumerate(dz.chunk(layer.directions, 1)):
        dy = own * gamma[d]
        if batch_stats:
            hat = tape[d, :, layer.width // 2 :][:, :width]
            dy = dy - (dy.sum(0) + hat * (dy * hat).sum(0)) / count
            dy = dy if live is None else torch.where(live, dy, 0.0)
        found.append(dy * torch.rsqrt(used[d, 1, 0] + eps))
    return torch.cat(found, 1)
