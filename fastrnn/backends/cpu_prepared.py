"""One layer of one shape: the CPU kernels' fields that only the shape decides.

The results are those of ``layer_forward``, ``layer_forward_train`` and ``layer_backward`` in
``fastrnn.backends.cpu``, which describe the fields and allocate the same tensors, for dense
sequences without masks. The functions of these names here take small such calls and pass on every
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.backends import cpu
from fastrnn.backends.cpu_memory import kept_like, maker
from fastrnn.backends.cpu_plan import read_plan
from fastrnn.kinds import KINDS

__all__ = [
    "CALLS",
    "EXCHANGE",
    "SMALL",
    "LayerCall",
    "layer_backward",
    "layer_forward",
    "layer_forward_train",
    "layout_of",
    "library",
    "prepared",
    "setup_torch",
]

# The operators keep so many calls, each with outputs of at most so many elements: beyond that
# Python's share of a training step is not seen. A call holds tensors like its outputs.
CALLS = 32
SMALL = 1 << 14
_Grad = Tensor | None


def library() -> Any:
    """The native module; absent from a tree without a build, where no call comes this far."""
    return cpu._cpu  # type: ignore[attr-defined]


# How a tensor says in one call what it is; None before torch 2.10.
EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # in the library's order


def setup_torch(exchange: Any = EXCHANGE) -> None:
    """What the library calls of torch: it links none of it."""
    c: Any = torch._C
    empty = c._dynamo.guards._empty_strided_cpu  # inductor's: half the time of torch.empty_like
    # Any of these true, and somebody would see the operators of a call.
    eyes = (
        c._len_torch_dispatch_stack, c._are_functorch_transforms_active, c._get_tracing_state,
        c._autograd._profiler_enabled,
    )  # fmt: skip
    library().torch_setup(
        exchange, _DTYPES, empty, torch.get_num_threads, (Tensor, torch.nn.Parameter), eyes,
        c._is_any_autocast_enabled,
    )  # fmt: skip


class _Setting(NamedTuple):
    """What the number of threads and the instruction set decide: the library's descriptions of the
    two calls. Replaced whole."""

    threads: int
    isa: str
    forward: Any
    backward: Any


class _Forward(NamedTuple):
    """y, h_n, c_n, cells, gates; None for what the cell does not have."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    cells: Tensor | None
    gates: Tensor | None


