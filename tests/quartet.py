"""Four modules that are treated alike between calls, and what their calls are held against.

``ours`` keeps whatever it prepares, ``fresh`` forgets that before each call and so goes the general
way, ``theirs`` is torch.nn's and ``exact`` torch.nn's in float64. Of cells that torch.nn lacks the
latter two are ours by the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
    for own in ("_flat_weights_names", "_weight_names"):
        if hasattr(module, own):
            return list(getattr(module, own))
    return [f"{kind}_{of}" for kind in ("weight", "bias")[: 1 + module.bias] for of in ("ih", "hh")]


def draws(module: Any) -> bool:
    """Whether a call draws random numbers."""
    rates = ("dropout", "variational_input", "variational_state", "h0_noise")
    return bool(module.training and any(getattr(module, rate, 0) for rate in rates))


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
    # Whether autograd has to see the same paths from arguments to results.
    same_paths = True

    def __init__(self, kind: str, modules: list[nn.Module]) -> None:
        self.kind, self.is_cell = kind, kind.endswith("Cell")
        self.all = modules
        self.exact.double()
        self.sync()

    @classmethod
    def of_torch(cls, kind: str, relu: bool, kept: dict[str, Any]) -> Quartet:
        if kind.startswith("RNN"):
            kept = {**kept, "nonlinearity": "relu" if relu else "tanh"}
        make = (getattr(fastrnn, kind), getattr(fastrnn, kind), *[getattr(nn, kind)] * 2)
        return cls(kind, [each(I, H, **kept) for each in make])

    ours = property(lambda self: self.all[0])
    fresh = property(lambda self: self.all[1])
    theirs = property(lambda self: self.all[2])
    exact = property(lambda self: self.all[3])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.ours.parameters()).dtype

    def dtype_of(self, module: nn.Module) -> torch.dtype:
        return torch.float64 if module is self.exact else self.dtype

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

    def under(self, module: nn.Module) -> AbstractContextManager[Any]:
        """What all of this module's arithmetic happens in."""
        return nullcontext()

    @property
    def judges(self) -> bool:
        """Whether the rule speaks of modules like these."""
        return True

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
        drawn = []
        for module in self.all:
            x, hx = arguments.given(self.dtype_of(module), leaves)
            wanted = [t for t in (x, *tensors(hx)) if t.requires_grad]
            self.forget()
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # which takes a tenth of the time
            if arguments.lengths is not None:
                x = nn.utils.rnn.pack_padded_sequence(
                    x, arguments.lengths, module.batch_first, enforce_sorted=False
                )
            found.leaves.append(wanted)
            with self.under(module):
                found.results.append(tensors((call or plainly)(module, x, hx)))
            drawn.append(torch.get_rng_state())
        assert seed is None or torch.equal(*drawn[:2]), "random numbers drawn"
        self.compare("result", found.results, judge)
        self.compare_buffers(judge)
        for a, b, c in zip(*found.results[:3]):
            assert a.is_inference() == b.is_inference() == c.is_inference()
            assert a.requires_grad == b.requires_grad
            assert a.requires_grad == c.requires_grad or not (self.same_paths or c.requires_grad)
        found.upstream.extend(
            torch.randn(t.shape, dtype=torch.float32).double() for t in found.results[0]
        )
        return found

    def backward(self, run: Run, retain: bool = False, judge: bool = True) -> None:
        """Gradients of all leaves, those of parameters on top of what is there."""
        for results, module in zip(run.results, self.all):
            pairs = [(t, g.to(t.dtype)) for t, g in zip(results, run.upstream) if t.requires_grad]
            with self.under(module):  # a checkpoint calls it again
                torch.autograd.backward(*zip(*pairs), retain_graph=retain)
        self.compare("gradient of a leaf", [[t.grad for t in ts] for ts in run.leaves], judge)
        self.compare_gradients(judge)
        self.compare_buffers(judge)

    def compare_buffers(self, judge: bool = True) -> None:
        """Statistics by the same measure as results, and counts."""
        own = [dict(m.named_buffers()) for m in self.all]
        for name, count in own[0].items():
            found = [buffers[name].resolve_neg() for buffers in own]
            if count.is_floating_point():
                self.compare(name, [[t] for t in found], judge)
            else:
                assert all(torch.equal(count, other) for other in found), name

    def compare_gradients(self, judge: bool = True) -> None:
        grads = [[p.grad for p in m.parameters()] for m in self.all]
        self.compare("gradient of a weight", grads, judge)

    def compare(self, name: str, found: list[list[Any]], judge: bool = True) -> None:
        """Ours and the general way to the bit, ours and torch.nn by the rule."""
        for got, general, same, truth in zip(*found, strict=True):
            if same is None or truth is None:
                assert same is truth is None
                assert (got is None) == (general is None)
                if got is not None:
                    assert not self.same_paths
                    assert not got.any()
                    assert not general.any()
                continue
            assert got.dtype == same.dtype
            assert got.stride() == general.stride() or got.numel() < 2
            assert_same_bits(name, got, general)
            if judge and self.judges:
                assert_close_by_rule(name, got, truth.detach(), same)


class OwnCells(Quartet):
    """Of an RHN or a BNLSTM: ``theirs`` and ``exact`` run on the reference backend."""

    # A kernel has zeros where nothing leads from a parameter to a result.
    same_paths = False

    @classmethod
    def of(cls, kind: str, kept: dict[str, Any]) -> OwnCells:
        return cls(kind, [getattr(fastrnn, kind)(I, H, **kept) for _ in range(4)])

    def under(self, module: nn.Module) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if module in (self.theirs, self.exact):
            stack.enter_context(fastrnn.use_backend("reference"))
        if module is self.exact and self.dtype == torch.float32 and draws(module):
            stack.enter_context(Float32Draws())
        return stack

    @property
    def judges(self) -> bool:
        # With a small eps batches of few rows are beyond the rule: tests/bnlstm_problems.py.
        return self.kind != "BNLSTM" or bool(self.ours.eps >= 0.1)


class Float32Draws(TorchFunctionMode):
    """Random numbers of float64 tensors are those of float32 ones."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn_like:
            return function(args[0].float(), **kwargs).double()
        if function is nn.functional.dropout:
            ones = torch.ones_like(args[0], dtype=torch.float32)
            return args[0] * function(ones, *args[1:], **kwargs).double()
        return function(*args, **kwargs)


def plainly(module: nn.Module, x: Any, hx: Any) -> Any:
    return module(x, hx)
