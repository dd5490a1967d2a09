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
from fastrnn.backends.cpu_memory import LARGE
from fastrnn.backends.cpu_plan import read_plan
from fastrnn.backends.cpu_prepared import LayerCall, layout_of, library
from fastrnn.functional.checks import check_weights
from fastrnn.kinds import KINDS
from fastrnn.nn.cache import PackedCache
from fastrnn.sequence import Batch

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
        self.batch = Batch(layout.steps, layout.batch, first, None, None, None)
        self._x_shape = x.shape
        rows, out = layout.batch, proj or hidden
        lead = (layers * directions,) if stacked else ()
        if layout.batched:
            lead = (*lead, rows)
        self._h_like = x.new_zeros((*lead, out))
        self._h_shape = self._h_like.shape
        kind = KINDS.get(cell)  # an RHN and a BNLSTM have operators of their own
        has_cell = cell == "bnlstm" if kind is None else kind.has_cell
        self._c_like = x.new_zeros((*lead, hidden)) if has_cell else None

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
        # The library's description, replaced whole; it is of this setting of bfloat16.
        self._inference: Any = None
        self._bf16: bool | None = None

    def __call__(
        self, x: Any, h: Any, c: Any, weights: list[Any], module: Any, first: int = 0
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y, h_n and c_n (h_n again where there is none), or None: take the general way.

        h and c are None together for zeros; ``first`` is the number of the first step, for a module
        that counts them. Not for traced code.
        """
        bf16 = dispatch.settled()
        if bf16 is None:
            return None
        inference, infer = self._inference, library().infer
        done: tuple[Tensor, Tensor, Tensor] | None
        if inference is not None and bf16 is self._bf16:
            done = infer(inference, x, h, c, weights, first)
            if done is not None:
                return done
        cache = module._cache()
        if cache is None or not self._served(x, h, c):
            return None
        inference = self._describe(x, weights, cache)
        if inference is None:
            return None
        self._inference, self._bf16 = inference, bf16
        done = infer(inference, x, h, c, weights, first)
        return done

    def _describe(self, x: Tensor, weights: list[Any], cache: PackedCache) -> Any:
        """The library's description of the call, valid for these weights, this number of threads
        and this setting of bfloat16; None: take the general way."""
        plan = None if any(w is None for w in weights) else self._plan(x, weights)
        if plan is None:
            return None
        parts = self._parts(x, weights, plan, cache)
        if parts is None:
            return None
        states = (self._h_like, self._c_like)
        layouts = tuple(None if t is None else layout_of(t) for t in (self._y_like, *states))
        size = self._y_like.nbytes
        return library().describe_inference(
            parts.layers, parts.origins, x, *states, layouts, size if size >= LARGE else 0,
            parts.alive,
        )  # fmt: skip

    def _plan(self, x: Tensor, weights: list[Tensor]) -> str | None:
        """How the CPU library makes the call, None where another backend does; raises if the
        weights do not fit."""
        if not cpu.supports(self._dtype):  # the general way says what is wrong with it
            return None
        _, proj, directions, layers = self.sizes
        backend, plan = dispatch.choose(self.cell, x, self.batch, self.sizes, False, False, False)
        if backend != "cpu":
            return None
        bias = len(weights) // layers // directions - KINDS[self.cell].norms >= 4
        check_weights(self.cell, x, weights, bias, layers, directions, proj)
        return plan

    def _parts(
        self, x: Tensor, weights: list[Tensor], plan: str, cache: PackedCache
    ) -> InferenceParts | None:
        count = len(weights) // self.sizes[3]
        own = [weights[k * count : (k + 1) * count] for k in range(self.sizes[3])]
        entries = [cache.entry(k, group, self.cell, plan) for k, group in enumerate(own)]
        made = [entry for entry in entries if entry is not None]
        if len(made) < len(own):
            return None
        layers = [self._layer(x, group, entry.packed, plan) for group, entry in zip(own, made)]
        origins, packed = [entry.origin for entry in made], [entry.packed for entry in made]
        return InferenceParts(tuple(layers), tuple(origins), tuple(packed))

    def _layer(self, x: Tensor, weights: list[Tensor], packed: Tensor, plan: str) -> Any:
        """The library's description of a layer with these weights, which are contiguous."""
        directions, (steps, batch, *_) = self.sizes[2], self.layout
        state = x.new_empty((directions, batch, weights[1].size(1)))
        problem = cpu._problem(self.cell, x.dtype, read_plan(plan), weights, (steps, batch), state)
        addresses = cpu._addresses(weights, directions, KINDS[self.cell].norms)
        strides = self._strides(weights[0].size(1), directions * weights[1].size(1))
        fields = (*strides, *(0,) * 9, packed.data_ptr(), *(0,) * 6, *addresses)
        return library().inference_layer(problem, fields)

    def _strides(self, *widths: int) -> tuple[int, ...]:
        """Of dense sequences with rows of these widths: over steps and over the batch."""
        return tuple(w * over for w in widths for over in self.layout[2:4])


class InferenceParts(NamedTuple):
    """What the library needs for a call: a description of each layer, the origins of all weights in
    their order, and what both point into."""

    layers: tuple[Any, ...]
    origins: tuple[Any, ...]
    alive: tuple[Any, ...]


class TrainingCall(_Call):
    """A call with gradients through one layer without masks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layer: Any = None
        self._likes: Any = None

    def __call__(self, x: Any, h: Any, c: Any, weights: list[Any]) -> tuple[Tensor, ...] | None:
        """y, h_n[, c_n], or None: take the general way. h and c are None together for zeros."""
        if dispatch.settled() is None:
            return None
        if torch.is_inference_mode_enabled():  # which saves nothing, in grad mode neither
            return None
        states = [] if h is None else [h] if self._c_like is None and c is None else [h, c]
        if self._layer is None:
            if not self._served(x, h, c) or any(type(w) not in PLAIN for w in weights):
                return None
            if any(w.dtype is not self._dtype for w in weights):
                return None
            layer = self._prepare(x, weights)
            if layer is None:
                return None
            likes = [t for t in (self._h_like, self._c_like) if t is not None]
            self._likes = library().describe_likes([x, *weights, *likes], 1 + len(weights))
            self._layer = layer
        tensors = [x, *weights, *states]
        if not library().resemble(self._likes, tensors):
            return None
        if not any(t.requires_grad for t in tensors):
            return None
        if h is None:
            h, c = self._h_like, self._c_like
        return self._run(self._layer, x, h, c, weights)

    def _run(
        self, layer: Any, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        return PreparedLayer.apply(layer, self.cell, self.layout.batch_first, x, h, c, *weights)

    def _prepare(self, x: Tensor, weights: list[Tensor]) -> Any:
        """What ``_run`` takes; None where another backend runs the call; raises if the weights do
        not fit."""
        chosen = dispatch.choose(self.cell, x, self.batch, self.sizes, True, False, False)
        if chosen != ("cpu", ""):
            return None
        _, proj, directions, layers = self.sizes
        bias = len(weights) // directions - KINDS[self.cell].norms >= 4
        check_weights(self.cell, x, weights, bias, layers, directions, proj)
        h, c = self._h_like, self._c_like
        return LayerCall(self.cell, x, h, c, weights, self.layout.batch_first)
