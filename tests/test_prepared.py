"""Calls of a shape seen before: prepared once, with the bits of the general way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastrnn
from fastrnn import ops
from fastrnn.backends import cpu, cpu_prepared
from fastrnn.backends.cpu_prepared import CALLS
from tests.prepared_modules import CELLS, make, states
from tests.problems import CELLS as CELL_NAMES
from tests.problems import Case, Problem, backward_args, train_args
from tests.saved_strides import transposed
from tests.tolerances import assert_same_bits


def parts(results: Any) -> list[torch.Tensor]:
    output, state = results
    return [output, *(state if isinstance(state, tuple) else (state,))]


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(parts(got), parts(expected), strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize(
    "shape, batch_first",
    [((4, 3, 5), False), ((4, 3, 5), True), ((4, 5), False), ((1, 1, 5), True)],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"bidirectional": True, "num_layers": 2},
        {"bias": False},
        {"bias": False, "bidirectional": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_of_the_general_way(
    cell: str, options: dict[str, Any], shape: tuple[int, ...], batch_first: bool, given: bool
) -> None:
    module = make(cell, batch_first=batch_first, **options)
    x = torch.randn(shape)
    hx = None
    if given:
        hx = states(module, None if x.dim() == 2 else shape[0 if batch_first else 1])
    expected = module(x, hx)  # the first with gradients: not prepared
    with torch.no_grad():
        for turn in range(3):
            assert_same(module(x, hx), expected)
            assert (module._packed.sequence is not None) == (turn > 0)


def test_projection() -> None:
    module = make("lstm", proj_size=3, num_layers=2)
    x = torch.randn(4, 2, 5)
    hx = states(module, 2)
    expected = module(x, hx)
    with torch.no_grad():
        for _ in range(3):
            assert_same(module(x, hx), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_are_new_in_each_call(cell: str) -> None:
    module = make(cell, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        results = [parts(module(x)) for _ in range(4)]
    addresses = [part.data_ptr() for result in results for part in result]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("cell", CELLS)
def test_changed_weights_threads_and_shapes_are_noticed(cell: str) -> None:
    module = make(cell)
    x, longer = torch.randn(4, 2, 5), torch.randn(6, 2, 5)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            for _ in range(2):
                before = module(x)[0]
            module.weight_hh_l0.mul_(2)
            changed = module(x)[0]
            assert not torch.equal(changed, before)
            module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0 / 2)
            assert torch.equal(module(x)[0], before)
            torch.set_num_threads(1)
            assert torch.equal(module(x)[0], before)
            assert module(longer)[0].shape == (6, 2, 7)
            assert module(longer)[0].shape == (6, 2, 7)
            assert torch.equal(module(x)[0], before)
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_said_as_always() -> None:
    module = make("lstm")
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        for _ in range(2):
            module(x)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            module(x, (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)))
        with pytest.raises(RuntimeError, match="input_size"):
            module(torch.randn(4, 2, 6))
        with pytest.raises(ValueError, match="dtype"):
            module(x.double())
        module.weight_ih_l0 = torch.nn.Parameter(torch.randn(28, 6))
        with pytest.raises(RuntimeError, match="input_size"):
            module(x)


def test_a_default_device_does_not_move_the_workspace() -> None:
    module = make("gru")
    x = torch.randn(4, 2, 5, requires_grad=True)
    expected = module(x)[0].detach()
    with torch.device("meta"):
        module(x)[0].sum().backward()
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(module(x)[0], expected)


def test_options_and_overrides_take_the_general_way() -> None:
    module = make("lstm")
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        for _ in range(2):
            expected = module(x)[0]
        assert torch.equal(module(x, lengths=[4, 4])[0], expected)
        assert len(module(x, return_cells=True)) == 3
        with fastrnn.use_backend("reference"):
            assert torch.allclose(module(x)[0], expected, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x)[0].dtype == torch.bfloat16
        assert torch.equal(module(x)[0], expected)


def test_the_profiler_and_make_fx_see_operators_of_a_prepared_call() -> None:
    module, x = make("gru"), torch.randn(4, 2, 5)
    with torch.no_grad():
        for _ in range(3):
            module(x)
        with torch.profiler.profile() as seen:
            module(x)
        assert "fastrnn::layer_forward" in {event.key for event in seen.key_averages()}
        graph = make_fx(lambda x: module(x)[0])(x)
    assert "layer_forward" in graph.code
    assert torch.equal(graph(2 * x), module(2 * x)[0])  # the call was not taken for a constant


def leaves(hx: Any) -> list[torch.Tensor]:
    return [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]


def recorded(module: Any, x: torch.Tensor, hx: Any = None, **options: Any) -> list[torch.Tensor]:
    """Outputs and all gradients of a loss in which every output takes part, but for bits alike."""
    outputs = parts(module(x, hx, **options))
    loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outputs))
    wanted = [t for t in (x, *leaves(hx), *module.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def prepared(module: Any) -> bool:
    return module._packed.training is not None


TRAINED = [
    ("lstm", {}),
    ("lstm", {"bidirectional": True, "batch_first": True}),
    ("lstm", {"proj_size": 3, "bias": False}),
    ("lstm", {"layer_norm": True, "bidirectional": True}),
    ("gru", {"bidirectional": True}),
    ("gru", {"reset_after": False, "batch_first": True}),
    ("gru", {"layer_norm": True}),
    ("rnn", {"bidirectional": True, "batch_first": True}),
    ("rnn", {"nonlinearity": "relu", "bias": False}),
]
# Ones among the sizes: layouts that differ by their strides alone.
SHAPES = [(3, 2), (1, 4), (4, 1), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_every_layout(cell: str, batch_first: bool, shape: tuple[int, int]) -> None:
    module = make(cell, batch_first=batch_first, bidirectional=True).train()
    theirs = getattr(torch.nn, module._get_name())(
        5, 7, batch_first=batch_first, bidirectional=True
    )
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(*shape, 5, requires_grad=True)
    expected = recorded(theirs, x)
    for _ in range(4):
        for a, b in zip(recorded(module, x), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert prepared(module)


def test_settings_changed_after_a_call_was_prepared() -> None:
    """torch.nn's layers read their attributes in each call."""
    x = torch.randn(4, 3, 5)

    def changed(module: Any, name: str, value: Any, grad: bool) -> None:
        other = copy.deepcopy(module)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                module(x)
            setattr(module, name, value)
            setattr(other, name, value)
            for a, b in zip(parts(module(x)), parts(other(x)), strict=True):
                assert a.shape == b.shape
                assert torch.equal(a, b)

    for grad in (False, True):
        for cell in CELLS:
            changed(make(cell), "batch_first", True, grad)
        changed(make("gru"), "reset_after", False, grad)
        changed(make("rnn"), "mode", "RNN_RELU", grad)
    cell, row = fastrnn.RNNCell(5, 7), x[0]
    with torch.no_grad():
        for _ in range(3):
            cell(row)
        cell.nonlinearity = "relu"
        assert torch.equal(cell(row), copy.deepcopy(cell)(row))


