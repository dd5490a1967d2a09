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
from fastrnn.backends.cpu_memory import LARGE, huge
from fastrnn.backends.cpu_plan import read_plan
from fastrnn.backends.cpu_prepared import LayerCall, library
from fastrnn.functional.checks import check_weights
from fastrnn.kinds import KINDS
from fastrnn.nn.cache import PackedCache
from fastrnn.sequence import Batch

_Fields = tuple[int, ...]
TENSOR, PLAIN = (Tensor,), (Tensor, torch.nn.Parameter)


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
    """The library's descriptions of the layers, valid for these packed weights and this number of
    threads."""

    __slots__ = ("_kept", "layers", "packed", "threads")

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
        self.layers: list[Any] = []
        self._kept: list[Tensor] = []  # what the addresses in them point into
        for own, kept in zip(weights, packed):
            dense = [w if w.is_contiguous() else w.contiguous() for w in own]
            self._kept += dense
            features, out = dense[0].size(1), directions * dense[1].size(1)
            state = x.new_empty((directions, batch, dense[1].size(1)))
            problem = cpu._problem(cell, x.dtype, read_plan(plan), dense, (steps, batch), state)
            fields = (
                over_t * features, over_n * features, over_t * out, over_n * out, *(0,) * 9,
                kept.data_ptr(), *(0,) * 6,
                *cpu._addresses(dense, directions, KINDS[cell].norms),
            )  # fmt: skip
            self.layers.append(library().describe_forward(problem, fields))


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
        lead = (layers * directions,) if stacked else ()
        if layout.batched:
            lead = (*lead, rows)
        self._h_like = x.new_zeros((*lead, out))
        self._h_shape = self._h_like.shape
        kind = KINDS.get(cell)  # an RHN has operators of its own, and no c
        self._c_like = None if kind is None or not kind.has_cell else x.new_zeros((*lead, hidden))
        item = x.element_size() * directions * rows
        self._h_bytes, self._c_bytes = out * item, hidden * item

    def _served(self, x: Any, h: Any, c: Any) -> bool:
        """Whether these are tensors as described, and nothing is at work that would change, or
        wants to see, what the general way does. Of tracers and modes the module has thought, before
        it made this call: what is made here is not for them to see."""
        alike, dtype = library().alike, self._dtype
        return (
            alike(x, TENSOR, self._x_shape, dtype)
            and not torch._C._autograd._profiler_enabled()  # which shows operators
            and not torch._C._is_any_autocast_enabled()
            and (
                h is None
                or (
                    alike(h, TENSOR, self._h_shape, dtype)
                    and (
                        c is None
                        if self._c_like is None
                        else alike(c, TENSOR, self._c_like.shape, dtype)
                    )
                )
            )
        )


class NativeCall(_Call):
    """A call without gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (hidden, proj, directions, _), x = args[1:3]
        self._y_like = x.new_empty((*x.shape[:-1], directions * (proj or hidden)))
        self._large = self._y_like.nbytes >= LARGE
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

    def _run(
        self, prepared: _Prepared, x: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        run, (first, *others) = library().run_forward, prepared.layers
        y, h_n = torch.empty_like(self._y_like), torch.empty_like(self._h_like)
        if self._large:
            y = huge(y)
        c_n = None if c is None else torch.empty_like(c)
        run(first, x, y, None, h, c, h_n, c_n, None, None)
        if others:
            states = [t for t in (h, c, h_n, c_n) if t is not None]
            sizes = [self._h_bytes, self._c_bytes] * 2 if c is not None else [self._h_bytes] * 2
            at = [t.data_ptr() for t in states]
            for layer in others:
                x, y = y, torch.empty_like(self._y_like)
                at = [address + size for address, size in zip(at, sizes)]
                h_at, c_at, h_n_at, c_n_at = at if c is not None else (at[0], None, at[1], None)
                run(layer, x, y, None, h_at, c_at, h_n_at, c_n_at, None, None)
        return y, h_n, h_n if c_n is None else c_n


class TrainingCall(_Call):
    """A call with gradients through one layer without masks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layer: Any = None
        self._shapes: list[torch.Size] = []

    def __call__(self, x: Any, h: Any, c: Any, weights: list[Any]) -> tuple[Tensor, ...] | None:
        """y, h_n[, c_n], or None: take the general way. h and c are None together for zeros."""
        if not self._served(x, h, c) or dispatch.settled() is None:
            return None
        if torch.is_inference_mode_enabled():  # which saves nothing, in grad mode neither
            return None
        if h is None:
            h, c = self._h_like, self._c_like
        records = x.requires_grad or h.requires_grad
        for w in weights:
            if type(w) not in PLAIN or not library().alike(w, PLAIN, w.shape, self._dtype):
                return None
            records = records or w.requires_grad
        if not (records or (c is not None and c.requires_grad)):
            return None
        if self._layer is None:
            self._layer = self._prepare(x, weights)
            if self._layer is None:
                return None
            self._shapes = [w.shape for w in weights]
        elif [w.shape for w in weights] != self._shapes:
            return None
        return self._run(self._layer, x, h, c, weights)

    def _run(
        self, layer: Any, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        return PreparedLayer.apply(layer, self.cell, self.layout.batch_first, x, h, c, *weights)

    def _prepare(self, x: Tensor, weights: list[Tensor]) -> Any:
        """What ``_run`` takes; None where another backend runs the call; raises if the weights do
        not fit."""
        chosen = dispatch.choose(self.cell, x, self._batch, self.sizes, True, False, False)
        if chosen != ("cpu", ""):
            return None
        _, proj, directions, layers = self.sizes
        bias = len(weights) // directions - KINDS[self.cell].norms >= 4
        check_weights(self.cell, x, weights, bias, layers, directions, proj)
        h, c = self._h_like, self._c_like
        return LayerCall(self.cell, x, h, c, weights, self.layout.batch_first)
