"""torch.compile: one graph, any length, no recompilation. test_export.py has every option."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from tests.tolerances import assert_close_by_rule

pytestmark = [
    pytest.mark.compile,
    # torch's own compile stack warns about its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),  # torch 2.6
]

NAMES = ["LSTM", "GRU", "RNN"]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def values_and_gradients(call: Callable[..., Any], x: Tensor, module: nn.Module) -> list[Tensor]:
    outputs = flat(call(x))
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_equal_to_eager(got: list[Tensor], eager: list[Tensor]) -> None:
    assert len(got) == len(eager)
    for i, (a, b) in enumerate(zip(got, eager, strict=True)):
        assert_close_by_rule(f"value {i}", a, b.detach().double(), b)


@pytest.mark.parametrize("dynamic", ["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_training_in_one_graph_for_every_length(name: str, dynamic: str) -> None:
    module = getattr(fastrnn, name)(3, 4, 2, bidirectional=True)
    compiled = torch.compile(
        module, fullgraph=True, backend="aot_eager", dynamic=True if "=" in dynamic else None
    )
    for i, steps in enumerate((5, 9, 6)):
        x = torch.randn(steps, 2, 3, requires_grad=True)
        if dynamic == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = values_and_gradients(compiled, x, module)
        assert_equal_to_eager(got, values_and_gradients(module, x, module))


@pytest.mark.parametrize("name", NAMES)
def test_inductor(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 3), module)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for i, steps in enumerate((5, 8)):
        x = torch.randn(2, steps, 3, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = values_and_gradients(compiled, x, model)
        assert_equal_to_eager(got, values_and_gradients(model, x, model))


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4, 2).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for i, steps in enumerate((5, 8)):
            x = torch.randn(steps, 2, 3)
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                got = flat(compiled(x))
            assert_equal_to_eager(got, flat(module(x)))


@pytest.mark.parametrize("given", ["tensor", "list"])
def test_lengths_and_reset_fix_no_size(given: str) -> None:
    module = fastrnn.GRU(3, 4, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, (steps, size) in enumerate(((6, 7), (9, 7 if given == "list" else 8))):
        lengths: Any = [3, 1, *[2] * (size - 2)]
        if given == "tensor":
            lengths = torch.tensor(lengths)
        options = {"lengths": lengths, "reset": torch.rand(steps, size) < 0.3}
        x = torch.randn(steps, size, 3, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = values_and_gradients(functools.partial(compiled, **options), x, module)
        expected = values_and_gradients(functools.partial(module, **options), x, module)
        assert_equal_to_eager(got, expected)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_frozen_weight(frozen: str) -> None:
    module = fastrnn.GRU(3, 4)
    getattr(module, frozen).requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    free = [p for p in module.parameters() if p.requires_grad]
    got = torch.autograd.grad(compiled(x)[0].sum(), free)
    assert_equal_to_eager(list(got), list(torch.autograd.grad(module(x)[0].sum(), free)))


def test_unused_outputs() -> None:
    module = fastrnn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    for pick in (lambda r: r[0], lambda r: r[1][0], lambda r: r[1][1]):
        compiled = torch.compile(
            lambda x, pick=pick: pick(module(x)), fullgraph=True, backend="aot_eager"
        )
        got = torch.autograd.grad(compiled(x).sum(), list(module.parameters()))
        eager = torch.autograd.grad(pick(module(x)).sum(), list(module.parameters()))
        assert_equal_to_eager(list(got), list(eager))


def test_autocast() -> None:
    module = fastrnn.LSTM(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, eager = flat(compiled(x)), flat(module(x))
    assert [t.dtype for t in got] == [torch.bfloat16] * 3
    for a, b in zip(got, eager, strict=True):
        assert_close_by_rule("autocast", a, b.detach().double(), b)


def test_backend_chosen_around_a_compiled_call() -> None:
    """use_backend is noticed by code that is already compiled."""
    module = fastrnn.GRU(3, 4)
    operators: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        operators.append(graph.code)
        return graph

    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend=record)
        x = torch.randn(5, 2, 3)
        expected = compiled(x)[0]
        with fastrnn.use_backend("reference"):
            got = compiled(x)[0]
        assert_close_by_rule("reference", got, expected.double(), expected)
        compiled(x)
    assert ["fastrnn" in code for code in operators] == [True, False]


@pytest.mark.parametrize("sizes", [[4, 5], [4, 400], [3, 4], [3, 3]], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "RHN", "BNLSTM"])
def test_batch_sizes_of_other_data_are_an_error(kind: str, sizes: list[int]) -> None:
    """Their values are unknown while a call is traced; kernels write where they point."""
    module = getattr(fastrnn, kind)(3, 4, **({"max_length": 2} if kind == "BNLSTM" else {}))
    call = torch.compile(
        lambda data, batch_sizes: module(PackedSequence(data, batch_sizes))[0].data,
        backend="eager",
    )
    with torch.no_grad():
        good = call(torch.randn(7, 3), torch.tensor([4, 3]))
        assert good.shape == (7, 4)
        with pytest.raises(Exception, match="batch_sizes"):
            call(torch.randn(7, 3), torch.tensor(sizes))


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 tells no export")
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_dynamo_does_not_look_into_a_plain_call(cell: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def targets(module: torch.nn.Module) -> list[str]:
        graphs.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(module, fullgraph=True, backend=keep)(torch.randn(4, 2, 5))
        (graph,) = graphs
        return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]

    make = getattr(fastrnn, cell)
    assert not any("fastrnn.plain" in each for each in targets(make(5, 7)))
    with fastrnn.use_backend("cpu"):  # which dynamo has to see
        assert any("fastrnn.plain" in each for each in targets(make(5, 7)))
    assert any("fastrnn.layer" in each for each in targets(make(5, 7, zoneout=0.1)))
