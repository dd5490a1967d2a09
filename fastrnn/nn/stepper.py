"""The native path of a call seen before: everything but the data is prepared once.

A small layer takes a few microseconds of arithmetic; this is what keeps Python's share of the call
of the same size. It goes straight to the native library, with the description of a layer that
`fastrnn.backends.cpu` makes. One object serves one shape and dtype of the arguments: without
gradients either one time step or a whole dense sequence, with them a sequence through one layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import dispatch
from fastrnn.autograd import PreparedLayer
from fastrnn.backends import cpu
from fastrnn.backends.cpu_plan import read_plan
from fastrnn.backends.cpu_prepared import KEPT_WORKSPACE, LayerCall
from fastrnn.functional.checks import check_weights
from fastrnn.kinds import KINDS
from fastrnn.nn.cache import PackedCache
from fastrnn.sequence import Batch

_Fields = tuple[int, ...]
_SMALL = 1 << 16  # values of an output; above it a call with gradients gains nothing
_PLAIN = (Tensor, torch.nn.Parameter)


def _library() -> Any:
    """The native module; absent from a tree without a build, where no call comes this far."""
    return cpu._cpu  # type: ignore[attr-defined]


class Layout(NamedTuple):
    """Where row (t, n) of a dense tensor lies: at row t * over_t + n * over_n."""

    steps: int
    batch: int
    over_t: int
    over_n: int
    batched: bool  # states have a batch dimension
    batch_first: bool = False  # a sequence's module has that set

    @classmethod
    def step(cls, x: Tensor) -> Layout:
        """x is (N, I) or (I,)."""
        batch = x.size(0) if x.dim() == 2 else 1
        return cls(1, batch, batch, 1, x.dim() == 2)

    @classmethod
    def sequence(cls, x: Tensor, batch_first: bool) -> Layout:
        """x is (T, N, I), (N, T, I) or (T, I)."""
        if x.dim() == 2:
            return cls(x.size(0), 1, 1, 1, False, batch_first)
        if batch_first:
            return cls(x.size(1), x.size(0), 1, x.size(1), True, True)
        return cls(x.size(0), x.size(1), x.size(1), 1, True)


class _Prepared:
    """The fields of the native calls, valid for these packed weights and this number of threads."""

    __slots__ = ("_kept", "layers", "packed", "scratch", "threads", "workspace")

    def __init__(
        self,
        cell: str,
        plan: str,
        weights: list[list[Tensor]],
        packed: list[Tensor],
        x: Tensor,
        layout: Layout,
        directions: int,
    ) -> None:
        steps, batch, over_t, over_n, *_ = layout
        self.packed, self.threads = packed, torch.get_num_threads()
        self.workspace = 0
        self.scratch: list[tuple[Tensor, int, int]] = []  # of this size; replaced with it
        self.layers: list[tuple[_Fields, _Fields, _Fields]] = []
        self._kept: list[Tensor] = []  # what the addresses below point into
        for own, kept in zip(weights, packed):
            dense = [w if w.is_contiguous() else w.contiguous() for w in own]
            self._kept += dense
            features, out = dense[0].size(1), directions * dense[1].size(1)
            state = x.new_empty((directions, batch, dense[1].size(1)))
            problem = cpu._problem(cell, x.dtype, read_plan(plan), dense, (steps, batch), state)
            head = (
                over_t * features, over_n * features, over_t * out, over_n * out, 0, 0,
            )  # fmt: skip
            tail = (
                kept.data_ptr(),
                0,
                0,
                0,
                0,
                0,
                0,
                *cpu._addresses(dense, directions, KINDS[cell].norms),
            )
            some = state.data_ptr()
            fields = (*head, some, some, 0, some, some, some, some, *tail)
            self.workspace = max(self.workspace, _library().forward_workspace(problem, fields))
            self.layers.append((problem, head, tail))


class _Call:
    """One step, or one sequence, through a stack of layers, for one shape and dtype.

    Args:
        cell: as the operators take it.
        sizes: hidden_size, proj_size, directions and num_layers.
        x: an argument like those to come, its shape checked.
        layout: where its rows lie.
        stacked: states begin with a dimension of num_layers * directions.
    """

    def __init__(
        self,
        cell: str,
        sizes: tuple[int, int, int, int],
        x: Tensor,
        layout: Layout,
        stacked: bool = True,
    ) -> None:
        hidden, proj, directions, layers = sizes
        self.cell, self.sizes, self.layout, self._dtype = cell, sizes, layout, x.dtype
        first = layout.batch_first and layout.batched
        self._batch = Batch(layout.steps, layout.batch, first, None, None, None)
        self._x_shape = x.shape
        rows, out = layout.batch, proj or hidden
        self._y_like = x.new_empty((*x.shape[:-1], directions * out))
        # After one step, a layer's output is its state.
        self._one_row = layout.steps == 1 and directions == 1
        lead = (layers * directions,) if stacked else ()
        if layout.batched:
            lead = (*lead, rows)
        self._h_like = x.new_zeros((*lead, out))
        self._c_like = x.new_zeros((*lead, hidden)) if KINDS[cell].has_cell else None
        item = x.element_size() * directions * rows
        self._h_bytes, self._c_bytes = out * item, hidden * item

    def _served(self, x: Any, h: Any, c: Any) -> bool:
        """Whether these are tensors as described, and nothing is at work that would change, or
        wants to see, what the general way does. Of tracers and modes the module has thought, before
        it made this call: what is made here is not for them to see."""
        return not (
            type(x) is not Tensor
            or x.is_nested  # which has no shape
            or x.shape != self._x_shape
            or x.dtype is not self._dtype
            or not (x.is_contiguous() and x.is_cpu)
            or x.is_neg()  # a lazy minus sign, which is torch's to carry out
            or torch._C._autograd._profiler_enabled()  # which shows operators
            or torch._C._is_any_autocast_enabled()
        ) and (
            h is None
            or (
                _fits(h, self._h_like)
                and (c is self._c_like if self._c_like is None else _fits(c, self._c_like))
            )
        )


class NativeCall(_Call):
    """A call without gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared: _Prepared | None = None
        self._bf16: bool | None = None
        self._plan = ""

    def __call__(
        self, x: Any, h: Any, c: Any, weights: list[Any], cache: PackedCache
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y, h_n and c_n (h_n again where there is none), or None: take the general way.

        h and c are None together for zeros.
        """
        if not self._served(x, h, c):
            return None
        if h is None:
            h, c = self._h_like, self._c_like
        bf16 = dispatch.settled()
        if bf16 is None:
            return None
        if bf16 is not self._bf16:
            if not cpu.supports(self._dtype):  # the general way says what is wrong with it
                return None
            backend, self._plan = dispatch.choose(
                self.cell, x, self._batch, self.sizes, False, False, False
            )
            if backend != "cpu":
                return None
            self._bf16 = bf16
        prepared = self._current(x, weights, cache)
        return None if prepared is None else self._run(prepared, x, h, c)

    def _current(self, x: Tensor, weights: list[Any], cache: PackedCache) -> _Prepared | None:
        prepared, layers = self._prepared, self.sizes[3]
        count = len(weights) // layers
        own = [weights] if layers == 1 else [
            weights[k * count : (k + 1) * count] for k in range(layers)
        ]  # fmt: skip
        if prepared is not None and prepared.threads == torch.get_num_threads():
            for k, kept in enumerate(prepared.packed):
                if cache.find(k, own[k], self.cell, self._plan) is not kept:
                    break
            else:
                return prepared
        if any(w is None for w in weights):
            return None
        _, proj, directions, _ = self.sizes
        bias = count // directions - KINDS[self.cell].norms >= 4
        check_weights(self.cell, x, weights, bias, layers, directions, proj)
        packed: list[Tensor] = []
        for k, group in enumerate(own):
            found = cache.packed(k, group, self.cell, self._plan)
            if found is None:
                return None
            packed.append(found)
        self._prepared = prepared = _Prepared(
            self.cell, self._plan, own, packed, x, self.layout, self.sizes[2]
        )
        return prepared

    def _new_scratch(self, prepared: _Prepared) -> tuple[Tensor, int, int]:
        """A workspace, its aligned address, and that of a row of outputs nobody reads."""
        space = -(-prepared.workspace // 64) * 64
        tensor = torch.empty(
            64 + space + self._h_bytes, dtype=torch.uint8, device=self._h_like.device
        )
        start = (tensor.data_ptr() + 63) // 64 * 64
        return tensor, start, start + space

    def _run(
        self, prepared: _Prepared, x: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n = torch.empty_like(self._y_like), torch.empty_like(self._h_like)
        x_at, h_at, h_n_at, y_at = x.data_ptr(), h.data_ptr(), h_n.data_ptr(), y.data_ptr()
        if c is None:
            c_n, c_at, c_n_at = h_n, 0, 0
        else:
            c_n = torch.empty_like(c)
            c_at, c_n_at = c.data_ptr(), c_n.data_ptr()
        # Taken off a list and put back, so that concurrent callers never share one.
        pool = prepared.scratch
        try:
            scratch = pool.pop()
        except IndexError:
            scratch = self._new_scratch(prepared)
        _, workspace, unread = scratch
        forward = _library().forward
        last = len(prepared.layers) - 1
        between: list[Tensor] = []
        for k, (problem, head, tail) in enumerate(prepared.layers):
            out = y_at
            if k < last:
                if self._one_row:
                    out = unread
                else:
                    between.append(torch.empty_like(self._y_like))
                    out = between[-1].data_ptr()
            forward(problem, (*head, x_at, out, 0, h_at, c_at, h_n_at, c_n_at, *tail), workspace)
            x_at = h_n_at if self._one_row else out
            h_at, h_n_at = h_at + self._h_bytes, h_n_at + self._h_bytes
            c_at, c_n_at = c_at + self._c_bytes, c_n_at + self._c_bytes
        if prepared.workspace <= KEPT_WORKSPACE:
            pool.append(scratch)
        return y, h_n, c_n


class TrainingCall(_Call):
    """A call with gradients through one layer without masks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layer: LayerCall | None = None
        self._shapes: list[torch.Size] = []

    @staticmethod
    def pays(layout: Layout, sizes: tuple[int, int, int, int]) -> bool:
        """Whether there is one layer, and so little to do that Python's share can be seen."""
        hidden, _, directions, layers = sizes
        return layers == 1 and layout.steps * layout.batch * directions * hidden <= _SMALL

    def __call__(self, x: Any, h: Any, c: Any, weights: list[Any]) -> tuple[Tensor, ...] | None:
        """y, h_n[, c_n], or None: take the general way. h and c are None together for zeros."""
        if not self._served(x, h, c) or dispatch.settled() is None:
            return None
        if torch.is_inference_mode_enabled():  # which saves nothing, in grad mode neither
            return None
        if h is None:
            h, c = self._h_like, self._c_like
        dtype, records = self._dtype, x.requires_grad or h.requires_grad
        for w in weights:
            if (
                type(w) not in _PLAIN
                or w.dtype is not dtype
                or not (w.is_contiguous() and w.is_cpu)
                or w.is_neg()
            ):
                return None
            records = records or w.requires_grad
        if not (records or (c is not None and c.requires_grad)):
            return None
        if self._layer is None:
            self._layer = self._prepare(x, weights)
            if self._layer is None:
                return None
        elif [w.shape for w in weights] != self._shapes:
            return None
        return PreparedLayer.apply(
            self._layer, self.cell, self.layout.batch_first, x, h, c, *weights
        )

    def _prepare(self, x: Tensor, weights: list[Tensor]) -> LayerCall | None:
        """None where another backend runs the call; raises if the weights do not fit."""
        chosen = dispatch.choose(self.cell, x, self._batch, self.sizes, True, False, False)
        if chosen != ("cpu", ""):
            return None
        _, proj, directions, layers = self.sizes
        bias = len(weights) // directions - KINDS[self.cell].norms >= 4
        check_weights(self.cell, x, weights, bias, layers, directions, proj)
        self._shapes = [w.shape for w in weights]
        h, c = self._h_like, self._c_like
        return LayerCall(self.cell, x, h, c, weights, self.layout.batch_first)


def _fits(state: Any, like: Tensor) -> bool:
    return (
        type(state) is Tensor
        and state.shape == like.shape
        and state.dtype is like.dtype
        and state.is_contiguous()
        and state.is_cpu
        and not state.is_neg()
    )
