"""The operators of ``fastrnn.ops.plain``: functions of the native library, for small layers of a
kind that it knows, and what it calls for every other, which tells it of the kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import cpu, cpu_prepared
from fastrnn.kinds import KINDS

__all__ = [
    "FUNCTIONS",
    "call_directly",
    "plain_backward",
    "plain_forward",
    "plain_forward_into",
    "plain_forward_train",
    "setup",
]

_Grad = Tensor | None


def _states(
    x: Tensor, states: list[Tensor], matrices: list[Tensor], cell: str, batch_first: bool
) -> tuple[Tensor, Tensor | None]:
    if not states:
        directions, hidden = sum(w.dim() == 2 for w in matrices) // 2, matrices[1].size(1)
        h0 = x.new_zeros((directions, x.size(0 if batch_first else 1), hidden))
        return h0, h0 if KINDS[cell].has_cell else None
    return states[0], states[1] if len(states) > 1 else None


def _call(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    cell: str,
    batch_first: bool,
    known: bool,
) -> tuple[Tensor, Tensor | None]:
    """The states of a call, of whose kind the library gets to know if it is a small one."""
    h0, c0 = _states(x, states, weights, cell, batch_first)
    call = None if known else cpu_prepared.prepared(cell, x, h0, c0, weights, batch_first)
    if call is not None:
        cpu_prepared.library().plain_known(
            (cell, batch_first, x, weights[1]), *call.plain(x, h0, weights)
        )
    return h0, c0


def _forward(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    cell: str,
    batch_first: bool,
    known: bool,
) -> list[Tensor]:
    h0, c0 = _call(x, states, weights, cell, batch_first, known)
    y, h_n, c_n, _ = cpu.layer_forward(
        x, h0, c0, weights, None, None, None, None, cell, batch_first, False, ""
    )
    return [y, h_n] if c_n is None else [y, h_n, c_n]


def _forward_into(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    cell: str,
    batch_first: bool,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    known: bool,
) -> None:
    results = _forward(x, states, weights, cell, batch_first, known)
    for into, result in zip((y, h_n) if c_n is None else (y, h_n, c_n), results, strict=True):
        into.copy_(result)


def _forward_train(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    cell: str,
    batch_first: bool,
    known: bool,
) -> list[Tensor]:
    h0, c0 = _call(x, states, weights, cell, batch_first, known)
    results = cpu.layer_forward_train(
        x, h0, c0, weights, None, None, None, cell, batch_first, False, ""
    )
    return [t for t in results if t is not None]


def _backward(
    dy: _Grad,
    dh_n: _Grad,
    dc_n: _Grad,
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
    known: bool,
) -> list[Tensor]:
    weights: list[Tensor] = []
    for at in range(0, len(matrices), 2):
        own = matrices[at : at + 2]
        # The backward reads no bias: what stands for one has its size.
        weights += [*own, *[w.new_empty(w.size(0)) for w in own]] if bias else own
    h0, c0 = _call(x, states, weights, cell, batch_first, known)
    cells = tape[0] if KINDS[cell].has_cell else None
    gates = tape[-1] if KINDS[cell].tape else None
    dx, dh0, dc0, dweights = cpu.layer_backward(
        dy, dh_n, dc_n, None, x, y, h0, c0, cells, gates, weights, None, None, None, cell,
        batch_first, need_dx, need_dstate, need_dw, "",
    )  # fmt: skip
    return [t for t in (dx, dh0, dc0, *dweights) if t is not None]


FUNCTIONS = (_forward, _forward_train, _backward, _forward_into)  # what the library asks


def setup(*functions: Any) -> None:
    """Tell the library what to ask, in the order of ``FUNCTIONS``."""
    cpu_prepared.library().plain_setup(*functions)


def call_directly(*operators: Any) -> None:
    """Let these operators of torch (in the order of ``FUNCTIONS``) be functions of the library,
    which go through torch's dispatcher only where somebody would see them there: it takes longer
    than a small layer."""
    native, c = cpu_prepared.library(), torch._C
    try:
        quiet = (
            torch.is_grad_enabled,
            c._len_torch_dispatch_stack,
            c._len_torch_function_stack,
            c._are_functorch_transforms_active,
            c._get_tracing_state,
            c._autograd._profiler_enabled,
        )
    except AttributeError:  # a torch without one of these names: the dispatcher it is
        return
    native.plain_watch((Tensor, torch.nn.Parameter), quiet)
    native.plain_operators(tuple(operator._op for operator in operators))
    names = (
        "plain_forward_op", "plain_forward_train_op", "plain_backward_op", "plain_forward_into_op"
    )  # fmt: skip
    for operator, name in zip(operators, names, strict=True):
        operator._op = getattr(native, name)


if cpu.LOADED:
    setup(*FUNCTIONS)
    plain_forward = cpu_prepared.library().plain_forward
    plain_forward_into = cpu_prepared.library().plain_forward_into
    plain_forward_train = cpu_prepared.library().plain_forward_train
    plain_backward = cpu_prepared.library().plain_backward
