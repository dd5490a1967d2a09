"""The operators of plain layers against those of all layers, and where compiled code has them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastrnn
from fastrnn import ops
from fastrnn.backends import cpu_plain, cpu_prepared
from fastrnn.kinds import KINDS
from tests.tolerances import assert_same_bits
from tests.versions import OLD

CELLS = [cell for cell, kind in KINDS.items() if not kind.norms]


class Layer:
    """Tensors of one layer, T=5 N=3 I=6 H=4."""

    def __init__(
        self,
        cell: str,
        directions: int = 1,
        bias: bool = True,
        given: bool = True,
        batch_first: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.cell, self.bias, self.batch_first, kind = cell, bias, batch_first, KINDS[cell]
        rows = kind.gates * 4
        shapes = [(rows, 6), (rows, 4), *[(rows,)] * (2 if bias else 0)] * directions
        self.weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
        self.matrices = [w for w in self.weights if w.dim() == 2]
        self.x = torch.randn((3, 5, 6) if batch_first else (5, 3, 6), dtype=dtype)
        count = 2 if kind.has_cell else 1
        self.h = [torch.randn(directions, 3, 4, dtype=dtype) for _ in range(count)]
        self.states = self.h if given else []
        if not given:
            self.h = [torch.zeros_like(h) for h in self.h]

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.states, self.weights, self.cell, self.batch_first

    def forward(self) -> list[Tensor]:
        """What ``layer_forward_train`` returns."""
        c0 = self.h[1] if len(self.h) > 1 else None
        return ops.layer_forward_train(
            self.x, self.h[0], c0, self.weights, None, None, None, self.cell, self.batch_first,
            False, "",
        )  # fmt: skip

    def empty(self) -> list[Tensor | None]:
        """What ``plain_forward_into`` fills."""
        with torch.no_grad():
            results = ops.plain_forward(*self.arguments())
        empty = [torch.full_like(t, torch.nan) for t in results]
        return [*empty, None] if len(empty) == 2 else empty

    def into(self) -> list[Tensor]:
        results = self.empty()
        with torch.no_grad():
            assert ops.plain_forward_into(*self.arguments(), *results) is None
        return [t for t in results if t is not None]

    def present(self, results: list[Tensor]) -> list[Tensor]:
        kind = KINDS[self.cell]
        y, h_n, c_n, cells, gates = results
        return [y, h_n, *([c_n, cells] if kind.has_cell else []), *([gates] if kind.tape else [])]

    def backward(self, grads: list[Tensor | None], needs: tuple[bool, ...]) -> list[Tensor]:
        y, _, _, cells, gates = self.forward()
        c0 = self.h[1] if len(self.h) > 1 else None
        *states, dweights = ops.layer_backward(
            *grads, None, self.x, y, self.h[0], c0, cells, gates, self.weights, None, None, None,
            self.cell, self.batch_first, *needs, "",
        )  # fmt: skip
        return [t for t in (*states, *dweights) if t.dim() > 1 or t.numel()]

    def plain_backward(
        self, grads: list[Tensor | None], needs: tuple[bool, ...]
    ) -> tuple[Any, ...]:
        results = ops.plain_forward_train(*self.arguments())
        tape = results[3 if KINDS[self.cell].has_cell else 2 :]
        return (
            *grads, self.x, results[0], self.states, tape, self.matrices, self.cell,
            self.batch_first, self.bias, *needs,
        )  # fmt: skip

    def gradients(self) -> list[Tensor | None]:
        y, h_n, *_ = ops.plain_forward(*self.arguments())
        return [
            torch.randn_like(y),
            torch.randn_like(h_n),
            torch.randn_like(h_n) if KINDS[self.cell].has_cell else None,
        ]


ALL = (True, True, True)
KINDS_OF_CALLS = [
    {"cell": cell, **options}
    for cell in CELLS
    for options in (
        {},
        {"given": False, "directions": 2},
        {"bias": False, "batch_first": True},
        {"dtype": torch.bfloat16, "given": False},
        {"dtype": torch.float64, "directions": 2, "bias": False},
    )
]


def assert_same(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"{name} {i}", a, b)


@pytest.mark.parametrize("options", KINDS_OF_CALLS, ids=str)
def test_results_are_those_of_the_general_operators(options: dict[str, Any]) -> None:
    layer = Layer(**options)
    expected = layer.present(layer.forward())
    outputs = 3 if KINDS[layer.cell].has_cell else 2
    for _ in range(2):  # the second is the library's alone
        assert_same("inference", ops.plain_forward(*layer.arguments()), expected[:outputs])
        assert_same("given", layer.into(), expected[:outputs])
        assert_same("training", ops.plain_forward_train(*layer.arguments()), expected)
        for needs in itertools.product((True, False), repeat=3):
            grads = layer.gradients()
            got = ops.plain_backward(*layer.plain_backward(grads, needs))
            assert_same(f"needs {needs}", got, layer.backward(grads, needs))
        for absent in range(3):
            grads = [None if i == absent else g for i, g in enumerate(layer.gradients())]
            got = ops.plain_backward(*layer.plain_backward(grads, ALL))
            assert_same(f"without {absent}", got, layer.backward(grads, ALL))


class Counted:
    """How often the library asks Python, while it is entered."""

    def __enter__(self) -> Counted:
        self.calls: list[bool] = []
        cpu_plain.setup(*[self._counts(f) for f in cpu_plain.FUNCTIONS])
        return self

    def __exit__(self, *_: object) -> None:
        cpu_plain.setup(*cpu_plain.FUNCTIONS)

    def _counts(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(args[-1])
            return function(*args)

        return call


@pytest.fixture(autouse=True, params=["direct", "dispatched", "attributes"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """In grad mode the operators go through torch's dispatcher; without DLPack's table, as with
    torch before 2.10, the library reads the attributes of tensors."""
    cpu_prepared.setup_torch(None if request.param == "attributes" else cpu_prepared.EXCHANGE)
    with torch.set_grad_enabled(request.param == "dispatched"):
        yield
    cpu_prepared.setup_torch()


STEPS = itertools.count(50)  # of calls that no other test makes


@pytest.mark.parametrize("cell", CELLS)
def test_a_kind_of_call_is_described_once(cell: str) -> None:
    layer = Layer(cell, given=False)
    layer.x = torch.randn(next(STEPS), 3, 6)
    grads = layer.gradients()  # asks
    with Counted() as asked:
        ops.plain_forward(*layer.arguments())
        layer.into()
        ops.plain_backward(*layer.plain_backward(grads, ALL))
    assert asked.calls == []
    expected = layer.present(layer.forward())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with Counted() as asked:
            for _ in range(2):
                got = ops.plain_forward_train(*layer.arguments())
        assert asked.calls == [False]  # not known with so many threads
    finally:
        torch.set_num_threads(threads)
    assert_same("threads", got, expected)
    layer.x = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    with Counted() as asked:
        got = ops.plain_forward_train(*layer.arguments())
    assert asked.calls == [True]  # known, but not dense
    assert_same("strides", got, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_results_of_other_strides_are_filled(cell: str) -> None:
    layer = Layer(cell)
    expected, results = layer.into(), layer.empty()
    y = torch.empty(3, 5, 4).transpose(0, 1)
    with torch.no_grad(), Counted() as asked:
        ops.plain_forward_into(*layer.arguments(), y, *results[1:])
    assert asked.calls == [True]
    assert_same("strides", [y, *[t for t in results[1:] if t is not None]], expected)


@pytest.mark.parametrize("cell", CELLS)
def test_as_many_weights_of_one_direction_as_of_two(cell: str) -> None:
    kinds = [Layer(cell), Layer(cell, directions=2, bias=False)]
    assert len(kinds[0].weights) == len(kinds[1].weights)
    for layer in (*kinds, *kinds):
        expected = layer.present(layer.forward())
        assert_same("training", ops.plain_forward_train(*layer.arguments()), expected)
        grads = layer.gradients()
        got = ops.plain_backward(*layer.plain_backward(grads, ALL))
        assert_same("gradients", got, layer.backward(grads, ALL))


def test_many_kinds_of_calls() -> None:
    layer = Layer("gru")
    for steps in [*range(1, 40), 1]:
        layer.x = torch.randn(steps, 3, 6)
        for _ in range(2):
            got = ops.plain_forward_train(*layer.arguments())
        assert_same(f"T={steps}", got, layer.present(layer.forward()))


def test_large_and_empty_calls() -> None:
    layer = Layer("lstm", given=False)
    for shape in ((2000, 3, 6), (5, 0, 6)):
        layer.x = torch.randn(shape)
        layer.h = [torch.zeros(1, shape[1], 4)] * 2
        for _ in range(2):
            got = ops.plain_forward_train(*layer.arguments())
            assert_same("training", got, layer.present(layer.forward()))
            grads = layer.gradients()
            back = ops.plain_backward(*layer.plain_backward(grads, ALL))
        assert [t.shape for t in back] == [
            layer.x.shape, *[h.shape for h in layer.h], *[w.shape for w in layer.weights]
        ]  # fmt: skip


@pytest.mark.parametrize("options", KINDS_OF_CALLS[::6], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    layer = Layer(**options)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    everything = (*utils, "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.plain_forward, layer.arguments(), test_utils=everything)
    into = (*layer.arguments(), *layer.empty())
    torch.library.opcheck(ops.plain_forward_into, into, test_utils=everything)
    torch.library.opcheck(ops.plain_forward_train, layer.arguments(), test_utils=everything)
    back = layer.plain_backward(layer.gradients(), ALL)
    torch.library.opcheck(ops.plain_backward, back, test_utils=everything)


@pytest.mark.parametrize("options", KINDS_OF_CALLS, ids=str)
def test_fakes_describe_the_results(options: dict[str, Any]) -> None:
    layer = Layer(**options)
    calls = [(ops.plain_forward, layer.arguments()), (ops.plain_forward_train, layer.arguments())]
    for needs in itertools.product((True, False), repeat=3):
        calls.append((ops.plain_backward, layer.plain_backward(layer.gradients(), needs)))
    for operator, arguments in calls:
        with FakeTensorMode() as mode:
            faked = tree_map_only(Tensor, mode.from_tensor, arguments)
            fake = operator(*faked)
        real = operator(*arguments)
        assert [(t.shape, t.stride(), t.dtype) for t in fake] == [
            (t.shape, t.stride(), t.dtype) for t in real
        ]


def test_whoever_looks_on_sees_the_operators() -> None:
    layer, name = Layer("gru"), "fastrnn::plain_forward"
    arguments, seen = layer.arguments(), []
    ordinary = ops.plain_forward(*arguments)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "name", str)())
            return func(*args, **(kwargs or {}))

    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "name", str)())
            return func(*args, **(kwargs or {}))

    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "name", str)())
            return super().__torch_function__(func, types, args, kwargs or {})

    def results(*others: Any, **options: Any) -> None:
        assert_same("observed", ops.plain_forward(*(others or arguments), **options), ordinary)

    with torch.no_grad():
        for look in (Mode, FunctionMode):
            with look():
                results()
            assert seen.count(name) == 1
            seen.clear()
        results(layer.x.as_subclass(Subclass), *arguments[1:])
        assert name in seen
        with torch.profiler.profile() as profile:
            results()
        assert name in {event.key for event in profile.key_averages()}
        graph = make_fx(lambda x: ops.plain_forward(x, *arguments[1:]))(layer.x)
        assert "fastrnn.plain_forward" in graph.code
        results(*arguments[:3], cell=layer.cell, batch_first=layer.batch_first)
        results(torch._neg_view(-layer.x), *arguments[1:])
        with pytest.raises(RuntimeError, match="plain_forward"):
            ops.plain_forward(layer.x)
        with pytest.raises(RuntimeError, match="plain_forward"):
            ops.plain_forward(layer.x, 1, 2, "gru", False)
    assert torch.ops.fastrnn.plain_forward.default is ops.plain_forward
    assert {ops.plain_forward: 1}[torch.ops.fastrnn.plain_forward.default] == 1


def test_no_derivative_is_an_error() -> None:
    layer = Layer("gru")
    layer.x.requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no derivative"):
        ops.plain_forward(*layer.arguments())[0].sum().backward()


@pytest.mark.compile
@pytest.mark.skipif(OLD, reason="torch 2.6 tells no export")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_what_a_compiled_layer_calls_and_keeps(name: str) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    module = getattr(fastrnn, name)(6, 4)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def called(graph: torch.fx.GraphModule) -> list[str]:
        return [str(n.target) for n in graph.graph.nodes if "fastrnn" in str(n.target)]

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    x = torch.randn(5, 3, 6, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.enable_grad():
        compiled(x)[0].sum().backward()
    forward, backward = graphs
    assert called(forward) == ["fastrnn.plain_forward_train.default"]
    assert called(backward) == ["fastrnn.plain_backward.default"]
    kind = KINDS["rnn_tanh" if name == "RNN" else name.lower()]
    # x, y, two matrices and the tape; no bias, no state of zeros.
    kept = [n for n in backward.graph.nodes if n.op == "placeholder"]
    tangents = 3 if kind.has_cell else 2
    assert len(kept) == 4 + kind.has_cell + bool(kind.tape) + tangents
    graphs.clear()
    with torch.no_grad():
        compiled(x)
    assert graphs[0].graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.auto_functionalized_v2
    )[0].args == (ops.plain_forward_into,)
    graphs.clear()
    with torch.no_grad():
        compiled(torch.randn(6, 3, 6))  # of a size that is not known, from now on
    assert called(graphs[0]) == ["fastrnn.plain_forward.default"]
    program = torch.export.export(module.eval(), (x.detach(),))
    assert called(program.graph_module) == ["fastrnn.layer_forward.default"]


@pytest.mark.compile
@pytest.mark.skipif(OLD, reason="torch 2.6 tells no export")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's imports
@pytest.mark.parametrize("steps", [1, 700])
def test_results_of_inductor(name: str, steps: int) -> None:
    """Of small layers, whose results it allocates, and of large ones: each its own memory."""
    module = getattr(fastrnn, name)(6, 8, num_layers=2)
    x = torch.randn(steps, 3, 6)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected, got = module(x), compiled(x)
        assert_same_bits("output", got[0], expected[0])
        for i, (ours, state) in enumerate(
            zip(
                *[(s if isinstance(s, tuple) else (s,)) for s in (got[1], expected[1])], strict=True
            )
        ):
            assert_same_bits(f"state {i}", ours, state)
            ours.fill_(torch.nan)
        assert_same_bits("output", got[0], expected[0])
        again = compiled(x)
        assert_same_bits("a second call", again[0], expected[0])
        assert again[0].data_ptr() != got[0].data_ptr()


@pytest.mark.compile
@pytest.mark.skipif(OLD, reason="torch 2.6 tells no export")
def test_compiled_vmap() -> None:
    """Transforms need an operator that is a function of its arguments."""
    module = fastrnn.GRU(6, 4)
    x = torch.randn(2, 5, 3, 6)
    with torch.no_grad():
        got = torch.compile(torch.vmap(lambda x: module(x)[0]), backend="aot_eager")(x)
        assert torch.allclose(got, torch.stack([module(each)[0] for each in x]), atol=1e-6)