class LayerCall:
    """A layer for inputs like ``x`` (dense, contiguous) and states like ``h`` (D, N, Hout) and
    ``c`` (D, N, H), None but for an LSTM, with weights of these shapes."""

    def __init__(
        self,
        cell: str,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        weights: Sequence[Tensor],
        batch_first: bool,
    ) -> None:
        kind = KINDS[cell]
        directions, size, out = h.shape
        hidden = weights[1].size(0) // kind.gates
        steps = x.size(1) if batch_first else x.size(0)
        wide = cpu._compute_dtype(x.dtype)
        self._cell, self._directions, self._norms = cell, directions, kind.norms
        # Of h only the sizes are read: the caller's own would stay alive, with all that led to it.
        self._dtype, self._shape, self._state = x.dtype, (steps, size), h.new_empty(h.shape)
        lead = x.shape[:-1]  # of what the call makes, the layouts alone
        self._y = torch.empty((*lead, directions * out), dtype=x.dtype, device="meta")
        self._cells = self._gates = None
        strides = [*cpu._strides(x, False, batch_first), *cpu._strides(self._y, False, batch_first)]
        if c is not None:
            self._cells = torch.empty((*lead, directions * hidden), dtype=wide, device="meta")
            strides += cpu._strides(self._cells, False, batch_first)
        else:
            strides += (0, 0)
        self._strides = tuple(strides)
        if kind.tape:
            shape = (directions, steps * size, kind.tape * hidden)
            self._gates = torch.empty(shape, dtype=wide, device="meta")
        self._make_y = maker(self._y)
        self._make_cells = None if self._cells is None else maker(self._cells)
        self._make_gates = None if self._gates is None else maker(self._gates)
        self._setting = _Setting(0, "", None, None)

    def takes(self, dy: _Grad, dh_n: _Grad, dc_n: _Grad, dcells: _Grad, gates: _Grad) -> bool:
        """Whether ``backward`` serves them: the tape was kept, and the dtypes are the forward's."""
        dtype = self._dtype
        for gradient in (dy, dh_n, dc_n):
            if gradient is not None and gradient.dtype is not dtype:
                return False
        if self._gates is not None and (gates is None or gates.shape != self._gates.shape):
            return False
        return dcells is None or self._cells is None or dcells.dtype is self._cells.dtype

    def _current(self, weights: Sequence[Tensor]) -> _Setting:
        setting = self._setting
        threads, isa = torch.get_num_threads(), library().isa()
        if threads != setting.threads or isa != setting.isa:
            problem = cpu._problem(
                self._cell, self._dtype, read_plan(""), weights, self._shape, self._state
            )
            addresses = (0,) * (self._directions * (9 if self._norms else 5))
            self._setting = setting = _Setting(
                threads,
                isa,
                library().describe_forward(problem, (*self._strides, *(0,) * 14, *addresses)),
                library().describe_backward(problem, (*self._strides, *(0,) * 19, *addresses)),
            )
        return setting

    def plain(self, x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> tuple[Any, ...]:
        """What the library has to know to make this call alone: the descriptions, the layouts of
        x, y and a state, those of cells and gates and of the weights, the bytes of a state."""
        setting = self._current(weights)
        outputs = (layout_of(x), layout_of(self._y), layout_of(h))
        tape = tuple(layout_of(t) for t in (self._cells, self._gates) if t is not None)
        parameters = tuple(layout_of(w) for w in weights)
        state = h.numel() * h.element_size()
        return setting.forward, setting.backward, outputs, tape, parameters, state

    def forward(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        records: bool = True,
    ) -> _Forward:
        """Without cells and gates unless it ``records``, for a backward."""
        setting = self._current(weights)
        y, h_n = self._make_y(), torch.empty_like(h0)
        c_n = None if c0 is None else torch.empty_like(c0)
        cells = gates = None
        if records and self._make_cells is not None:
            cells = self._make_cells()
        if records and self._make_gates is not None:
            gates = self._make_gates()
        library().run_forward(setting.forward, x, y, cells, h0, c0, h_n, c_n, gates, weights)
        return _Forward(y, h_n, c_n, cells, gates)

    def backward(
        self,
        dy: _Grad,
        dh_n: _Grad,
        dc_n: _Grad,
        dcells: _Grad,
        x: Tensor,
        y: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        cells: Tensor | None,
        gates: Tensor | None,
        weights: Sequence[Tensor],
        needs: tuple[bool, bool, bool],
    ) -> tuple[_Grad, _Grad, _Grad, list[Tensor]]:
        """dx, dh0, dc0 and those of the weights; ``needs``: dx, the states', the weights'."""
        setting = self._current(weights)
        need_dx, need_dstate, need_dw = needs
        # A hook on saved tensors may have given them other strides.
        weights = cpu._contiguous(weights)
        x, y, h0 = cpu._contiguous((x, y, h0))
        optional = (c0, cells, gates, dy, dh_n, dc_n, dcells)
        c0, cells, gates, dy, dh_n, dc_n, dcells = [
            t if t is None or t.is_contiguous() else t.contiguous() for t in optional
        ]
        dx = kept_like(x) if need_dx else None
        dh0 = torch.empty_like(h0) if need_dstate else None
        dc0 = torch.empty_like(c0) if need_dstate and c0 is not None else None
        dweights = [kept_like(w) for w in weights] if need_dw else []
        library().run_backward(
            setting.backward, x, y, cells, dx, dy, dcells, h0, c0, dh_n, dc_n, dh0, dc0, gates,
            weights, dweights if need_dw else None,
        )  # fmt: skip
        return dx, dh0, dc0, dweights


def layout_of(t: Tensor) -> tuple[Any, ...]:
    """Shape, strides and dtype of a dense tensor of this shape."""
    strides = [1]
    for size in reversed(t.shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(t.shape), tuple(reversed(strides)), t.dtype


_calls: dict[Any, LayerCall] = {}


def prepared(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
) -> LayerCall | None:
    """The call for inputs of these shapes; None where one would not pay or does not exist."""
    w_hh = weights[1]
    key = (cell, batch_first, x.dtype, x.shape, h.shape, w_hh.shape, len(weights))
    call = _calls.get(key)
    if call is None:
        hidden = w_hh.size(0) // KINDS[cell].gates
        outputs = x.size(0) * x.size(1) * h.size(0) * hidden
        if not (0 < outputs <= SMALL and x.size(2)) or cpu._widens(cell, x.dtype):
            return None
        if len(_calls) >= CALLS:
            _calls.clear()
        # A backward reads x through a dense copy, whatever the strides that its forward met.
        call = _calls[key] = LayerCall(cell, x.contiguous(), h, c, weights, batch_first)
    return call


def _dense_call(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
) -> LayerCall | None:
    """As ``prepared``; None where something is not contiguous."""
    if not (x.is_contiguous() and h0.is_contiguous() and (c0 is None or c0.is_contiguous())):
        return None
    for w in weights:
        if not w.is_contiguous():
            return None
    return prepared(cell, x, h0, c0, weights, batch_first)


def layer_forward(*args: Any) -> Any:
    """As ``cpu.layer_forward``."""
    # The options: return_cells, plan, seed, noise.
    x, h0, c0, weights, packed, batch_sizes, lengths, reset, cell, batch_first, *options = args
    if packed is batch_sizes is lengths is reset is None and not any(options):
        call = _dense_call(cell, x, h0, c0, weights, batch_first)
        if call is not None:
            return call.forward(x, h0, c0, weights, False)[:4]
    return cpu.layer_forward(*args)


def layer_forward_train(*args: Any) -> Any:
    """As ``cpu.layer_forward_train``."""
    x, h0, c0, weights, batch_sizes, lengths, reset, cell, batch_first, *options = args
    # recompute, plan, seed, noise
    if batch_sizes is lengths is reset is None and not any(options):
        call = _dense_call(cell, x, h0, c0, weights, batch_first)
        if call is not None:
            return call.forward(x, h0, c0, weights)
    return cpu.layer_forward_train(*args)


def layer_backward(*args: Any) -> Any:
    """As ``cpu.layer_backward``."""
    dy, dh_n, dc_n, dcells, x, y, h0, c0, cells, gates, weights, *sequence = args[:14]
    cell, batch_first, *needs = args[14:19]
    plan_and_masks = args[19:]
    if not any(plan_and_masks) and all(each is None for each in sequence):
        call = prepared(cell, x, h0, c0, weights, batch_first)
        if call is not None and call.takes(dy, dh_n, dc_n, dcells, gates):
            return call.backward(
                dy, dh_n, dc_n, dcells, x, y, h0, c0, cells, gates, weights, tuple(needs)
            )
    return cpu.layer_backward(*args)


if cpu.LOADED:
    setup_torch()