def test_a_parameter_or_state_elsewhere_is_an_error() -> None:
    for name in ("weight_hh_l0", "bias_ih_l0"):
        module = make("gru")
        x = torch.randn(4, 2, 5)
        for _ in range(3):
            module(x)
        setattr(module, name, torch.nn.Parameter(getattr(module, name).to("meta")))
        with pytest.raises((RuntimeError, ValueError), match="device"):
            module(x)
    with FakeTensorMode():
        h = torch.zeros(1, 2, 7)
    with pytest.raises(Exception, match="FakeTensor"):
        make("gru")(torch.randn(4, 2, 5), h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("cell, options", TRAINED, ids=str)
def test_gradients_have_the_bits_of_the_general_way(
    cell: str, options: dict[str, Any], given: bool, dtype: torch.dtype
) -> None:
    module = make(cell, **options).train().to(dtype)
    x = torch.randn(3, 2, 5, dtype=dtype, requires_grad=True)
    hx = None
    if given:
        hx = states(module, 3 if module.batch_first else 2)
        hx = tuple(t.to(dtype).requires_grad_() for t in leaves(hx))
        hx = hx if len(hx) == 2 else hx[0]
    expected = recorded(module, x, hx)
    assert not prepared(module)
    for _ in range(2):
        for a, b in zip(recorded(module, x, hx), expected, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    assert prepared(module) is not (module.layer_norm and dtype == torch.bfloat16)


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_and_changed_parameters_with_gradients(cell: str) -> None:
    module, other = make(cell), make(cell)
    x = torch.randn(3, 2, 5)
    for frozen in ("weight_ih_l0", "weight_hh_l0"):
        getattr(module, frozen).requires_grad_(False)
        getattr(other, frozen).requires_grad_(False)
        for turn in range(3):
            with torch.no_grad():
                for a, b in zip(module.parameters(), other.parameters(), strict=True):
                    b.copy_(a.mul_(1.5 if turn == 1 else 1.0))
            other.flatten_parameters()  # forgets what it has prepared
            for a, b in zip(recorded(module, x), recorded(other, x), strict=True):
                assert torch.equal(a, b)
        assert prepared(module)
        assert not prepared(other)
    y = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_of_a_prepared_call(cell: str) -> None:
    module = make(cell).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        module(x)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,), fast_mode=True)
    assert prepared(module)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_of_a_prepared_call_under_hooks_batching_and_the_profiler(cell: str) -> None:
    module = make(cell)
    x = torch.randn(3, 2, 5, requires_grad=True)
    expected = recorded(module, x)
    for _ in range(2):
        module(x)
    assert prepared(module)

    with torch.autograd.graph.saved_tensors_hooks(transposed, transposed):
        for a, b in zip(recorded(module, x), expected, strict=True):
            assert torch.equal(a, b)
    y = module(x)[0]
    with torch.profiler.profile() as seen:
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert "fastrnn::layer_backward" in {event.key for event in seen.key_averages()}
    (again,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(dx, again)


@pytest.mark.parametrize("cell", CELLS)
def test_threads_and_what_is_not_prepared_with_gradients(cell: str) -> None:
    module = make(cell)
    x = torch.randn(3, 2, 5, requires_grad=True)
    expected, threads = recorded(module, x), torch.get_num_threads()
    try:
        for count in (threads, 1, threads):
            torch.set_num_threads(count)
            for a, b in zip(recorded(module, x), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    assert prepared(module)
    with fastrnn.use_backend("reference"):
        assert torch.allclose(module(x)[0], expected[0], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(module(x)[0].float(), expected[0])
    with pytest.raises(RuntimeError, match="input_size"):
        module(torch.randn(3, 2, 6))
    with pytest.raises(ValueError, match="dtype"):
        module(x.double())
    module.weight_ih_l0 = torch.nn.Parameter(torch.randn(module.weight_ih_l0.size(0), 6))
    with pytest.raises(RuntimeError, match="input_size"):
        module(x)
    for options in ({"num_layers": 2}, {"zoneout": 0.5}, {"recompute": True}):
        other = make(cell, **options).train()
        for _ in range(3):
            other(x)
        assert not prepared(other)


def assert_same_results(got: Sequence[torch.Tensor], expected: Sequence[Any]) -> None:
    """An operator's results beside a backend's, which has None for an empty one."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"result {i}", a, a.new_empty(0) if b is None else b)


OPERATOR_CASES = [
    *(
        Case(cell, dtype, layout=layout, directions=directions)
        for cell in CELL_NAMES
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for layout, directions in (("time", 1), ("batch", 2))
    ),
    Case("lstm", proj=3, directions=2),
    *(Case(cell, bias=False) for cell in CELL_NAMES),
    *(Case(cell, recompute=True) for cell in CELL_NAMES),
]


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_operators_have_the_bits_of_the_general_functions(case: Case) -> None:
    p = Problem(case)
    args = train_args(p)
    expected = cpu.layer_forward_train(*args)
    given = backward_args(p)
    for turn in range(3):  # prepared by the first, used by the others
        assert_same_results(ops.layer_forward_train(*args), expected)
        for needs in ((True, True, True), (False, True, turn > 0), (True, False, True)):
            *grads, dweights = ops.layer_backward(*given[:16], *needs, "")
            *general, general_dweights = cpu.layer_backward(*given[:16], *needs, "")
            assert_same_results(grads, general)
            assert_same_results(dweights, general_dweights)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_operators_take_strides_and_dtypes_the_general_way(known: bool) -> None:
    p = Problem(Case("lstm"))
    args, given = list(train_args(p)), list(backward_args(p))
    expected, gradients = ops.layer_forward_train(*args), ops.layer_backward(*given)
    if not known:
        cpu_prepared._calls.clear()
    args[0] = given[4] = p.x.transpose(0, 1).contiguous().transpose(0, 1)
    args[3] = [w.t().contiguous().t() if w.dim() == 2 else w for w in p.weights]
    assert not args[0].is_contiguous()
    assert not args[3][0].is_contiguous()
    assert_same_results(ops.layer_forward_train(*args), expected)
    for dy in (given[0], given[0].double()):
        *grads, dweights = ops.layer_backward(dy, *given[1:])
        assert_same_results(grads, gradients[:3])
        assert_same_results(dweights, gradients[3])


def test_few_calls_of_operators_are_kept() -> None:
    weights = [p.detach() for p in fastrnn.RNN(3, 4).parameters()]
    for batch in range(1, 2 * CALLS):
        x, h = torch.randn(2, batch, 3), torch.randn(1, batch, 4)
        args = (x, h, None, weights, None, None, None, "rnn_tanh", False, False, "")
        assert_same_results(ops.layer_forward_train(*args), cpu.layer_forward_train(*args))
        assert len(cpu_prepared._calls) <= CALLS


def test_a_kept_call_holds_no_tensor_of_its_caller() -> None:
    weights = [p.detach() for p in fastrnn.GRU(3, 4).parameters()]
    x, h = torch.randn(3, 2, 3), torch.randn(1, 2, 4)
    held = weakref.ref(h)
    ops.layer_forward_train(x, h, None, weights, None, None, None, "gru", False, False, "")
    del h
    gc.collect()
    assert held() is None


def test_saved_tensors_come_back_with_other_strides() -> None:
    p = Problem(Case("lstm", T=30, N=7, H=100, directions=2))  # too large for a prepared call
    given = list(backward_args(p))
    expected = ops.layer_backward(*given)
    for i in (4, 5, 8, 9):  # x, y, cells, gates
        given[i] = given[i].transpose(0, -1).contiguous().transpose(0, -1)
    found = ops.layer_backward(*given)
    assert_same_results(found[:3], expected[:3])
    assert_same_results(found[3], expected[3])
