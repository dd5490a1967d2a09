"""Regularisers under torch.compile: one graph for every length, fresh masks at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from tests.test_compile import assert_equal_to_eager, flat
from tests.test_regularisers import KINDS, build

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),  # torch 2.6
]


def run(call: Any, module: torch.nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    outputs = flat(call(x))
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_one_graph_for_every_length(kind: str) -> None:
    """aot_eager draws the seed as eager mode does, so the masks are the same."""
    module = build(kind, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, steps in enumerate((4, 9, 6)):
        x = torch.randn(steps, 3, 5, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = run(compiled, module, x, seed=i)
            again = run(compiled, module, x, seed=i + 1)
        assert_equal_to_eager(got, run(module, module, x, seed=i))
        assert not torch.equal(got[0], again[0])
        torch.manual_seed(0)
        assert not torch.equal(compiled(x)[0], compiled(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind: str) -> None:
    module = build(kind).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (4, 7):
        x = torch.randn(steps, 3, 5)
        assert_equal_to_eager(run(compiled, module, x, 0), run(module, module, x, 0))


def test_inductor() -> None:
    """It has a generator of its own: fresh masks, the backward meets those of the forward."""
    module = fastrnn.RNN(
        3, 20, nonlinearity="relu", recurrent_dropout=0.5, weight_dropout=0.3, zoneout=0.2
    )
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    x = torch.randn(5, 4, 3, requires_grad=True)
    first, second = compiled(x)[0], compiled(x)[0]
    assert not torch.equal(first, second)
    # The layer is positively homogeneous in all that enters it linearly at T = 1 without bias.
    module = fastrnn.RNN(3, 20, nonlinearity="relu", bias=False, zoneout=0.5)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(1, 4, 3, requires_grad=True)
    y = compiled(x)[0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((dx * x).sum(), y.sum())


def test_export_of_evaluation() -> None:
    module = fastrnn.LSTM(3, 4, zoneout=0.3, recurrent_dropout=0.2).eval()
    x = torch.randn(5, 2, 3)
    program = torch.export.export(module, (x,))
    assert_equal_to_eager(flat(program.module()(x)), flat(module(x)))
