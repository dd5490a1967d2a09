"""The operators behind a batch-normalised LSTM layer; the rules are those of ``fastrnn.ops.layer``.

    x, y, cells, h0, c0, batch_sizes, lengths, reset    as ``fastrnn::layer_forward``
    weights  per direction w_ih (4H, I), w_hh (4H, H)[, bias (4H)], gamma_ih (4H), gamma_hh (4H),
             gamma_c (H), beta_c (H)
    running  per direction mean and variance of the input term (L, 4H), of the recurrent term
             (L, 4H) and of the cell (L, H); step s reads row min(s, L - 1)
    used_*   the statistics that each step used, (D, 2, T, width): mean, then biased variance;
             T is 1 for a shared input term, and 0 without both ``batch_stats`` and ``record``.
    tape     normalised terms for the backward, where ``record``: opaque

With the plan "cuda" cells and used statistics of 16-bit tensors are float32; other backends take
float32 and float64 only.

``batch_stats``: statistics of the batch in each step with two live rows or more. ``sequence``: one
statistic of the input term for all steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.ops.layer import forward_only, register

__all__ = ["BNLSTM_CPU", "bnlstm_backward", "bnlstm_forward"]

_SCHEMAS = {
    "bnlstm_forward": (
        "(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, Tensor[] running, Tensor? packed, "
        "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, float eps, bool batch_stats, "
        "bool sequence, bool batch_first, bool return_cells, bool record, str plan) "
        "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor tape, Tensor used_ih, "
        "Tensor used_hh, Tensor used_c)"
    ),
    "bnlstm_backward": (
        "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor y, Tensor h0, "
        "Tensor c0, Tensor cells, Tensor tape, Tensor[] used, Tensor[] weights, "
        "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, float eps, bool batch_stats, "
        "bool sequence, bool batch_first, bool need_dx, bool need_dstate, bool need_dw, str plan) "
        "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
    ),
}


def _fake_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    running: list[Tensor],
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
    y = x.new_empty((*x.shape[:-1], directions * hidden))
    wide = torch.float32 if plan.startswith("cuda") else x.dtype
    cells = y.new_empty(y.shape if return_cells or record else (0,), dtype=wide)
    if batch_sizes is not None:
        steps, rows = batch_sizes.shape[0], x.shape[0]
    else:
        steps, rows = x.shape[1 if batch_first else 0], x.shape[0] * x.shape[1]
    width = -(-4 * hidden // 16) * 32
    if plan.startswith("cuda"):
        # Its kernels know no packed rows, and keep activated gates.
        rows = rows if batch_sizes is None else steps * size
        width = 12 * hidden
    tape = x.new_empty((directions, rows if record else 0, width))
    known = batch_stats or record
    steps = steps if known else 0
    return (
        y,
        x.new_empty((directions, size, hidden)),
        x.new_empty((directions, size, hidden)),
        cells,
        tape,
        x.new_empty((directions, 2, int(known) if sequence else steps, 4 * hidden), dtype=wide),
        x.new_empty((directions, 2, steps, 4 * hidden), dtype=wide),
        x.new_empty((directions, 2, steps, hidden), dtype=wide),
    )


def _fake_backward(
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
    used: list[Tensor],
    weights: list[Tensor],
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
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dh0 = x.new_empty(h0.shape if need_dstate else (0,))
    dc0 = x.new_empty(c0.shape if need_dstate else (0,))
    return dx, dh0, dc0, [w.new_empty(w.shape) for w in weights] if need_dw else []


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema)

_TRITON = "fastrnn.backends.triton.bnlstm"
_CUDA = "fastrnn.backends.cuda_bnlstm"
BNLSTM_CPU = register("CPU", "fastrnn.backends.cpu_bnlstm", _SCHEMAS, _TRITON, _CUDA)
register("CUDA", _TRITON, _SCHEMAS, cuda=_CUDA)
torch.library.register_fake("fastrnn::bnlstm_forward", _fake_forward)
forward_only("bnlstm_forward")
torch.library.register_fake("fastrnn::bnlstm_backward", _fake_backward)

bnlstm_forward = torch.ops.fastrnn.bnlstm_forward.default
bnlstm_backward = torch.ops.fastrnn.bnlstm_backward.default
