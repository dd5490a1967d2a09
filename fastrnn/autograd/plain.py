"""Gradients of a plain layer in compiled code, where they are not differentiated again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function

from fastrnn import ops
from fastrnn.kinds import KINDS

__all__ = ["PlainLayer"]

_Grad = Tensor | None


class PlainLayer(Function):
    """``PlainLayer.apply(cell, batch_first, given, x, *states, *weights)``, with as many states as
    are given, returns y, h_n[, c_n]; see ``fastrnn.ops.plain``.

    Each tensor that is kept for the backward costs compiled code more than a microsecond, so no
    bias is, nor a state of zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: str, batch_first: bool, given: int, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        states, weights = list(tensors[:given]), list(tensors[given:])
        results = ops.plain_forward_train(x, states, weights, cell, batch_first)
        count = 3 if KINDS[cell].has_cell else 2
        matrices = [w for w in weights if w.dim() == 2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, results[0], *states, *matrices, *results[count:])
        ctx.options = (cell, batch_first, given, len(matrices), len(weights))
        return tuple(results[:count])

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad, dc_n: _Grad = None) -> tuple[_Grad, ...]:
        cell, batch_first, given, matrices, weights = ctx.options
        x, y, *saved = ctx.saved_tensors
        need_dx, *needs = ctx.needs_input_grad[3:]
        need_dstate, need_dw = any(needs[:given]), any(needs[given:])
        found = ops.plain_backward(
            dy, dh_n, dc_n, x, y, saved[:given], saved[given + matrices :],
            saved[given : given + matrices], cell, batch_first, weights > matrices,
            need_dx, need_dstate, need_dw,
        )  # fmt: skip
        found = list(found)
        dx = found.pop(0) if need_dx else None
        dstates = [found.pop(0) if need_dstate else None for _ in range(given)]
        dweights = found if need_dw else [None] * weights
        return None, None, None, dx, *dstates, *dweights
