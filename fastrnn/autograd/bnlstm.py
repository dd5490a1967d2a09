"""Gradients of one batch-normalised LSTM layer, by the design of ``fastrnn.autograd.layer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.compiler import is_compiling

from fastrnn import ops
from fastrnn.autograd.layer import _alias, _gradients, batched, by_reference, layouts, unpacked
from fastrnn.backends import reference, reference_bnlstm
from fastrnn.backends.cpu_bnlstm import BNLSTMCall

__all__ = ["BNLSTMLayer", "BNLSTMLayerBackward", "PreparedBNLSTMLayer"]

_Grad = Tensor | None
# batch_stats, sequence, batch_first and the plan.
Options = tuple[bool, bool, bool, str]


class BNLSTMLayer(Function):
    """One layer with gradients.

    ``BNLSTMLayer.apply(x, h0, c0, batch_sizes, lengths, reset, eps, options, count,
    *tensors)`` with
    ``count`` weights before the given statistics in ``tensors``; returns y, h_n, c_n, cells and
    the three used statistics, shapes as ``fastrnn::bnlstm_forward``. Statistics are not
    differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        eps: float,
        options: Options,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        batch_stats, sequence, batch_first, plan = options
        weights, running = tensors[:count], tensors[count:]
        direct = ops.unobserved(x, h0, c0, lengths, reset, *tensors)
        run = ops.BNLSTM_CPU["bnlstm_forward"] if direct else ops.bnlstm_forward
        y, h_n, c_n, cells, tape, *used = run(
            x, h0, c0, weights, running, None, batch_sizes, lengths, reset, eps, batch_stats,
            sequence, batch_first, True, True, plan,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*used)
        saved = (x, h0, c0, y, cells, tape, *used, batch_sizes, lengths, reset, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = layouts(saved)
        ctx.eps, ctx.options, ctx.rest = eps, options, len(tensors) - count
        return y, h_n, c_n, cells, *used

    @staticmethod
    def backward(
        ctx: Any, dy: _Grad, dh_n: _Grad, dc_n: _Grad, dcells: _Grad, *_: _Grad
    ) -> tuple[_Grad, ...]:
        dx, dh0, dc0, *dweights = _layer_gradients(
            ctx, ctx.needs_input_grad[:3], ctx.needs_input_grad[9:], dy, dh_n, dc_n, dcells
        )
        return dx, dh0, dc0, None, None, None, None, None, None, *dweights, *[None] * ctx.rest


class PreparedBNLSTMLayer(Function):
    """``BNLSTMLayer`` for a call whose fields were prepared.

    ``PreparedBNLSTMLayer.apply(call, used, running, x, h0, c0, *weights)`` returns y, h_n, c_n, and
    puts the used statistics into the list ``used``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: BNLSTMCall,
        used: list[Tensor],
        running: list[Tensor],
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, cells, tape, *found = call.forward(x, h0, c0, weights, running)
        used += found
        ctx.set_materialize_grads(False)
        saved = (x, h0, c0, y, cells, tape, *found, None, None, None, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = layouts(saved)
        ctx.eps, ctx.options = call.eps, (True, call.sequence, call.batch_first, "")
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad, dc_n: _Grad) -> tuple[_Grad, ...]:
        needs = ctx.needs_input_grad
        gradients = _layer_gradients(ctx, needs[3:6], needs[6:], dy, dh_n, dc_n, None)
        return None, None, None, *gradients


def _layer_gradients(
    ctx: Any,
    needs: Sequence[bool],
    weights_need: Sequence[bool],
    dy: _Grad,
    dh_n: _Grad,
    dc_n: _Grad,
    dcells: _Grad,
) -> list[_Grad]:
    """dx, dh0, dc0 and those of the weights; ``needs``: which of x, h0 and c0 want one."""
    x, h0, c0, y, cells, tape, *rest = unpacked(ctx)
    used, (batch_sizes, lengths, reset), weights = rest[:3], rest[3:6], rest[6:]
    eps, (batch_stats, sequence, batch_first, plan) = ctx.eps, ctx.options
    need_dx, need_dstate = needs[0], needs[1] or needs[2]
    need_dw = any(weights_need[: len(weights)])
    if batched(dy, dh_n, dc_n, dcells):
        dx, dh0, dc0, *dweights = by_reference(
            lambda x, h0, c0, *weights: reference_bnlstm.layer(
                x, h0, c0, weights, _per_direction(used), batch_sizes, lengths, reset, eps,
                batch_stats, sequence, batch_first,
            )[:4],
            [x, h0, c0, *weights],
            (dy, dh_n, dc_n, dcells),
        )  # fmt: skip
    elif torch.is_grad_enabled() and not is_compiling():
        dx, dh0, dc0, *dweights = BNLSTMLayerBackward.apply(
            dy, dh_n, dc_n, dcells, x, h0, c0, y.detach(), cells.detach(), tape, *used,
            batch_sizes, lengths, reset, eps, ctx.options, need_dx, need_dstate, need_dw,
            *weights,
        )  # fmt: skip
    else:
        direct = ops.unobserved(dy, dh_n, dc_n, dcells, x, h0, c0, lengths, reset, *weights)
        run = ops.BNLSTM_CPU["bnlstm_backward"] if direct else ops.bnlstm_backward
        dx, dh0, dc0, dweights = run(
            dy, dh_n, dc_n, dcells, x, y, h0, c0, cells, tape, used, weights, batch_sizes,
            lengths, reset, eps, batch_stats, sequence, batch_first, need_dx, need_dstate,
            need_dw, plan,
        )  # fmt: skip
    if not need_dw:
        dweights = [None] * len(weights)
    return [
        dx if need_dx else None, dh0 if needs[1] else None, dc0 if needs[2] else None, *dweights
    ]  # fmt: skip


class BNLSTMLayerBackward(Function):
    """The backward of ``BNLSTMLayer`` as a differentiable function, by the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: _Grad,
        dh_n: _Grad,
        dc_n: _Grad,
        dcells: _Grad,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        y: Tensor,
        cells: Tensor,
        tape: Tensor,
        used_ih: Tensor,
        used_hh: Tensor,
        used_c: Tensor,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        eps: float,
        options: Options,
        need_dx: bool,
        need_dstate: bool,
        need_dw: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        batch_stats, sequence, batch_first, plan = options
        used = (used_ih, used_hh, used_c)
        dx, dh0, dc0, dweights = ops.bnlstm_backward(
            dy, dh_n, dc_n, dcells, x, y, h0, c0, cells, tape, used, weights, batch_sizes, lengths,
            reset, eps, batch_stats, sequence, batch_first, need_dx, need_dstate, need_dw, plan,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        saved = (dy, dh_n, dc_n, dcells, x, h0, c0, *used, batch_sizes, lengths, reset, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = layouts(saved)
        ctx.eps, ctx.options = eps, options
        return dx, dh0, dc0, *dweights

    @staticmethod
    def backward(ctx: Any, *upstream: _Grad) -> tuple[_Grad, ...]:
        create_graph = torch.is_grad_enabled()
        saved = unpacked(ctx)
        used, (batch_sizes, lengths, reset) = saved[7:10], saved[10:13]
        eps, (batch_stats, sequence, batch_first, _) = ctx.eps, ctx.options
        with torch.enable_grad(), reference.without_autocast(saved[4]):
            # Aliases of the true inputs: a third derivative flows on through them.
            aliases = [
                None if t is None else _alias(t, create_graph) for t in (*saved[:7], *saved[13:])
            ]
            grads_out, inputs = aliases[:4], aliases[4:]
            x, h0, c0, *weights = inputs
            assert x is not None
            assert h0 is not None
            assert c0 is not None
            outputs = reference_bnlstm.layer(
                x, h0, c0, [w for w in weights if w is not None], _per_direction(used), batch_sizes,
                lengths, reset, eps, batch_stats, sequence, batch_first,
            )  # fmt: skip
            first = _gradients(outputs[:4], inputs, grads_out, create_graph=True)
            second = _gradients(first, [*grads_out, *inputs], upstream, create_graph=create_graph)
        dgrads_out, dinputs = second[:4], second[4:]
        return *dgrads_out, *dinputs[:3], *([None] * 14), *dinputs[3:]


def _per_direction(used: tuple[Tensor, ...]) -> list[Tensor]:
    """Used statistics in the form of given ones, which a step without its own reads."""
    return [part for d in range(used[0].size(0)) for term in used for part in term[d].unbind(0)]
