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
    _DENSE,
    _TYPES,
    _aligned,
    _compute_dtype,
    _pointer,
    _prepare_sequence,
    _rows,
    _sequence_fields,
    _shape,
    _strides,
    _workspace,
)
from fastrnn.backends.cpu_memory import kept, kept_like, maker, output
from fastrnn.backends.cpu_plan import read_plan

_forward_bytes: dict[tuple[object, ...], int] = {}
_backward_bytes: dict[tuple[object, ...], int] = {}


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
    # Asked first, since torch's functions cost more than the answers.
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _narrow(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype is dtype else t.to(dtype) for t in tensors]


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


def _run_forward(
    problem: tuple[int, ...],
    strides: Sequence[int],
    tensors: Sequence[Tensor | None],
    sequence: Sequence[int],
    weights: Sequence[Tensor],
) -> None:
    """``strides`` of x and y; ``tensors``: x, y, x_mask, s_mask, h0, h_n, packed and the tape."""
    addresses = _addresses(weights, problem[4])
    fields = (*strides, *[_pointer(t) for t in tensors], *sequence, *addresses)
    library = _library()
    # What the size of the scratch follows from: with the problem whether there are packed weights,
    # packed rows and a tape.
    key = (problem, library.isa(), not fields[10], not fields[12], not fields[11])
    workspace = _workspace(_forward_bytes, key, library.rhn_forward_workspace, problem, fields)
    library.rhn_forward(problem, fields, _aligned(workspace))


def _run_backward(
    problem: tuple[int, ...],
    strides: Sequence[int],
    tensors: Sequence[Tensor | None],
    sequence: Sequence[int],
    weights: Sequence[Tensor],
    dweights: Sequence[Tensor],
) -> None:
    """``tensors``: x, y, dx, dy, x_mask, s_mask, h0, dh_n, dh0 and the tape; no ``dweights`` where
    they are not wanted."""
    directions = problem[4]
    fields = (
        *strides,
        *[_pointer(t) for t in tensors],
        len(dweights) > 0,
        *sequence,
        *_addresses(weights, directions),
        *(_addresses(dweights, directions) if dweights else ()),
    )
    library = _library()
    # As in _run_forward: dx, the tape, the weights' gradients and packed rows.
    key = (problem, library.isa(), not fields[6], not fields[13], fields[14], not fields[15])
    workspace = _workspace(_backward_bytes, key, library.rhn_backward_workspace, problem, fields)
    library.rhn_backward(problem, fields, _aligned(workspace))


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
    x, h0 = _rows(x if given is dtype else x.to(dtype)), _wide(h0, dtype)
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
        strides = (*_strides(x, is_packed, batch_first), *_strides(y, is_packed, batch_first))
        _run_forward(
            problem, strides, (x, y, x_mask, s_mask, h0, h_n, packed, gates),
            _sequence_fields(batch_sizes, lengths, reset, batch_first), weights,
        )  # fmt: skip
    y, h_n = _narrow(given, y, h_n)
    return y, h_n, gates


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
        strides = (*_strides(x, is_packed, batch_first), *_strides(y, is_packed, batch_first))
        _run_backward(
            problem, strides, (x, y, dx, dy, x_mask, s_mask, h0, dh_n, dh0, gates),
            _sequence_fields(batch_sizes, lengths, reset, batch_first), weights, dweights,
        )  # fmt: skip
    else:
        dweights = [w.zero_() for w in dweights]
    dx, dh0, *dweights = _narrow(given, dx, dh0, *dweights)
    return dx, dh0, dweights


def inference_layer(
    strides: tuple[int, ...],
    shape: tuple[int, int],
    directions: int,
    weights: Sequence[Tensor],
    packed: Tensor,
) -> Any:
    """The library's description of a layer without masks or gradients, for dense x and y of these
    strides and (steps, rows); float32 or float64."""
    problem = _problem("", weights, shape, directions, None, None)
    addresses = _addresses(weights, directions)
    fields = (*strides, *(0,) * 6, packed.data_ptr(), 0, *_DENSE, *addresses)
    return _library().rhn_inference_layer(problem, fields)


class RhnCall:
    """A layer that records, without masks, for inputs like ``x`` (dense, contiguous, float32 or
    float64), states like ``h`` (D, N, H) and weights of these shapes: what only the shapes decide.
    The results are those of ``rhn_forward_train`` and ``rhn_backward``."""

    def __init__(self, x: Tensor, h: Tensor, weights: Sequence[Tensor], batch_first: bool) -> None:
        lead, dtype, (directions, _, hidden) = x.shape[:-1], x.dtype, h.shape
        depth, width, _ = weights[1].shape
        self.batch_first, self._directions = batch_first, directions
        self._shape = _shape(x, None, batch_first, h)
        y = torch.empty((*lead, directions * hidden), dtype=dtype, device="meta")
        tape = (directions, depth, lead[0] * lead[1], width)
        gates = torch.empty(tape, dtype=dtype, device="meta")
        self._make_y, self._make_gates = maker(y), maker(gates)
        self._strides = (*_strides(x, False, batch_first), *_strides(y, False, batch_first))
        self._layouts = tuple((t.shape, dtype) for t in (x, h, y, gates, *weights))
        self._problems: dict[int, tuple[int, ...]] = {}

    def _problem(self, weights: Sequence[Tensor]) -> tuple[int, ...]:
        threads = torch.get_num_threads()
        problem = self._problems.get(threads)
        if problem is None:
            problem = _problem("", weights, self._shape, self._directions, None, None)
            self._problems[threads] = problem
        return problem

    def forward(
        self, x: Tensor, h0: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, h_n and the tape."""
        y, h_n, gates = self._make_y(), torch.empty_like(h0), self._make_gates()
        tensors = (x, y, None, None, h0, h_n, None, gates)
        _run_forward(self._problem(weights), self._strides, tensors, _DENSE, weights)
        return y, h_n, gates

    def takes(self, saved: Sequence[Tensor]) -> bool:
        """Whether x, h0, y, the tape and the weights are what ``forward`` had: a hook on saved
        tensors may have given them other strides, and a parameter's data may be another."""
        return bool(_library().all_alike(saved, (Tensor, torch.nn.Parameter), self._layouts))

    def backward(
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        saved: Sequence[Tensor],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """dx, dh0 and those of the weights; ``needs`` says which of the three."""
        x, h0, y, gates, *weights = saved
        need_dx, need_dstate, need_dw = needs
        dy, dh_n = _wide_or_none(dy, x.dtype), _wide_or_none(dh_n, x.dtype)
        dx = kept_like(x) if need_dx else None
        dh0 = torch.empty_like(h0) if need_dstate else None
        dweights = [kept_like(w) for w in weights] if need_dw else []
        tensors = (x, y, dx, dy, None, None, h0, dh_n, dh0, gates)
        _run_backward(self._problem(weights), self._strides, tensors, _DENSE, weights, dweights)
        return dx, dh0, dweights
