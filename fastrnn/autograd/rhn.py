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
from fastrnn.autograd.layer import _alias, _gradients, batched, by_reference, layouts, unpacked
from fastrnn.backends import reference
from fastrnn.backends.cpu_rhn import RhnCall

__all__ = ["PreparedRhnLayer", "RhnLayer", "RhnLayerBackward"]

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
        saved = (x, h0, y, gates, x_mask, s_mask, batch_sizes, lengths, reset, *weights)
        _save(ctx, saved, (batch_first, plan, None))
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad) -> tuple[_Grad, ...]:
        needs = ctx.needs_input_grad
        dx, dh0, *dweights = _layer_gradients(ctx, (*needs[:2], any(needs[10:])), dy, dh_n)
        return dx, dh0, *([None] * 8), *dweights


class PreparedRhnLayer(Function):
    """``RhnLayer`` for a call whose fields were prepared: ``PreparedRhnLayer.apply(call, x, h0,
    *weights)`` returns y, h_n."""

    @staticmethod
    def forward(
        ctx: Any, call: RhnCall, x: Tensor, h0: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, h_n, gates = call.forward(x, h0, weights)
        saved = (x, h0, y, gates, None, None, None, None, None, *weights)
        _save(ctx, saved, (call.batch_first, "", call))
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad) -> tuple[_Grad, ...]:
        needs = ctx.needs_input_grad
        return None, *_layer_gradients(ctx, (*needs[1:3], any(needs[3:])), dy, dh_n)


def _save(ctx: Any, saved: tuple[_Grad, ...], options: tuple[bool, str, RhnCall | None]) -> None:
    """For ``_layer_gradients``; options: batch_first, the plan, and a call that was prepared."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.expected = layouts(saved)
    ctx.options = options


def _layer_gradients(
    ctx: Any, needs: tuple[bool, bool, bool], dy: _Grad, dh_n: _Grad
) -> list[_Grad]:
    """dx, dh0 and those of the weights; ``needs`` says which of the three."""
    saved = unpacked(ctx)
    x, h0, y, gates, x_mask, s_mask, batch_sizes, lengths, reset, *weights = saved
    batch_first, plan, call = ctx.options
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
            batch_first, *needs, plan, *weights,
        )  # fmt: skip
    elif (
        call is not None
        and ops.unobserved(dy, dh_n)
        and call.takes(kept := (x, h0, y, gates, *weights))
    ):
        dx, dh0, dweights = call.backward(dy, dh_n, kept, needs)
    else:
        direct = ops.unobserved(dy, dh_n, x, h0, x_mask, s_mask, lengths, reset, *weights)
        run = ops.RHN_CPU["rhn_backward"] if direct else ops.rhn_backward
        dx, dh0, dweights = run(
            dy, dh_n, x, y, h0, gates, weights, x_mask, s_mask, batch_sizes, lengths, reset,
            batch_first, *needs, plan,
        )  # fmt: skip
    need_dx, need_dstate, need_dw = needs
    if not need_dw:
        dweights = [None] * len(weights)
    return [dx if need_dx else None, dh0 if need_dstate else None, *dweights]


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
        ctx.expected = layouts(saved)
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
