"""Gradients through masks and expectations against finite differences, and those of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import fastrnn
from tests.tolerances import assert_close_by_rule, moved_values, worst_of

T, N, I, H = 3, 2, 2, 3
LENGTHS = torch.tensor([2, 3])
RESET = torch.tensor([[False, True], [True, False], [False, False]])
CELLS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[str, ...]]] = {
    "lstm": (fastrnn.LSTM, ("update", "cell", "state")),
    "lstm_proj": (lambda *a, **k: fastrnn.LSTM(*a, proj_size=2, **k), ("update", "state")),
    "gru": (fastrnn.GRU, ("update", "state")),
    "gru_before": (lambda *a, **k: fastrnn.GRU(*a, reset_after=False, **k), ("update", "state")),
    "lstm_norm": (
        lambda *a, **k: fastrnn.LSTM(*a, layer_norm=True, **k),
        ("update", "cell", "state"),
    ),
    "gru_norm": (lambda *a, **k: fastrnn.GRU(*a, layer_norm=True, **k), ("update", "state")),
    "rnn_tanh": (fastrnn.RNN, ("state",)),
    "rnn_relu": (lambda *a, **k: fastrnn.RNN(*a, nonlinearity="relu", **k), ("state",)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "drop": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.4},
    "all": {"recurrent_dropout": 0.3, "zoneout": 0.3, "weight_dropout": 0.3},
}
POINTS = [
    (cell, mode, per, options, training)
    for cell, (_, modes) in CELLS.items()
    for mode, per, options, training in itertools.product(
        modes, ("step", "sequence"), OPTIONS, (True, False)
    )
    # Zoneout alone has neither mode nor period, "state" no expectation.
    if (options != "zoneout" or (mode == modes[0] and per == "step"))
    and (options != "drop" or training or (mode != "state" and per == "step"))
    and (options != "all" or per == "step" or training)
    # What masks do, the plain cells show one by one; here all of it meets the norms.
    and (options == "all" or not cell.endswith("_norm"))
]


def make(
    cell: str, mode: str, per: str, options: str, training: bool, dtype: torch.dtype = torch.float64
) -> tuple[torch.nn.Module, Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The module as a function of x, states and parameters, its masks always those of one seed."""
    build, _ = CELLS[cell]
    module = build(
        I, H, dtype=dtype, bidirectional=per == "step", recompute=options == "all",
        recurrent_dropout_mode=mode, recurrent_dropout_per=per, **OPTIONS[options],
    ).train(training)  # fmt: skip
    lstm = cell.startswith("lstm")
    directions = 1 + module.bidirectional
    sizes = [module.proj_size or H] + [H] * lstm
    states = [torch.randn(directions, N, k, dtype=dtype) for k in sizes]
    names = [n for n, _ in module.named_parameters()]
    inputs = [torch.randn(T, N, I, dtype=dtype), *states]
    inputs += [p.detach().clone() for p in module.parameters()]
    call = {"lengths": LENGTHS, "reset": RESET} if options == "all" else {}
    call |= {"return_cells": True} if lstm else {}

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = tuple(rest[: 1 + lstm])
        weights = dict(zip(names, rest[1 + lstm :], strict=True))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed keeps the stack for a GPU to come: this is called per element.
            torch.default_generator.manual_seed(11)
            output, state, *cells = functional_call(
                module, weights, (x, hx if lstm else hx[0]), call
            )
        return (output, *(state if lstm else (state,)), *cells)

    return module, function, tuple(t.requires_grad_() for t in inputs)


@pytest.mark.parametrize(("cell", "mode", "per", "options", "training"), POINTS)
def test_gradcheck(cell: str, mode: str, per: str, options: str, training: bool) -> None:
    _, function, inputs = make(cell, mode, per, options, training)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize(("cell", "mode", "per", "options", "training"), POINTS)
def test_gradgradcheck(cell: str, mode: str, per: str, options: str, training: bool) -> None:
    """Along random directions; the second backward draws the masks of the first."""
    _, function, inputs = make(cell, mode, per, options, training)
    alone = options == "all"
    assert gradgradcheck(function, inputs, check_undefined_grad=alone, fast_mode=True)


def penalty_gradients(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    loss = sum((o**2).sum() for o in function(*inputs))
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return [*first, *torch.autograd.grad((first[0] ** 2).sum(), inputs)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cell", "mode"), [(c, m) for c, (_, ms) in CELLS.items() for m in ms])
def test_gradient_penalty_in_float32(cell: str, mode: str, training: bool) -> None:
    """By the rule against the reference backend with the same masks."""
    module, function, inputs = make(cell, mode, "step", "all", training, torch.float32)
    got = penalty_gradients(function, inputs)
    generator = torch.Generator().manual_seed(1)
    draws = [inputs]
    if cell.endswith("_norm"):
        moved = [[moved_values(t.detach(), generator) for t in inputs] for _ in range(3)]
        draws += [tuple(t.requires_grad_() for t in each) for each in moved]
    with fastrnn.use_backend("reference"):
        runs = [dict(enumerate(penalty_gradients(function, each))) for each in draws]
        module.double()
        wide = penalty_gradients(
            function, tuple(t.detach().double().requires_grad_() for t in inputs)
        )
    same = worst_of(runs, dict(enumerate(t.detach() for t in wide)))
    for i, value in enumerate(got):
        assert_close_by_rule(f"gradient {i}", value, wide[i].detach(), same[i])
