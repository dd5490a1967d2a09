"""Plain layers in compiled code: those that ``fastrnn.ops.plain`` has operators for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastrnn import ops
from fastrnn.autograd import PlainLayer, distinct
from fastrnn.kinds import KINDS
from fastrnn.ops.plain import directions_of
from fastrnn.sequence import Batch

__all__ = ["compiles_plain", "forward_only", "is_exporting", "plain_layer"]

_SMALL = 1 << 14  # values of y
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
# torch before 2.7 does not tell export from compile.
_tells_export = hasattr(torch.compiler, "is_exporting")


def is_exporting() -> bool:
    """Whether torch.export is at work. Asked while dynamo traces: that of torch 2.7 to 2.11 takes
    torch's own function for True."""
    return _tells_export and torch.compiler.is_exporting()


is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_only() -> bool:
    """Whether no backward can follow, so that no tape is needed: in a program that torch.export or
    torch.jit.trace records, and in inference mode, whatever its grad mode."""
    if is_compiling():
        return is_exporting()
    return torch._C._get_tracing_state() is not None or torch.is_inference_mode_enabled()


def compiles_plain(cell: str, batch: Batch) -> bool:
    """Whether torch.compile is at work on a call of this kind. An exported program keeps to one
    operator for all calls, whose schema changes no more."""
    return (
        is_compiling()
        and _tells_export
        and not is_exporting()
        and batch.batch_sizes is batch.lengths is batch.reset is None
        and not KINDS[cell].norms
    )


def _given_results(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the operator gets its results to fill: for a small layer of fixed size, which is
    faster where inductor allocates them. It has no derivative, and vmap no rule, that would raise
    where somebody wants one, so nobody may."""
    if torch.is_grad_enabled() or _transformed() or getattr(forward_ad, "_current_level", 0) >= 0:
        return False
    steps, rows, _ = x.shape
    fixed = type(steps) is int and type(rows) is int  # no guard of its own on a size
    return fixed and steps * rows * directions_of(weights) * weights[1].size(1) <= _SMALL


def plain_layer(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    batch_first: bool,
    records: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer: y, h_n, c_n. h and c are None together for zeros."""
    states = [t for t in (h, c) if t is not None]
    if records:
        x, *tensors = distinct([x, *states, *weights])
        y, h_n, *rest = PlainLayer.apply(cell, batch_first, len(states), x, *tensors)
    elif _given_results(x, weights):
        directions, hidden = directions_of(weights), weights[1].size(1)
        y = x.new_empty((x.size(0), x.size(1), directions * hidden))
        shape = (directions, x.size(0 if batch_first else 1), hidden)
        h_n, *rest = [x.new_empty(shape) for _ in range(2 if KINDS[cell].has_cell else 1)]
        c_n = rest[0] if rest else None
        ops.plain_forward_into(x, states, list(weights), cell, batch_first, y, h_n, c_n)
    else:
        y, h_n, *rest = ops.plain_forward(x, states, list(weights), cell, batch_first)
    return y, h_n, rest[0] if rest else None
