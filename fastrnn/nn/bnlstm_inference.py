"""Calls without gradients of a batch-normalised LSTM that normalises by its running statistics and
whose shape was seen before, as in `fastrnn.nn.stepper`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import dispatch
from fastrnn.backends import cpu
from fastrnn.backends.cpu_bnlstm import inference_layer
from fastrnn.functional.bnlstm import STATISTICS, check_layers, describe_problem
from fastrnn.nn.base import computes_weights
from fastrnn.nn.bnlstm_call import layouts_of, settings_of
from fastrnn.nn.cache import PackedCache
from fastrnn.nn.stepper import InferenceParts, Layout, NativeCall


def _tensors(module: Any) -> list[Any]:
    """What a call reads: all matrices, then all vectors, then the statistics without the counts."""
    weights, statistics = module._weights(), module._statistics()
    per = 6 + module.bias
    return [
        *[w for i, w in enumerate(weights) if i % per < 2],
        *[w for i, w in enumerate(weights) if i % per >= 2],
        *[t for i, t in enumerate(statistics) if i % STATISTICS < STATISTICS - 1],
    ]


class InferenceCall(NativeCall):
    """A call of a module with these ``settings``; its weights are ``_tensors``, of the shapes of
    these, which were checked."""

    def __init__(self, settings: tuple[Any, ...], tensors: list[Any], *args: Any) -> None:
        super().__init__(*args)
        self.settings, self._tensors = settings, layouts_of(tensors)

    def _plan(self, x: Tensor, weights: list[Tensor]) -> str | None:
        """As of ``NativeCall``, but that the general way says which weights do not fit."""
        if layouts_of(weights) != self._tensors:
            return None
        hidden, _, directions, layers = self.sizes
        problem = describe_problem(
            x, x.dtype, self.batch, hidden, directions, layers, False, False, False
        )
        return "" if dispatch.settle(problem) == "cpu" else None

    def _parts(
        self, x: Tensor, weights: list[Tensor], plan: str, cache: PackedCache
    ) -> InferenceParts | None:
        layers, directions = self.sizes[3], self.sizes[2]
        bias = self.settings[4]
        own = [layers * directions * count for count in (2, 4 + bias, STATISTICS - 1)]
        matrices, rest = weights[: own[0]], weights[own[0] :]
        for t in rest:  # the library reads them where they lie, in each call as they are
            if t.dtype is not x.dtype or not t.is_contiguous() or t.is_neg() or not t.is_cpu:
                return None
        per = 2 * directions
        entries = [
            cache.entry(k, matrices[k * per : (k + 1) * per], "lstm", "") for k in range(layers)
        ]
        made = [entry for entry in entries if entry is not None]
        if len(made) < layers:
            return None
        vectors, statistics = rest[: own[1]], rest[own[1] :]
        described = []
        for k, entry in enumerate(made):
            ordered: list[Tensor] = []
            running: list[Tensor] = []
            for d in range(k * directions, (k + 1) * directions):
                ordered += matrices[2 * d : 2 * d + 2]
                ordered += vectors[(4 + bias) * d : (4 + bias) * (d + 1)]
                running += statistics[6 * d : 6 * (d + 1)]
            described.append(self._bn_layer(ordered, running, entry.packed))
        refs = tuple(weakref.ref(t) for t in rest)
        origins = [entry.origin for entry in made]
        origins.append(cpu.describe_origin(refs, (-1,) * len(rest), b""))
        packed = tuple(entry.packed for entry in made)
        return InferenceParts(tuple(described), tuple(origins), packed)

    def _bn_layer(self, weights: list[Tensor], running: list[Tensor], packed: Tensor) -> Any:
        (hidden, _, directions, _), (eps, input_stats, *_) = self.sizes, self.settings
        features = weights[0].size(1)
        return inference_layer(
            weights[0].new_empty((0, features)), self._strides(features, directions * hidden),
            self.layout[:2], hidden, directions, weights, running, packed,
            input_stats == "sequence", eps,
        )  # fmt: skip


def _ready(module: Any, hx: Any) -> bool:
    """Whether a call takes running statistics, and states as they come."""
    return not (
        module.training
        or module._recalibrates
        or computes_weights(module)
        or (hx is None and module.learn_init_state)
        or not (hx is None or (type(hx) is tuple and len(hx) == 2 and hx[0] is not None))
    )


def _run(
    module: Any, x: Any, hx: Any, step: bool, first: int = 0
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    h, c = (None, None) if hx is None else hx
    tensors, cache, settings = _tensors(module), module._packed, settings_of(module)
    known = None if cache is None else cache.stepper if step else cache.sequence
    if known is not None and known.settings == settings:
        done = known(x, h, c, tensors, module, first)
        if done is not None:
            return done[0], done[1:]
    cache = module._cache()
    if cache is None or type(x) is not Tensor or x.layout is not torch.strided or x.is_nested:
        return None
    if not x.is_cpu or not x.numel() or x.dtype not in (torch.float32, torch.float64):
        return None
    if x.dim() not in ((1, 2) if step else (2, 3)):
        return None
    if not step and cache.seen != x.shape:  # preparing pays from the second call of a shape on
        cache.seen = x.shape
        return None
    directions = 2 if module.bidirectional else 1
    check_layers(
        x, module._weights(), module._statistics(), module.bias, module.num_layers, directions,
        module.input_stats == "sequence", False,
    )  # fmt: skip
    sizes = (module.hidden_size, 0, directions, module.num_layers)
    layout = Layout.step(x) if step else Layout.sequence(x, module.batch_first)
    call = InferenceCall(settings, tensors, "bnlstm", sizes, x, layout)
    done = call(x, h, c, tensors, module, first)
    if done is None:
        return None
    if step:
        cache.stepper = call
    else:
        cache.sequence = call
    return done[0], done[1:]


def natively(module: Any, input: Any, hx: Any) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """A BNLSTM's call without gradients straight to the CPU library; None: take the general way."""
    return _run(module, input, hx, False) if _ready(module, hx) else None


def step_natively(
    module: Any, x: Any, state: Any, taken: int
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """As ``natively`` for one step after ``taken`` others: y and the states, or None."""
    if is_compiling() or module.bidirectional or not _ready(module, state):
        return None
    return _run(module, x, state, True, taken)
