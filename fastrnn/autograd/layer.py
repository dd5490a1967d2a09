"""Gradients of one layer: the fused forward and backward as differentiable functions.

``Layer`` is y, h_n, c_n, cells = layer(x, h0, c0, weights). Its backward is one fused operator.
When that backward is itself differentiated it runs as ``LayerBackward``, whose own derivative
recomputes the layer through the plain-PyTorch reference: exact to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.autograd.function import Function
from torch.compiler import is_compiling

from fastrnn import ops
from fastrnn.backends import cpu, reference
from fastrnn.backends.cpu_prepared import LayerCall

__all__ = ["Layer", "LayerBackward", "PreparedLayer", "distinct"]

_Grad = Tensor | None
# torch before 2.7 does not say whether there are hooks on saved tensors.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Layer(Function):
    """One layer with gradients.

    ``Layer.apply(x, h0, c0, batch_sizes, lengths, reset, seed, cell, batch_first, recompute, plan,
    noise, *weights)`` returns y, h_n, c_n, cells; shapes as ``fastrnn::layer_forward_train``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        seed: Tensor | None,
        cell: str,
        batch_first: bool,
        recompute: bool,
        plan: str,
        noise: str,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        direct = ops.unobserved(x, h0, c0, lengths, reset, *weights)
        run = ops.CPU["layer_forward_train"] if direct else ops.layer_forward_train
        y, h_n, c_n, cells, gates = run(
            x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, recompute, plan,
            seed, noise,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        kept = (cells, gates) if is_compiling() else (_present(cells), _present(gates))
        saved = (x, h0, c0, y, *kept, batch_sizes, lengths, reset, seed, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = layouts(saved)
        ctx.options = (cell, batch_first, plan, noise)
        return y, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad, dc_n: _Grad, dcells: _Grad) -> tuple[_Grad, ...]:
        x, h0, c0, y, cells, gates, *rest = unpacked(ctx)
        batch_sizes, lengths, reset, seed, *weights = rest
        cell, batch_first, plan, noise = ctx.options
        needs = ctx.needs_input_grad
        need_dx, need_dstate, need_dw = needs[0], needs[1] or needs[2], any(needs[12:])
        if batched(dy, dh_n, dc_n, dcells):
            dx, dh0, dc0, *dweights = by_reference(
                lambda x, h0, c0, *weights: reference.layer(
                    x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, seed, noise
                ),
                [x, h0, c0, *weights],
                (dy, dh_n, dc_n, dcells),
            )
        elif torch.is_grad_enabled() and not is_compiling():
            dx, dh0, dc0, *dweights = LayerBackward.apply(
                dy, dh_n, dc_n, dcells, x, h0, c0, y.detach(), _plain(cells, x), _plain(gates, x),
                batch_sizes, lengths, reset, seed, cell, batch_first, need_dx, need_dstate,
                need_dw, plan, noise, *weights,
            )  # fmt: skip
        else:
            direct = ops.unobserved(dy, dh_n, dc_n, dcells, x, h0, c0, lengths, reset, *weights)
            run = ops.CPU["layer_backward"] if direct else ops.layer_backward
            kept = (cells, gates) if direct else (_given(cells, x), _given(gates, x))
            dx, dh0, dc0, dweights = run(
                dy, dh_n, dc_n, dcells, x, y, h0, c0, *kept, weights, batch_sizes, lengths, reset,
                cell, batch_first, need_dx, need_dstate, need_dw, plan, seed, noise,
            )  # fmt: skip
        if not need_dw:
            dweights = [None] * len(weights)
        return (
            dx if need_dx else None,
            dh0 if needs[1] else None,
            dc0 if needs[2] else None,
            *([None] * 9),
            *dweights,
        )  # fmt: skip


class PreparedLayer(Function):
    """``Layer`` for a call whose fields were prepared: ``PreparedLayer.apply(call, cell,
    batch_first, x, h0, c0, *weights)`` returns y, h_n[, c_n]."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LayerCall,
        cell: str,
        batch_first: bool,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, cells, gates = call.forward(x, h0, c0, weights)
        ctx.set_materialize_grads(False)
        saved = (x, h0, c0, y, cells, gates, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = layouts(saved)
        ctx.options = (call, cell, batch_first)
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, dy: _Grad, dh_n: _Grad, dc_n: _Grad = None) -> tuple[_Grad, ...]:
        x, h0, c0, y, cells, gates, *weights = unpacked(ctx)
        call, cell, batch_first = ctx.options
        needs = ctx.needs_input_grad[3:]
        need = (needs[0], needs[1] or needs[2], any(needs[3:]))
        rest = (None, None, None, None, cell, batch_first, *need, "")
        if batched(dy, dh_n, dc_n):
            dx, dh0, dc0, *dweights = by_reference(
                lambda x, h0, c0, *weights: reference.layer(
                    x, h0, c0, weights, None, None, None, cell, batch_first
                ),
                [x, h0, c0, *weights],
                (dy, dh_n, dc_n, None),
            )
        elif torch.is_grad_enabled():
            dx, dh0, dc0, *dweights = LayerBackward.apply(
                dy, dh_n, dc_n, None, x, h0, c0, y.detach(), _plain(cells, x), _plain(gates, x),
                *rest, "", *weights,
            )  # fmt: skip
        elif ops.unobserved(dy, dh_n, dc_n, x, h0, c0, *weights):
            dx, dh0, dc0, dweights = call.backward(
                dy, dh_n, dc_n, None, x, y, h0, c0, cells, gates, weights, need
            )
        else:
            dx, dh0, dc0, dweights = ops.layer_backward(
                dy, dh_n, dc_n, None, x, y, h0, c0, _plain(cells, x), _plain(gates, x), weights,
                *rest[:3], *rest[4:],
            )  # fmt: skip
        if not need[2]:
            dweights = [None] * len(weights)
        return (
            None,
            None,
            None,
            dx if need[0] else None,
            dh0 if needs[1] else None,
            dc0 if needs[2] else None,
            *dweights,
        )


def _given(tensor: Tensor | None, like: Tensor) -> Tensor:
    """What an operator takes where the direct call has None."""
    return like.new_empty(0) if tensor is None else tensor


def _present(tensor: Tensor | None) -> Tensor | None:
    """The way back: None for an operator's output that does not apply, which has one dimension.

    A checkpoint compares what a call saves with what its repetition saves, and a profiler or a mode
    that sees operators may be there in one of the two.
    """
    return None if tensor is None or tensor.dim() == 1 else tensor


def _plain(tensor: Tensor | None, like: Tensor) -> Tensor:
    return _given(tensor, like).detach()


class LayerBackward(Function):
    """The backward of ``Layer`` as a differentiable function of gradients, input and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: _Grad,
        dh_n: _Grad,
        dc_n: _Grad,
        dcells: _Grad,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        y: Tensor,
        cells: Tensor,
        gates: Tensor,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        seed: Tensor | None,
        cell: str,
        batch_first: bool,
        need_dx: bool,
        need_dstate: bool,
        need_dw: bool,
        plan: str,
        noise: str,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        dx, dh0, dc0, dweights = ops.layer_backward(
            dy, dh_n, dc_n, dcells, x, y, h0, c0, cells, gates, weights, batch_sizes, lengths,
            reset, cell, batch_first, need_dx, need_dstate, need_dw, plan, seed, noise,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        saved = (dy, dh_n, dc_n, dcells, x, h0, c0, batch_sizes, lengths, reset, seed, *weights)
        ctx.save_for_backward(*saved)
        ctx.expected = layouts(saved)
        ctx.options = (cell, batch_first, noise)
        return dx, dh0, dc0, *dweights

    @staticmethod
    def backward(ctx: Any, *upstream: _Grad) -> tuple[_Grad, ...]:
        create_graph = torch.is_grad_enabled()
        saved = unpacked(ctx)
        batch_sizes, lengths, reset, seed = saved[7:11]
        cell, batch_first, noise = ctx.options
        with torch.enable_grad(), reference.without_autocast(saved[4]):
            # Aliases of the true inputs: a third derivative flows on through them.
            aliases = [None if t is None else _alias(t, create_graph) for t in saved]
            grads_out = aliases[:4]
            inputs: list[Any] = [*aliases[4:7], *aliases[11:]]
            x, h0, c0, *weights = inputs
            outputs = reference.layer(
                x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, seed, noise
            )
            first = _gradients(outputs, inputs, grads_out, create_graph=True)
            second = _gradients(first, [*grads_out, *inputs], upstream, create_graph=create_graph)
        dgrads_out, dinputs = second[:4], second[4:]
        return *dgrads_out, *dinputs[:3], *([None] * 14), *dinputs[3:]


def layouts(saved: tuple[_Grad, ...]) -> Any:
    """Dtype, shape and device of what is saved: by the library at once where no hook on saved
    tensors can bring back one of another class, which the library does not look into."""
    if is_compiling():
        return None
    unhooked = _top_hooks is not None and _top_hooks(True) is None
    return (cpu.footprint(saved) if unhooked else None) or _each_layout(saved)


def _each_layout(saved: Sequence[_Grad]) -> list[Any]:
    return [None if t is None else (t.dtype, t.shape, t.device) for t in saved]


def unpacked(ctx: Any) -> Any:
    """``ctx.saved_tensors``, which must be like those that ``layouts`` saw, since kernels take
    their sizes from the call. Hooks may change them, and so does who assigns to ``.data``, which no
    version counter shows."""
    saved = ctx.saved_tensors
    if ctx.expected is None or is_compiling():
        return saved
    look = cpu.footprint if isinstance(ctx.expected, bytes) else _each_layout
    if look(saved) != ctx.expected:
        raise RuntimeError(
            f"saved tensors: the backward got {_each_layout(saved)}, of which one had another "
            "dtype, shape or device in the forward; assign to .data after the backward, and in "
            "saved-tensor hooks convert back in unpack"
        )
    return saved


def batched(*gradients: _Grad) -> bool:
    """Whether each of these is many: torch.autograd.grad(is_grads_batched=True) is at work, or is
    called inside of torch.func.vmap."""
    kinds = torch._C._functorch
    return not is_compiling() and any(
        g is not None and (kinds.is_legacy_batchedtensor(g) or kinds.is_batchedtensor(g))
        for g in gradients
    )


def by_reference(
    run: Callable[..., Sequence[_Grad]], inputs: Sequence[_Grad], upstream: Sequence[_Grad]
) -> list[_Grad]:
    """The gradients of ``run(*inputs)`` by operations that torch can do for many at once."""
    create_graph = torch.is_grad_enabled()
    like = next(t for t in inputs if t is not None)
    with torch.enable_grad(), reference.without_autocast(like):
        aliases = [None if t is None else _alias(t, create_graph) for t in inputs]
        return _gradients(run(*aliases), aliases, upstream, create_graph=create_graph)


def _alias(tensor: Tensor, keep_graph: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if keep_graph and tensor.requires_grad:
        return tensor.view_as(tensor)
    with enable_inplace_requires_grad(True):  # inside of torch.func.vmap too
        return tensor.detach().requires_grad_()


def _gradients(
    outputs: Sequence[_Grad],
    inputs: Sequence[_Grad],
    upstream: Sequence[_Grad],
    *,
    create_graph: bool,
) -> list[_Grad]:
    """torch.autograd.grad that takes None in every place, and returns None where nothing flows."""
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, upstream, strict=False)
        # An operator gives an empty tensor in the place of a gradient nobody asked for.
        if out is not None and grad is not None and out.requires_grad and grad.shape == out.shape
    ]
    wanted = [t for t in inputs if t is not None]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outs, grads = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(outs, wanted, grads, create_graph=create_graph, allow_unused=True)
    )
    return [None if t is None else next(found) for t in inputs]


def distinct(tensors: list[Any]) -> list[Any]:
    """Views in the place of repetitions: dynamo refuses one tensor in two places of a Function."""
    out: list[Any] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in out)
        out.append(tensor.view_as(tensor) if repeated else tensor)
    return out
