"""The operators of a plain layer, which compiled code calls for the CPU: few arguments, no more
results than there are.

Plain is a dense sequence without masks, layer norm, projection or recomputation. Sizes as in
``fastrnn.ops.layer``; beside them

    states    h0, for an LSTM c0; none for zeros
    weights   per direction w_ih, w_hh[, b_ih, b_hh]; `matrices` are those without the biases
    tape      what the cell has of cells and gates
    grads     of y, h_n and c_n, None for zeros

and there is a list of results in the order of the schema's comment. A small layer takes less time
than calling an operator with all the options of ``layer_forward`` and keeping what its backward
asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import cpu, cpu_plain
from fastrnn.kinds import KINDS
from fastrnn.ops.layer import forward_only, implement, state_dtype

__all__ = ["plain_backward", "plain_forward", "plain_forward_into", "plain_forward_train"]

_LAYER = "(Tensor x, Tensor[] states, Tensor[] weights, str cell, bool batch_first) -> Tensor[]"
_SCHEMAS = {
    "plain_forward": _LAYER,  # y, h_n[, c_n]
    # Into what is given: inductor allocates that itself, and checks no result of ours.
    "plain_forward_into": (
        "(Tensor x, Tensor[] states, Tensor[] weights, str cell, bool batch_first, Tensor(a!) y, "
        "Tensor(b!) h_n, Tensor(c!)? c_n) -> ()"
    ),
    "plain_forward_train": _LAYER,  # y, h_n[, c_n][, cells][, gates]
    # What is needed of dx, dh0[, dc0] and the gradient of each weight.
    "plain_backward": (
        "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor y, Tensor[] states, "
        "Tensor[] tape, Tensor[] matrices, str cell, bool batch_first, bool bias, bool need_dx, "
        "bool need_dstate, bool need_dw) -> Tensor[]"
    ),
}


def directions_of(weights: Sequence[Tensor]) -> int:
    """How many directions these weights, or their matrices, are of."""
    return sum(w.dim() == 2 for w in weights) // 2


def _fake_forward(
    x: Tensor, states: list[Tensor], weights: list[Tensor], cell: str, batch_first: bool
) -> list[Tensor]:
    directions, hidden = directions_of(weights), weights[1].shape[1]
    size = x.shape[0] if batch_first else x.shape[1]
    y = x.new_empty((*x.shape[:-1], directions * hidden))
    count = 2 if KINDS[cell].has_cell else 1
    return [y, *[x.new_empty((directions, size, hidden)) for _ in range(count)]]


def _fake_forward_into(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    cell: str,
    batch_first: bool,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
) -> None:
    pass


def _fake_forward_train(
    x: Tensor, states: list[Tensor], weights: list[Tensor], cell: str, batch_first: bool
) -> list[Tensor]:
    results, kind = _fake_forward(x, states, weights, cell, batch_first), KINDS[cell]
    y, h_n, dtype = results[0], results[1], state_dtype(x.dtype)
    if kind.has_cell:
        results.append(x.new_empty(y.shape, dtype=dtype))
    if kind.tape:
        shape = (h_n.shape[0], x.shape[0] * x.shape[1], kind.tape * h_n.shape[2])
        results.append(x.new_empty(shape, dtype=dtype))
    return results


def _fake_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    y: Tensor,
    states: list[Tensor],
    tape: list[Tensor],
    matrices: list[Tensor],
    cell: str,
    batch_first: bool,
    bias: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
) -> list[Tensor]:
    results = [x.new_empty(x.shape)] if need_dx else []
    if need_dstate:
        hidden, size = matrices[1].shape[1], x.shape[0] if batch_first else x.shape[1]
        shape = (directions_of(matrices), size, hidden)
        results += [x.new_empty(shape) for _ in range(2 if KINDS[cell].has_cell else 1)]
    for at in range(0, len(matrices) if need_dw else 0, 2):
        own = matrices[at : at + 2]
        results += [w.new_empty(w.shape) for w in own]
        results += [w.new_empty(w.shape[:1]) for w in own] if bias else []
    return results


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema)

plain_forward = torch.ops.fastrnn.plain_forward.default
plain_forward_into = torch.ops.fastrnn.plain_forward_into.default
plain_forward_train = torch.ops.fastrnn.plain_forward_train.default
plain_backward = torch.ops.fastrnn.plain_backward.default
if cpu.LOADED:
    # Before anything else: an operator is known by this attribute too.
    cpu_plain.call_directly(plain_forward, plain_forward_train, plain_backward, plain_forward_into)

_FAKES: dict[str, Callable[..., Any]] = {
    "plain_forward": _fake_forward,
    "plain_forward_into": _fake_forward_into,
    "plain_forward_train": _fake_forward_train,
    "plain_backward": _fake_backward,
}
for _name, _fake in _FAKES.items():
    if cpu.LOADED:  # nothing is traced for the CPU without
        implement("CPU", _name, getattr(cpu_plain, _name))
    torch.library.register_fake(f"fastrnn::{_name}", _fake)
if cpu.LOADED:
    forward_only("plain_forward")
