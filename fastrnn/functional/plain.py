"""Plain layers in compiled code: those that ``fastrnn.ops.plain`` has operators for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import ops
from fastrnn.autograd import PlainLayer, distinct
from fastrnn.kinds import KINDS
from fastrnn.sequence import Batch

__all__ = ["compiles_plain", "forward_only", "is_exporting", "plain_layer"]

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
    else:
        y, h_n, *rest = ops.plain_forward(x, states, list(weights), cell, batch_first)
    return y, h_n, rest[0] if rest else None
