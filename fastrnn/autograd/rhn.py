"""Gradients of one Recurrent Highway layer; built as ``fastrnn.autograd.layer``.

``RhnLayer`` is y, h_n = layer(x, h0, weights). Its backward is one fused operator, which runs as
``RhnLayerBackward`` when it is itself differentiated: by recomputation through the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.compiler import is_compiling

from fastrnn import ops
from fastrnn.autograd.layer import _alias, _gradients, batched, by_reference, hooked, unpacked
from fastrnn.backends import reference

__all__ = ["RhnLayer", "RhnLayerBackward"]

_Grad = Tensor | None


class RhnLayer(Function):
    """One layer with gradients.

    ``RhnLayer.apply(x, h0, x_mask, s_mask, batch_sizes, lengths, reset, batch_first, recompute,
    plan, *weights)`` returns y, h_n; shapes as ``fastrnn::rhn_forward_train``. Masks are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        x_mask: Tensor | None,
        s_mask: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_first: bool,
        recompute: bool,
        plan: str,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        direct = ops.unobserved(x, h0, x_mask, s_mask, lengths, reset, *weights)
        run = ops.RHN_CPU["rhn_forward_train"] if direct else ops.rhn_forward_train
        y, h_n, gates = run(
            x,
            h0,
            weights,
            x_mask,
            s_mask,
            batch_sizes,
            lengths,
            reset,
            batch_first,
            recompute,
            plan,
        )
        ctx.set_materialize_grads(False)
        saved = (x, h0, y, gates, x_mask, s_mask, batch_sizes, lengths, reset, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = hooked(saved)
        ctx.options = (batch_first, plan)
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad) -> tuple[_Grad, ...]:
        x, h0, y, gates, x_mask, s_mask, batch_sizes, lengths, reset, *weights = unpacked(ctx)
        batch_first, plan = ctx.options
        needs = ctx.needs_input_grad
        need_dx, need_dstate, need_dw = needs[0], needs[1], any(needs[10:])
        if batched(dy, dh_n):
            dx, dh0, *dweights = by_reference(
                lambda x, h0, *weights: reference.rhn(
                    x, h0, weights, x_mask, s_mask, batch_sizes, lengths, reset, batch_first
                ),
                [x, h0, *weights],
                (dy, dh_n),
            )
        elif torch.is_grad_enabled() and not is_compiling():
            dx, dh0, *dweights = RhnLayerBackward.apply(
                dy, dh_n, x, h0, y.detach(), gates, x_mask, s_mask, batch_sizes, lengths, reset,
                batch_first, need_dx, need_dstate, need_dw, plan, *weights,
            )  # fmt: skip
        else:
            direct = ops.unobserved(dy, dh_n, x, h0, x_mask, s_mask, lengths, reset, *weights)
            run = ops.RHN_CPU["rhn_backward"] if direct else ops.rhn_backward
            dx, dh0, dweights = run(
                dy, dh_n, x, y, h0, gates, weights, x_mask, s_mask, batch_sizes, lengths, reset,
                batch_first, need_dx, need_dstate, need_dw, plan,
            )  # fmt: skip
        if not need_dw:
            dweights = [None] * len(weights)
        own = (dx if need_dx else None, dh0 if need_dstate else None)
        return *own, *([None] * 8), *dweights


class RhnLayerBackward(Function):
    """The backward of ``RhnLayer`` as a differentiable function of gradients, input and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: _Grad,
        dh_n: _Grad,
        x: Tensor,
        h0: Tensor,
        y: Tensor,
        gates: Tensor,
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
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        dx, dh0, dweights = ops.rhn_backward(
            dy, dh_n, x, y, h0, gates, weights, x_mask, s_mask, batch_sizes, lengths, reset,
            batch_first, need_dx, need_dstate, need_dw, plan,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        saved = (dy, dh_n, x, h0, x_mask, s_mask, batch_sizes, lengths, reset, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = hooked(saved)
        ctx.batch_first = batch_first
        return dx, dh0, *dweights

    @staticmethod
    def backward(ctx: Any, *upstream: _Grad) -> tuple[_Grad, ...]:
        create_graph = torch.is_grad_enabled()
        dy, dh_n, x, h0, x_mask, s_mask, batch_sizes, lengths, reset, *weights = unpacked(ctx)
        with torch.enable_grad(), reference.without_autocast(x):
            # Aliases of the true inputs: a third derivative flows on through them.
            grads_out = [None if t is None else _alias(t, create_graph) for t in (dy, dh_n)]
            inputs = [_alias(t, create_graph) for t in (x, h0, *weights)]
            outputs = reference.rhn(
                inputs[0], inputs[1], inputs[2:], x_mask, s_mask, batch_sizes, lengths, reset,
                ctx.batch_first,
            )  # fmt: skip
            first = _gradients(outputs, inputs, grads_out, create_graph=True)
            second = _gradients(first, [*grads_out, *inputs], upstream, create_graph=create_graph)
        return *second[:4], *([None] * 12), *second[4:]
