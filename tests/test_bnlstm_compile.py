"""torch.compile and torch.export of BNLSTM: one graph, statistics kept inside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.test_compile import assert_equal_to_eager, flat, values_and_gradients
from tests.tolerances import assert_same_bits
from tests.versions import exporting

pytestmark = [
    pytest.mark.compile,
    # torch's own compile stack warns about its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),  # torch 2.6
]


def assert_same_buffers(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_buffers(), b.buffers(), strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("stats, momentum", [("step", 0.1), ("sequence", None)])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_one_graph_for_every_length(mode: bool, stats: str, momentum: float | None) -> None:
    module = fastrnn.BNLSTM(
        3, 4, bidirectional=True, max_length=20, momentum=momentum, input_stats=stats
    ).train(mode)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, steps in enumerate((5, 9, 6)):
        x = torch.randn(steps, 3, 3, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = values_and_gradients(compiled, x, module)
        assert_equal_to_eager(got, values_and_gradients(other, x, other))
        assert_same_buffers(module, other)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_inductor(mode: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), fastrnn.BNLSTM(3, 4, max_length=9, eps=0.1))
    model.train(mode)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 5, 3, requires_grad=True)
    got = values_and_gradients(compiled, x, model)
    assert_equal_to_eager(got, values_and_gradients(other, x, other))
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert_equal_to_eager([a.double()], [b.double()])


def test_options() -> None:
    options = {"batch_first": True, "num_layers": 2, "learn_init_state": True, "eps": 0.1}
    module = fastrnn.BNLSTM(3, 4, max_length=4, **options)
    other = copy.deepcopy(module)
    lengths, reset = torch.tensor([5, 2, 5]), torch.rand(3, 5) < 0.3

    def call(module: nn.Module, x: Tensor) -> Any:
        return module(x, lengths=lengths, reset=reset, return_cells=True)

    x = torch.randn(3, 5, 3, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = values_and_gradients(lambda x: compiled(module, x), x, module)
    assert_equal_to_eager(got, values_and_gradients(lambda x: call(other, x), x, other))
    assert_same_buffers(module, other)


def test_inference_and_step() -> None:
    module = fastrnn.BNLSTM(3, 4, 2, max_length=4).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        assert_equal_to_eager(flat(compiled(x)), flat(module(x)))
        step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
        y, state = step(x[0])
        assert_same_bits("step", y, module.step(x[0])[0])
        assert_same_bits("second step", step(x[1], state)[0], module.step(x[1], state)[0])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_export(strict: bool) -> None:
    module = fastrnn.BNLSTM(3, 4, 2, bidirectional=True, max_length=4).eval()
    shapes = {"input": {0: torch.export.Dim("steps", min=2, max=1000)}}
    with exporting(strict):
        program = torch.export.export(
            module, (torch.randn(5, 2, 3),), dynamic_shapes=shapes, strict=strict
        )
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("fastrnn" in t for t in targets) == 2, targets
    for length in (5, 11):
        x = torch.randn(length, 2, 3)
        with torch.no_grad():
            assert_equal_to_eager(flat(program.module()(x)), flat(module(x)))
