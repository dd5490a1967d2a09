"""The CPU backend of the Recurrent Highway Network: the ops of `fastrnn.ops.rhn` on `fastrnn._cpu`.

As `fastrnn.backends.cpu`, this file owns every buffer. The kernels compute in float32 and float64;
bfloat16 tensors are widened to float32 on the way in and rounded on the way out, so that states and
sums stay in float32 over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.cpu import (
    _TYPES,
    _aligned,
    _compute_dtype,
    _pointer,
    _prepare_sequence,
    _rows,
    _sequence_fields,
    _shape,
    _strides,
)
from fastrnn.backends.cpu_memory import kept, kept_like, output
from fastrnn.backends.cpu_plan import read_plan


def _library() -> Any:
    """The native module; absent from a tree without a build, where no call comes this far."""
    from fastrnn.backends import cpu

    return cpu._cpu  # type: ignore[attr-defined]


def plan(
    depth: int,
    gates: int,
    T: int,
    N: int,
    I: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    threads: int,
) -> str:
    """What the kernels will do with a layer of this shape, in words for `explain`."""
    kind = _TYPES[_compute_dtype(dtype)]
    library = _library()
    fields = (kind, 0, 0, threads, D, T, N, I, H, depth, gates, 0, 0)
    count, partition = library.rhn_plan(fields)
    if count == 1:
        split = "1 thread"
    elif D == 2 and count == 2:
        split = "2 threads, one per direction"
    else:
        what = "hidden units" if partition == "units" else "batch rows"
        split = f"{count} threads over {what}"
    widened = ", computed in float32" if dtype == torch.bfloat16 else ""
    return f"{library.isa()}, {split}, all steps in one call{widened}"


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _wide_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _wide(tensor, dtype)


def _groups(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.size(1)


def _problem(
    plan_text: str,
    weights: Sequence[Tensor],
    shape: tuple[int, int],
    directions: int,
    x_mask: Tensor | None,
    s_mask: Tensor | None,
) -> tuple[int, ...]:
    read = read_plan(plan_text)
    depth, rows, hidden = weights[1].shape
    return (
        _TYPES[weights[0].dtype],
        read.partition,
        read.linear,
        torch.get_num_threads(),
        directions,
        *shape,
        weights[0].size(1),
        hidden,
        depth,
        rows // hidden,
        _groups(x_mask),
        _groups(s_mask),
    )


def _addresses(tensors: Sequence[Tensor], directions: int) -> list[int]:
    """Three addresses a direction (w_ih, w_hh, bias); 0 for an absent bias."""
    per = len(tensors) // directions
    out: list[int] = []
    for d in range(directions):
        own = [t.data_ptr() for t in tensors[d * per : (d + 1) * per]]
        out += own if per == 3 else [*own, 0]
    return out


def pack_weights(weights: Sequence[Tensor]) -> Tensor:
    """Weights of a layer without a mask per gate, in the order the forward kernel reads them."""
    dtype = _compute_dtype(weights[0].dtype)
    weights = [_wide(w, dtype) for w in weights]
    # A direction has two or three tensors, the first of them a matrix as is no bias of depth 1.
    directions = 2 if len(weights) > 3 else 1
    problem = _problem("", weights, (1, 1), directions, None, None)
    library = _library()
    packed = output((library.rhn_packed_bytes(problem) + 64,), torch.uint8)
    offset = _aligned(packed) - packed.data_ptr()
    packed = packed[offset:].clone() if offset else packed
    library.rhn_pack(problem, tuple(_addresses(weights, directions)), packed.data_ptr())
    return packed


def _forward(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    want_gates: bool,
    plan_text: str,
) -> tuple[Tensor, Tensor, Tensor]:
    given, dtype = x.dtype, _compute_dtype(x.dtype)
    x, h0 = _rows(x.to(dtype)), _wide(h0, dtype)
    weights = [_wide(w, dtype) for w in weights]
    x_mask, s_mask = _wide_or_none(x_mask, dtype), _wide_or_none(s_mask, dtype)
    directions, _, hidden = h0.shape
    shape = _shape(x, batch_sizes, batch_first, h0)
    problem = _problem(plan_text, weights, shape, directions, x_mask, s_mask)
    is_packed = batch_sizes is not None
    batch_sizes, lengths, reset = _prepare_sequence(batch_sizes, lengths, reset)

    y = (kept if want_gates else output)((*x.shape[:-1], directions * hidden), dtype)
    h_n = torch.empty_like(h0)
    rows = x.size(0) if is_packed else shape[0] * shape[1]
    depth, width, _ = weights[1].shape
    gates = kept((directions, depth, rows, width if want_gates else 0), dtype)
    if shape[1]:
        tensors = (
            *_strides(x, is_packed, batch_first),
            *_strides(y, is_packed, batch_first),
            x.data_ptr(),
            y.data_ptr(),
            _pointer(x_mask),
            _pointer(s_mask),
            h0.data_ptr(),
            h_n.data_ptr(),
            _pointer(packed),
            _pointer(gates),
            *_sequence_fields(batch_sizes, lengths, reset, batch_first),
            *_addresses(weights, directions),
        )
        library = _library()
        size = library.rhn_forward_workspace(problem, tensors) + 64
        workspace = kept((size,), torch.uint8)
        library.rhn_forward(problem, tensors, _aligned(workspace))
    return y.to(given), h_n.to(given), gates


def rhn_forward(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    plan: str,
) -> tuple[Tensor, Tensor]:
    return _forward(
        x,
        h0,
        weights,
        x_mask,
        s_mask,
        packed,
        batch_sizes,
        lengths,
        reset,
        batch_first,
        False,
        plan,
    )[:2]


def rhn_forward_train(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    recompute: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(
        x, h0, weights, x_mask, s_mask, None, batch_sizes, lengths, reset, batch_first,
        not recompute, plan,
    )  # fmt: skip


def rhn_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    gates: Tensor,
    weights: Sequence[Tensor],
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
    given, dtype = x.dtype, _compute_dtype(x.dtype)
    # What was saved may have come back from a hook with other strides.
    x, y, h0 = _wide(x, dtype), _wide(y, dtype), _wide(h0, dtype)
    gates = gates.contiguous()
    weights = [_wide(w, dtype) for w in weights]
    x_mask, s_mask = _wide_or_none(x_mask, dtype), _wide_or_none(s_mask, dtype)
    dy, dh_n = _wide_or_none(dy, dtype), _wide_or_none(dh_n, dtype)
    directions = h0.size(0)
    shape = _shape(x, batch_sizes, batch_first, h0)
    problem = _problem(plan, weights, shape, directions, x_mask, s_mask)
    is_packed = batch_sizes is not None
    batch_sizes, lengths, reset = _prepare_sequence(batch_sizes, lengths, reset)
    empty = x.new_empty(0)

    dx = kept_like(x) if need_dx else empty
    dh0 = torch.empty_like(h0) if need_dstate else empty
    dweights = [kept_like(w) for w in weights] if need_dw else []
    if shape[1]:
        tensors = (
            *_strides(x, is_packed, batch_first),
            *_strides(y, is_packed, batch_first),
            x.data_ptr(),
            y.data_ptr(),
            _pointer(dx),
            _pointer(dy),
            _pointer(x_mask),
            _pointer(s_mask),
            h0.data_ptr(),
            _pointer(dh_n),
            _pointer(dh0),
            _pointer(gates),
            need_dw,
            *_sequence_fields(batch_sizes, lengths, reset, batch_first),
            *_addresses(weights, directions),
            *(_addresses(dweights, directions) if need_dw else ()),
        )
        library = _library()
        size = library.rhn_backward_workspace(problem, tensors) + 64
        workspace = kept((size,), torch.uint8)
        library.rhn_backward(problem, tensors, _aligned(workspace))
    else:
        dweights = [w.zero_() for w in dweights]
    return dx.to(given), dh0.to(given), [w.to(given) for w in dweights]
