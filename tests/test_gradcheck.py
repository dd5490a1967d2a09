"""Gradients of the modules against finite differences, and gradients of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from tests.tolerances import assert_close_by_rule, moved_values, worst_of

T, N, I, H = 3, 2, 2, 3
LENGTHS = torch.tensor([2, 3])
RESET = torch.tensor([[False, True], [True, False], [False, False]])

MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "lstm": fastrnn.LSTM,
    "lstm_proj": lambda *a, **k: fastrnn.LSTM(*a, proj_size=2, **k),
    "gru": fastrnn.GRU,
    "gru_reset_before": lambda *a, **k: fastrnn.GRU(*a, reset_after=False, **k),
    "lstm_norm": lambda *a, **k: fastrnn.LSTM(*a, layer_norm=True, **k),
    "lstm_norm_proj": lambda *a, **k: fastrnn.LSTM(*a, proj_size=2, layer_norm=True, **k),
    "gru_norm": lambda *a, **k: fastrnn.GRU(*a, layer_norm=True, **k),
    "rnn_tanh": fastrnn.RNN,
    "rnn_relu": lambda *a, **k: fastrnn.RNN(*a, nonlinearity="relu", **k),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two_layers": {"num_layers": 2},
    "nobias": {"bias": False},
    "lengths": {"bidirectional": True, "lengths": LENGTHS},
    "reset": {"bidirectional": True, "reset": RESET},
    "lengths_reset": {"lengths": LENGTHS, "reset": RESET, "recompute": True},
    "packed": {"bidirectional": True, "packed": True},
    "recompute": {"recompute": True, "num_layers": 2},
    "batch_first": {"batch_first": True, "lengths": LENGTHS},
    "return_cells": {"return_cells": True, "bidirectional": True, "lengths": LENGTHS},
}
VALID = [
    (name, options)
    for name, options in itertools.product(MODULES, OPTIONS)
    if options != "return_cells" or name.startswith("lstm")
]


@dataclass
class Checked:
    """A module as a function of all that can have a gradient: x, states and parameters."""

    module: torch.nn.Module
    inputs: tuple[Tensor, ...]
    function: Callable[..., tuple[Tensor, ...]]


def make(name: str, options: str, dtype: torch.dtype = torch.float64) -> Checked:
    settings = dict(OPTIONS[options])
    call = {k: settings.pop(k) for k in ("lengths", "reset", "return_cells") if k in settings}
    packed = settings.pop("packed", False)
    module = MODULES[name](I, H, dtype=dtype, **settings)
    x = torch.randn((N, T, I) if module.batch_first else (T, N, I), dtype=dtype)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(layers, N, module.proj_size or H, dtype=dtype)]
    if name.startswith("lstm"):
        states.append(torch.randn(layers, N, H, dtype=dtype))
    names = [n for n, _ in module.named_parameters()]
    inputs = [x, *states, *(p.detach().clone() for p in module.parameters())]
    count = len(states)

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = tuple(rest[:count]) if count == 2 else rest[0]
        given: Tensor | PackedSequence = x
        if packed:
            given = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        weights = dict(zip(names, rest[count:], strict=True))
        output, state, *cells = functional_call(module, weights, (given, hx), call)
        output = output.data if packed else output
        return (output, *(state if count == 2 else (state,)), *cells)

    return Checked(module, tuple(t.requires_grad_() for t in inputs), function)


@pytest.mark.parametrize(("name", "options"), VALID)
def test_gradcheck(name: str, options: str) -> None:
    checked = make(name, options)
    assert gradcheck(checked.function, checked.inputs)


@pytest.mark.parametrize(("name", "options"), VALID)
def test_gradgradcheck(name: str, options: str) -> None:
    """Along random directions; element by element for masks of both kinds. What is not there is
    each layer's own matter, however layers are put together."""
    checked = make(name, options)
    alone = options in ("plain", "lengths_reset", "return_cells")
    fast = options != "lengths_reset"
    assert gradgradcheck(
        checked.function, checked.inputs, check_undefined_grad=alone, fast_mode=fast
    )


