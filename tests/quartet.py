"""Four modules that are treated alike between calls, and what their calls are held against.

``ours`` keeps whatever it prepares, ``fresh`` forgets that before each call and so goes the general
way, ``theirs`` is torch.nn's and ``exact`` torch.nn's in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastrnn
from tests.tolerances import assert_close_by_rule, assert_same_bits

I, H = 5, 8
LAYERS = ("LSTM", "GRU", "RNN")


def tensors(value: Any) -> list[Tensor]:
    """What is in nested tuples, in order; data of a PackedSequence."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    return [] if value is None else [t for v in value for t in tensors(v)]


def names(module: nn.Module) -> list[str]:
    """The weights of a layer or cell, however they are made at present."""
    return getattr(module, "_flat_weights_names", None) or [
        f"{kind}_{of}" for kind in ("weight", "bias")[: 1 + module.bias] for of in ("ih", "hh")
    ]


class Arguments(NamedTuple):
    """x and the parts of a state, float64; ``place`` gives tensors their strides."""

    x: Tensor
    state: tuple[Tensor, ...]
    place: Callable[[Tensor], Tensor]
    lengths: list[int] | None = None  # of a PackedSequence

    def given(self, dtype: torch.dtype, leaves: tuple[bool, bool]) -> tuple[Any, Any]:
        """x and hx of one call; which of them want a gradient."""
        x, *state = (self.place(t.to(torch.float32).to(dtype)) for t in (self.x, *self.state))
        x.requires_grad_(leaves[0])
        for t in state:
            t.requires_grad_(leaves[1])
        return x, tuple(state) if len(state) > 1 else state[0] if state else None


class Run(NamedTuple):
    """One call of each module: leaves and results, and what comes to the results from above."""

    leaves: list[list[Tensor]]
    results: list[list[Tensor]]
    upstream: list[Tensor]


class Quartet:
    def __init__(self, kind: str, relu: bool, kept: dict[str, Any]) -> None:
        self.kind, self.is_cell = kind, kind.endswith("Cell")
        if kind.startswith("RNN"):
            kept = {**kept, "nonlinearity": "relu" if relu else "tanh"}
        make = (getattr(fastrnn, kind), getattr(fastrnn, kind), *[getattr(nn, kind)] * 2)
        self.all = [each(I, H, **kept) for each in make]
        self.exact.double()
        self.sync()

    ours = property(lambda self: self.all[0])
    fresh = property(lambda self: self.all[1])
    theirs = property(lambda self: self.all[2])
    exact = property(lambda self: self.all[3])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.ours.parameters()).dtype

    def sync(self) -> None:
        """Gives the others our values, by a way that leaves their graphs and gradients."""
        own = [dict(m.named_parameters(remove_duplicate=False)) for m in self.all]
        for values, module in zip(own, self.all):
            values.update(module.named_buffers())
        for others in own[1:]:
            assert others.keys() == own[0].keys()
            for name, value in others.items():
                value.data.copy_(own[0][name].data)

    def forget(self) -> None:
        self.fresh._packed = None

    def run(
        self,
        arguments: Arguments,
        leaves: tuple[bool, bool] = (False, False),
        call: Callable[[nn.Module, Any, Any], Any] | None = None,
        judge: bool = True,
        seed: int | None = None,
    ) -> Run:
        """Calls all four and compares what they return."""
        found: Run = Run([], [], [])
        for module in self.all:
            dtype = torch.float64 if module is self.exact else self.dtype
            x, hx = arguments.given(dtype, leaves)
            wanted = [t for t in (x, *tensors(hx)) if t.requires_grad]
            self.forget()
            if seed is not None:
                torch.manual_seed(seed)
            if arguments.lengths is not None:
                x = nn.utils.rnn.pack_padded_sequence(
                    x, arguments.lengths, module.batch_first, enforce_sorted=False
                )
            found.leaves.append(wanted)
            found.results.append(tensors((call or plainly)(module, x, hx)))
        self.compare("result", found.results, judge)
        for a, b, c in zip(*found.results[:3]):
            assert a.is_inference() == c.is_inference()
            assert a.requires_grad == b.requires_grad == c.requires_grad
        found.upstream.extend(
            torch.randn(t.shape, dtype=torch.float32).double() for t in found.results[0]
        )
        return found

    def backward(self, run: Run, retain: bool = False, judge: bool = True) -> None:
        """Gradients of all leaves, those of parameters on top of what is there."""
        for results in run.results:
            pairs = [(t, g.to(t.dtype)) for t, g in zip(results, run.upstream) if t.requires_grad]
            torch.autograd.backward(*zip(*pairs), retain_graph=retain)
        self.compare("gradient of a leaf", [[t.grad for t in ts] for ts in run.leaves], judge)
        self.compare_gradients(judge)

    def compare_gradients(self, judge: bool = True) -> None:
        grads = [[p.grad for p in m.parameters()] for m in self.all]
        self.compare("gradient of a weight", grads, judge)

    def compare(self, name: str, found: list[list[Any]], judge: bool = True) -> None:
        """Ours and the general way to the bit, ours and torch.nn by the rule."""
        for got, general, same, truth in zip(*found, strict=True):
            if got is None or truth is None:
                assert got is general is same is truth is None
                continue
            assert got.dtype == same.dtype
            assert got.stride() == general.stride() or got.numel() < 2
            assert_same_bits(name, got, general)
            if judge:
                assert_close_by_rule(name, got, truth.detach(), same)


def plainly(module: nn.Module, x: Any, hx: Any) -> Any:
    return module(x, hx)
