"""The native path of one time step: everything but the data is prepared once.

One step of a small layer takes a few microseconds of arithmetic; this is what keeps Python's share
of the call of the same size. It goes straight to the native library, with the description of a
layer that `fastrnn.backends.cpu` makes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import dispatch
from fastrnn.backends import cpu
from fastrnn.nn.cache import PackedCache, bypassed
from fastrnn.sequence import Batch

_Fields = tuple[int, ...]


def _library() -> Any:
    """The native module; absent from a tree without a build, where no call comes this far."""
    return cpu._cpu  # type: ignore[attr-defined]


class _Prepared:
    """The fields of the native call, valid for these packed weights and this number of threads."""

    __slots__ = ("_kept", "layers", "packed", "threads", "workspace")

    def __init__(
        self, cell: str, plan: str, weights: list[list[Tensor]], packed: list[Tensor], x: Tensor
    ) -> None:
        batch = x.size(0) if x.dim() == 2 else 1
        self.packed, self.threads = packed, torch.get_num_threads()
        self.workspace = 0
        self.layers: list[tuple[_Fields, _Fields, _Fields]] = []
        self._kept: list[Tensor] = []  # what the addresses below point into
        for own, kept in zip(weights, packed):
            dense = [w if w.is_contiguous() else w.contiguous() for w in own]
            self._kept += dense
            features, out = dense[0].size(1), dense[1].size(1)
            state = x.new_empty((1, batch, out))
            problem = cpu._problem(cell, x.dtype, cpu._plan(plan), dense, (1, batch), state)
            head = (batch * features, features, batch * out, out, 0, 0)
            tail = (kept.data_ptr(), 0, 0, 0, 0, 0, 0, *cpu._addresses(dense, 1))
            some = state.data_ptr()
            fields = (*head, some, some, 0, some, some, some, some, *tail)
            self.workspace = max(self.workspace, _library().forward_workspace(problem, fields))
            self.layers.append((problem, head, tail))


class Stepper:
    """One time step of a stack of layers, for one shape and dtype of its arguments.

    Args:
        cell: as the operators take it.
        sizes: hidden_size, proj_size, directions (1) and num_layers.
        x, h, c: arguments like those to come, their shapes checked; c is None but for an LSTM.
    """

    def __init__(
        self, cell: str, sizes: tuple[int, int, int, int], x: Tensor, h: Tensor, c: Tensor | None
    ) -> None:
        self._cell, self._sizes, self._dtype = cell, sizes, x.dtype
        self._batch = Batch(1, x.size(0) if x.dim() == 2 else 1, False, None, None, None)
        self._x_shape, self._h_shape = x.shape, h.shape
        self._c_shape = None if c is None else c.shape
        self._y_like = x.new_empty((*x.shape[:-1], sizes[1] or sizes[0]))
        layers = sizes[3]
        self._h_bytes = h.numel() // layers * h.element_size()
        self._c_bytes = 0 if c is None else c.numel() // layers * c.element_size()
        self._prepared: _Prepared | None = None
        self._scratch: list[tuple[Tensor, int, int]] = []

    def __call__(
        self, x: Any, h: Any, c: Any, weights: list[Any], cache: PackedCache
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y, h_n and c_n (h_n again where there is none), or None: take the general way."""
        if (
            type(x) is not Tensor
            or type(h) is not Tensor
            or x.shape != self._x_shape
            or h.shape != self._h_shape
            or x.dtype is not self._dtype
            or h.dtype is not self._dtype
            or not (x.is_contiguous() and h.is_contiguous() and h.is_cpu)
            or bypassed()
            or dispatch.autocast_dtype(x) is not None
        ):
            return None
        if c is not None and (
            type(c) is not Tensor
            or c.shape != self._c_shape
            or c.dtype is not self._dtype
            or not (c.is_contiguous() and c.is_cpu)
        ):
            return None
        backend, plan = dispatch.choose(
            self._cell, x, self._batch, self._sizes, False, False, False
        )
        if backend != "cpu":
            return None
        prepared = self._current(x, weights, cache, plan)
        return None if prepared is None else self._run(prepared, x, h, c)

    def _current(
        self, x: Tensor, weights: list[Any], cache: PackedCache, plan: str
    ) -> _Prepared | None:
        prepared, layers = self._prepared, self._sizes[3]
        count = len(weights) // layers
        own = [weights] if layers == 1 else [
            weights[k * count : (k + 1) * count] for k in range(layers)
        ]  # fmt: skip
        if prepared is not None and prepared.threads == torch.get_num_threads():
            for k, kept in enumerate(prepared.packed):
                if cache.find(k, own[k], self._cell, plan) is not kept:
                    break
            else:
                return prepared
        packed: list[Tensor] = []
        for k, group in enumerate(own):
            if any(w is None or w.dtype != x.dtype for w in group):
                return None
            found = cache.packed(k, group, self._cell, plan)
            if found is None:
                return None
            packed.append(found)
        self._prepared = prepared = _Prepared(self._cell, plan, own, packed, x)
        self._scratch = []
        return prepared

    def _new_scratch(self, prepared: _Prepared) -> tuple[Tensor, int, int]:
        """A workspace, its aligned address, and that of a row of outputs nobody reads."""
        space = -(-prepared.workspace // 64) * 64
        tensor = torch.empty(64 + space + self._h_bytes, dtype=torch.uint8)
        start = (tensor.data_ptr() + 63) // 64 * 64
        return tensor, start, start + space

    def _run(
        self, prepared: _Prepared, x: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n = torch.empty_like(self._y_like), torch.empty_like(h)
        x_at, h_at, h_n_at, y_at = x.data_ptr(), h.data_ptr(), h_n.data_ptr(), y.data_ptr()
        if c is None:
            c_n, c_at, c_n_at = h_n, 0, 0
        else:
            c_n = torch.empty_like(c)
            c_at, c_n_at = c.data_ptr(), c_n.data_ptr()
        # Taken off a list and put back, so that concurrent callers never share one.
        pool = self._scratch
        try:
            scratch = pool.pop()
        except IndexError:
            scratch = self._new_scratch(prepared)
        _, workspace, unread = scratch
        forward = _library().forward
        last = len(prepared.layers) - 1
        for k, (problem, head, tail) in enumerate(prepared.layers):
            at = (x_at, y_at if k == last else unread, 0, h_at, c_at, h_n_at, c_n_at)
            forward(problem, (*head, *at, *tail), workspace)
            x_at = h_n_at  # after one step, a layer's output is its state
            h_at, h_n_at = h_at + self._h_bytes, h_n_at + self._h_bytes
            c_at, c_n_at = c_at + self._c_bytes, c_n_at + self._c_bytes
        pool.append(scratch)
        return y, h_n, c_n