@pytest.mark.parametrize("name", MODULES)
def test_gradgradcheck_of_part_of_the_inputs(name: str) -> None:
    """Only x, only the states, only the weights, and only one output."""
    for wanted in ("x", "states", "weights"):
        checked = make(name, "lengths")
        count = 2 + name.startswith("lstm")
        kept = {"x": range(1), "states": range(1, count), "weights": range(count, 99)}[wanted]
        inputs = tuple(t.detach().requires_grad_(i in kept) for i, t in enumerate(checked.inputs))
        for output in range(count):
            function = checked.function
            assert gradgradcheck(lambda *a, f=function, o=output: f(*a)[o], inputs, fast_mode=True)


def penalty_gradients(
    checked: Checked, inputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """First gradients of sum(output^2), and those of a gradient penalty on x."""
    outputs = checked.function(*inputs)
    loss = sum((o**2).sum() for o in outputs)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return first, torch.autograd.grad((first[0] ** 2).sum(), inputs)


@pytest.mark.parametrize(("name", "options"), VALID)
def test_double_backward_in_float32(name: str, options: str) -> None:
    """A gradient penalty, as in WGAN-GP, by the rule against the reference backend."""
    checked = make(name, options, torch.float32)
    got = penalty_gradients(checked, checked.inputs)
    with fastrnn.use_backend("reference"):
        draws = [checked.inputs]
        if "norm" in name:  # of which the rule has the worst of four draws
            generator = torch.Generator().manual_seed(1)
            draws += [
                tuple(moved_values(t.detach(), generator).requires_grad_() for t in checked.inputs)
                for _ in range(3)
            ]
        runs = [penalty_gradients(checked, inputs) for inputs in draws]
        checked.module.double()
        wide = tuple(t.detach().double().requires_grad_() for t in checked.inputs)
        ref64 = penalty_gradients(checked, wide)
    for order in (0, 1):
        truth = dict(enumerate(t.detach() for t in ref64[order]))
        same = worst_of([dict(enumerate(run[order])) for run in runs], truth)
        for i, value in enumerate(got[order]):
            assert_close_by_rule(f"order {order + 1}, input {i}", value, truth[i], same[i])


@pytest.mark.parametrize("name", MODULES)
def test_third_derivative(name: str) -> None:
    checked = make(name, "plain")
    x, *rest = checked.inputs

    def slope(x: Tensor) -> Tensor:
        y = checked.function(x, *rest)[0].sum()
        return torch.autograd.grad(y, x, create_graph=True)[0]

    assert gradgradcheck(slope, (x,))


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_autocast_around_a_second_derivative_changes_nothing(name: str) -> None:
    """The forward has run in float32, and so does its recomputation."""
    module, x = MODULES[name](I, H), torch.randn(T, N, I, requires_grad=True)

    def second(inside: bool) -> Tensor:
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(dx.square().sum(), x)[0]

    assert torch.equal(second(True), second(False))


@pytest.mark.parametrize("name", MODULES)
def test_backward_in_eval(name: str) -> None:
    """Gradients do not depend on the mode: torch.nn on a GPU would refuse."""
    checked = make(name, "two_layers")
    gradients = []
    for mode in (True, False):
        checked.module.train(mode)
        outputs = checked.function(*checked.inputs)
        gradients.append(torch.autograd.grad(sum(o.sum() for o in outputs), checked.inputs))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_retained_graph_gives_the_same_bits(name: str) -> None:
    checked = make(name, "bidirectional", torch.float32)
    outputs = checked.function(*checked.inputs)
    loss = sum(o.sum() for o in outputs)
    first = torch.autograd.grad(loss, checked.inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, checked.inputs), strict=True):
        assert torch.equal(a, b)
