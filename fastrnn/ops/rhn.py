"""The operators behind a Recurrent Highway layer: schemas, fakes and registration.

As ``fastrnn.ops.layer``: one call runs one layer over the whole sequence, both directions; fresh
outputs, no input is written. Shapes, with D directions, depth L, and G = 2 gates h, t where the
carry is coupled, else 3 gates h, t, c, both read from the weights:

    x        (T, N, I), (N, T, I) if batch_first, or packed rows (sum, I) with batch_sizes
    h0       (D, N, H)
    weights  per direction: w_ih (G*H, I), w_hh (L, G*H, H)[, bias (L, G*H)]
    x_mask   (D, g, N, I) or None: factors of x, g = 1 for all gates or G for one each
    s_mask   (D, g, N, H) or None: factors of the state in the matrix products
    y        x's leading sizes + (D*H)
    gates    the tape of the backward, (D, L, rows, ..): opaque, empty to recompute

Masks are constants: nothing is differentiated by them. Weights are packed by
``fastrnn::pack_weights`` with the cell "rhn".
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.ops.layer import forward_only, register, state_dtype

__all__ = ["RHN_CPU", "rhn_backward", "rhn_forward", "rhn_forward_train"]

_SEQUENCE = "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, bool batch_first"
_SCHEMAS = {
    "rhn_forward": (
        "(Tensor x, Tensor h0, Tensor[] weights, Tensor? x_mask, Tensor? s_mask, Tensor? packed, "
        f"{_SEQUENCE}, str plan) -> (Tensor y, Tensor h_n)"
    ),
    "rhn_forward_train": (
        "(Tensor x, Tensor h0, Tensor[] weights, Tensor? x_mask, Tensor? s_mask, "
        f"{_SEQUENCE}, bool recompute, str plan) -> (Tensor y, Tensor h_n, Tensor gates)"
    ),
    "rhn_backward": (
        "(Tensor? dy, Tensor? dh_n, Tensor x, Tensor y, Tensor h0, Tensor gates, Tensor[] weights, "
        f"Tensor? x_mask, Tensor? s_mask, {_SEQUENCE}, bool need_dx, bool need_dstate, "
        "bool need_dw, str plan) -> (Tensor dx, Tensor dh0, Tensor[] dweights)"
    ),
}


def _fake_rhn_forward(
    x: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    plan: str,
) -> tuple[Tensor, Tensor]:
    directions, _, hidden = h0.shape
    return x.new_empty((*x.shape[:-1], directions * hidden)), x.new_empty(h0.shape)


def _fake_rhn_forward_train(
    x: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    recompute: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    directions, _, hidden = h0.shape
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    depth, width, _ = weights[1].shape
    dtype = state_dtype(x.dtype)
    if plan.startswith("cuda"):
        # Its kernels know no packed rows, and keep the state before each micro-step beside its
        # gates, in the dtype of the output.
        rows = rows if batch_sizes is None else batch_sizes.shape[0] * h0.shape[1]
        width, dtype = width + hidden, x.dtype
    shape = (directions, depth, rows, 0 if recompute else width)
    y = x.new_empty((*x.shape[:-1], directions * hidden))
    return y, x.new_empty(h0.shape), x.new_empty(shape, dtype=dtype)


def _fake_rhn_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    gates: Tensor,
    weights: list[Tensor],
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dh0 = x.new_empty(h0.shape if need_dstate else (0,))
    return dx, dh0, [w.new_empty(w.shape) for w in weights] if need_dw else []


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema)

_TRITON = "fastrnn.backends.triton.rhn"
_CUDA = "fastrnn.backends.cuda_rhn"
RHN_CPU = register("CPU", "fastrnn.backends.cpu_rhn", _SCHEMAS, _TRITON, _CUDA)
register("CUDA", _TRITON, _SCHEMAS, cuda=_CUDA)
torch.library.register_fake("fastrnn::rhn_forward", _fake_rhn_forward)
forward_only("rhn_forward")
torch.library.register_fake("fastrnn::rhn_forward_train", _fake_rhn_forward_train)
torch.library.register_fake("fastrnn::rhn_backward", _fake_rhn_backward)

rhn_forward = torch.ops.fastrnn.rhn_forward.default
rhn_forward_train = torch.ops.fastrnn.rhn_forward_train.default
rhn_backward = torch.ops.fastrnn.rhn_backward.default
