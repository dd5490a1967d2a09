"""Training steps of an RHN that go straight to the CPU library: what the general way gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.backends import cpu
from fastrnn.backends.cpu_rhn import RhnCall
from tests.saved_strides import transposed

pytestmark = pytest.mark.skipif(not cpu.LOADED, reason="the native library is not built")
T, N, I, H = 7, 5, 6, 19
Options = dict[str, Any]
OPTIONS: list[Options] = [
    {},
    {"bidirectional": True, "batch_first": True, "depth": 3},
    {"bias": False, "couple_carry": False, "depth": 1},
    {"bidirectional": True, "couple_carry": False},
]


def make(**options: Any) -> fastrnn.RHN:
    torch.manual_seed(1)
    return fastrnn.RHN(I, H, **{"depth": 2, **options})


def given(module: fastrnn.RHN, dtype: torch.dtype = torch.float32, state: bool = False) -> Any:
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()

    shape = (N, T, I) if module.batch_first else (T, N, I)
    hx = normal(2 if module.bidirectional else 1, N, H) if state else None
    return normal(*shape), hx


def gradients(module: fastrnn.RHN, x: Tensor, hx: Any, y: Tensor, h_n: Tensor) -> list[Tensor]:
    wanted = [t for t in (x, hx, *module.parameters()) if t is not None and t.requires_grad]
    loss = y.square().sum() + 2 * h_n.square().sum()
    return list(torch.autograd.grad(loss, wanted, retain_graph=True))


def step(module: fastrnn.RHN, x: Tensor, hx: Any = None) -> list[Tensor]:
    y, h_n = module(x, hx)
    return [y.detach(), h_n.detach(), *gradients(module, x, hx, y, h_n)]


@contextmanager
def general_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastrnn.RHN, "_natively_recorded", lambda *args: None)
        yield


def in_general(module: fastrnn.RHN, x: Tensor, hx: Any = None) -> list[Tensor]:
    with general_way():
        return step(module, x, hx)


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def direct(y: Tensor) -> bool:
    """Whether a prepared call has made ``y``."""
    return type(y.grad_fn).__name__ == "PreparedRhnLayerBackward"


def ready(**options: Any) -> tuple[fastrnn.RHN, Tensor]:
    """A module that has prepared its call for the input."""
    module = make(**options)
    x, _ = given(module)
    for _ in range(2):
        step(module, x)
    assert direct(module(x)[0])
    return module, x


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prepared backwards' needs, as they run."""
    made: list[Any] = []
    real = RhnCall.backward

    def noted(*args: Any) -> Any:
        made.append(args[-1])
        return real(*args)

    monkeypatch.setattr(RhnCall, "backward", noted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_like_the_general_way(
    options: Options, state: bool, dtype: torch.dtype, backwards: list[Any]
) -> None:
    module = make(**options).to(dtype)
    x, hx = given(module, dtype, state)
    expected = in_general(module, x, hx)
    for turn in range(3):
        assert direct(module(x, hx)[0]) is (turn > 0)
        same(step(module, x, hx), expected)
    assert backwards == [(True, state, True)] * len(backwards)
    assert len(backwards) == 3


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_sizes_of_one(batch_first: bool, shape: tuple[int, int]) -> None:
    module = make(batch_first=batch_first, bidirectional=True)
    x = torch.randn(*shape, I, requires_grad=True)
    expected = in_general(module, x)
    for _ in range(3):
        same(step(module, x), expected)
    assert direct(module(x)[0])


def test_results_are_new_in_each_call() -> None:
    module, x = ready()
    first, second = module(x), module(x)
    assert {t.data_ptr() for t in first}.isdisjoint(t.data_ptr() for t in second)
    kept = [t.detach().clone() for t in first]
    module(x.detach() * 2)
    same([t.detach() for t in first], kept)


def test_what_is_wanted(backwards: list[Any]) -> None:
    """Gradients of x, of the state, of some of the weights; one output; the graph walked twice."""
    module, x = ready()
    hx = torch.randn(1, N, H, requires_grad=True)
    backwards.clear()
    for needs in ((False, False, True), (True, False, False), (False, True, False)):
        x.requires_grad_(needs[0])
        hx.requires_grad_(needs[1])
        module.requires_grad_(needs[2])
        assert direct(module(x, hx)[0])
        same(step(module, x, hx), in_general(module, x, hx))
        assert backwards.pop() == needs
    module.bias_l0.requires_grad_(True)
    same(step(module, x, hx), in_general(module, x, hx))
    y, h_n = module(x, hx)
    assert direct(y)
    same(gradients(module, x, hx, y, h_n), gradients(module, x, hx, y, h_n))
    for k in (0, 1):
        found = torch.autograd.grad(module(x, hx)[k].sum(), hx)
        with general_way():
            expected = torch.autograd.grad(module(x, hx)[k].sum(), hx)
        same(list(found), list(expected))
    x.requires_grad_(False)
    hx.requires_grad_(False)
    module.requires_grad_(False)
    assert module(x, hx)[0].grad_fn is None


def test_what_changes_is_noticed(set_threads: Any) -> None:
    module, x = ready()
    w_hh = module.weight_hh_l0

    def expect(prepared: bool) -> None:
        assert direct(module(x)[0]) is prepared
        same(step(module, x), in_general(module, x))

    module.weight_hh_l0 = torch.nn.Parameter(w_hh.detach() * 2)
    expect(True)
    with torch.no_grad():
        module.weight_hh_l0.mul_(3)
    expect(True)
    module.weight_ih_l0.data = module.weight_ih_l0.data.t().contiguous().t()  # other strides
    expect(False)
    module.weight_ih_l0.data = module.weight_ih_l0.data.contiguous()
    expect(True)
    module.batch_first = True
    assert direct(module(x)[0])  # anew: T and N differ
    same(step(module, x), in_general(module, x))
    module.batch_first = False
    for count in (1, 2):
        set_threads(count)
        expect(True)
    module.train(False)
    expect(True)
    for name, value in (("recompute", True), ("dropout", 0.5), ("variational_state", 0.5)):
        before = getattr(module, name)
        setattr(module, name, value)
        expect(False)
        setattr(module, name, before)
        expect(True)
    deep = torch.nn.Parameter(torch.randn(3, 2 * H, H) / 5)
    module.weight_hh_l0, bias = deep, module.bias_l0
    module.bias_l0 = torch.nn.Parameter(torch.randn(3, 2 * H))
    expect(True)  # another depth: prepared anew
    module.weight_hh_l0, module.bias_l0 = w_hh, bias
    expect(True)
    module.double()
    x = x.detach().double().requires_grad_()
    assert not direct(module(x)[0]) or module._packed.training._dtype == torch.float64
    step(module, x)
    expect(True)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (lambda m: setattr(m, "couple_carry", False), RuntimeError, "couple_carry"),
        (lambda m: setattr(m, "bias", False), ValueError, "bias=False"),
        (lambda m: setattr(m, "bidirectional", True), ValueError, "2 directions"),
        (lambda m: m.half(), ValueError, "dtype"),
        (lambda m: setattr(m, "bias_l0", torch.nn.Parameter(m.bias_l0.double())), ValueError,
         "dtype"),
        (lambda m: setattr(m, "weight_ih_l0", torch.nn.Parameter(torch.ones(2 * H, I + 1))),
         RuntimeError, "input_size"),
        (lambda m: setattr(m, "bias_l0", torch.nn.Parameter(m.bias_l0.to("meta"))), RuntimeError,
         "device"),
        (lambda m: delattr(m, "bias_l0"), AttributeError, "bias_l0"),
    ],
)  # fmt: skip
def test_what_no_longer_fits_is_said_as_always(
    change: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    module, x = ready()
    change(module)
    for _ in range(2):
        with pytest.raises(kind, match=message):
            module(x)


def test_calls_that_are_not_plain() -> None:
    module, x = ready()
    expected = module(x)[0].detach()
    hx = torch.zeros(1, N, H)
    for options in ({"lengths": [T] * N}, {"reset": torch.zeros(T, N, dtype=torch.bool)}):
        y, _ = module(x, **options)
        assert not direct(y)
        assert torch.equal(y, expected)
    assert not direct(module(pack_padded_sequence(x, [T] * N))[0].data)
    assert not direct(module(x[:, 0])[0])
    assert not direct(module(x.transpose(0, 1).contiguous().transpose(0, 1))[0])
    assert not direct(module(x, hx.transpose(0, 2).contiguous().transpose(0, 2))[0])
    assert not direct(module(torch._neg_view(x))[0])
    assert not direct(module(x[:-1])[0])  # another shape, seen for the first time
    with torch.no_grad():
        assert module(x)[0].grad_fn is None
    with torch.inference_mode():
        assert torch.equal(module(x)[0], expected)
        with torch.enable_grad():
            assert torch.equal(module(x)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
    for strict in (False, True):
        with fastrnn.use_backend("reference", strict=strict):
            y = module(x)[0]
        assert not direct(y)
        torch.testing.assert_close(y, expected)
    with fastrnn.use_backend("cpu"):
        assert not direct(module(x)[0])
    with pytest.raises(TypeError, match="hx"):
        module(x, (hx,))
    with pytest.raises(RuntimeError, match="hidden"):
        module(x, hx[:, 1:])
    with pytest.raises(ValueError, match="return_cells"):
        module(x, return_cells=True)
    assert direct(module(x)[0])


class Marked(Tensor):
    """A subclass, which torch's functions keep."""


def test_subclasses_and_parametrised_weights() -> None:
    module, x = ready()
    assert type(module(x.detach().as_subclass(Marked))[0]) is Marked
    other = copy.deepcopy(module)

    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Twice())
    with torch.no_grad():
        other.weight_hh_l0.mul_(2)
    for _ in range(2):
        found, expected = step(module, x), in_general(other, x)
        same(found[:3], expected[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2},
        {"recompute": True},
        {"variational_input": 0.3},
        {"variational_state": 0.3, "tie_gate_masks": False},
    ],
    ids=str,
)
def test_not_for(options: Options) -> None:
    module = make(**options)
    x, _ = given(module)
    for _ in range(4):
        assert not direct(module(x)[0])
    half = make().bfloat16()
    for _ in range(4):
        assert not direct(half(x.bfloat16())[0])


def test_masks_follow_the_generator_after_a_prepared_call() -> None:
    module, x = ready()
    module.variational_state = 0.4
    for _ in range(2):
        torch.manual_seed(3)
        found = step(module, x)
        torch.manual_seed(3)
        same(found, in_general(module, x))


@pytest.mark.parametrize("name", ["variational_input", "variational_state", "dropout"])
def test_probabilities_are_checked_when_they_are_set(name: str) -> None:
    """A prepared call takes False for the 0 that it equals."""
    for module in (make(), ready()[0]):
        for value in (False, True, "0", None):
            with pytest.raises(TypeError, match=rf"{name}: got {value!r} \(.*expected a probab"):
                setattr(module, name, value)
        for wrong in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=f"{name}: got {wrong}, expected a probability"):
                setattr(module, name, wrong)
        assert getattr(module, name) == 0
        setattr(module, name, 1)
        assert type(getattr(module, name)) is float
        assert f"{name}=1.0" in repr(module)


@pytest.mark.parametrize("name", ["init_range", "transform_bias"])
def test_initial_values_are_checked_when_they_are_set(name: str) -> None:
    """In reset_parameters it would be too late for those that have been drawn."""
    module = make()
    before = getattr(module, name)
    for value in ("1", None, True):
        with pytest.raises(TypeError, match=rf"{name}: got {value!r} \(.*\), expected a number"):
            setattr(module, name, value)
    with pytest.raises(ValueError, match=f"{name}: got nan, expected a finite number"):
        setattr(module, name, float("nan"))
    assert getattr(module, name) == before
    with pytest.raises(ValueError, match="init_range: got -1, expected 0 or more"):
        module.init_range = -1
    setattr(module, name, 0.5)
    module.reset_parameters()
    assert (module.bias_l0[:, H:] == 0.5).all() == (name == "transform_bias")
    assert (module.weight_hh_l0.abs() > 0.04).any() == (name == "init_range")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_tracers() -> None:
    module, x = ready()
    expected = module(x)[0].detach()
    values = {name: p.detach() for name, p in module.named_parameters()}

    def loss(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, (x,))[0].square().sum()

    (wanted,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), wanted)
    many = torch.func.vmap(lambda x: module(x)[0])(torch.stack([x.detach(), x.detach()]))
    torch.testing.assert_close(many[0], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert forward_ad.unpack_dual(module(dual)[0]).tangent is not None
    graph = make_fx(lambda x: module(x)[0])(x)
    assert "rhn_forward" in graph.code
    assert torch.equal(graph(2 * x), module(2 * x)[0])  # no constant
    traced = torch.jit.trace(module, x.detach(), check_trace=False)
    assert torch.equal(traced(2 * x)[0], module(2 * x)[0])
    with torch.profiler.profile() as seen:
        module(x)
    assert "fastrnn::rhn_forward_train" in {event.key for event in seen.key_averages()}


def test_backward_under_hooks_batching_and_the_profiler(backwards: list[Any]) -> None:
    module, x = ready()
    expected = in_general(module, x)
    backwards.clear()
    with torch.autograd.graph.saved_tensors_hooks(transposed, transposed):
        same(step(module, x), expected)
    assert backwards == []  # what came back has other strides
    y, _ = module(x)
    with torch.profiler.profile() as seen:
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert "fastrnn::rhn_backward" in {event.key for event in seen.key_averages()}
    assert backwards == []
    (again,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(dx, again)
    assert len(backwards) == 1
    each = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    (many,) = torch.autograd.grad(y, x, each, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(many[1], 2 * dx)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.double()):
        y, _ = module(x)
    with pytest.raises(RuntimeError, match="saved-tensor hooks"):
        y.sum().backward()
    assert len(backwards) == 1
    with torch.autograd.set_detect_anomaly(True):
        same(step(module, x), expected)


def test_a_parameter_changed_before_the_backward(backwards: list[Any]) -> None:
    module, x = ready()
    backwards.clear()
    y, _ = module(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _ = module(x)
    module.weight_hh_l0.data = module.weight_hh_l0.data.double()  # moves no version
    with pytest.raises(RuntimeError, match=r"the backward got .*torch\.float64"):
        y.sum().backward()
    assert backwards == []


def test_hooks_of_the_module_run() -> None:
    module, x = ready()
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    module.register_full_backward_hook(lambda *args: seen.append(args[1][0]))
    y = module(x)[0]
    y.sum().backward()
    assert len(seen) == 2


def test_a_checkpoint_may_prepare_between_its_calls() -> None:
    module = make()
    x, _ = given(module)
    expected = in_general(module, x)
    for _ in range(3):
        y, h_n = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        found = [y.detach(), h_n.detach()]
        loss = y.square().sum() + 2 * h_n.square().sum()
        same([*found, *torch.autograd.grad(loss, [x, *module.parameters()])], expected)


def test_twice_differentiable() -> None:
    module = make().double()
    x, _ = given(module, torch.float64)
    for _ in range(2):
        step(module, x)
    assert direct(module(x)[0])
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    with fastrnn.use_backend("reference"):
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,), fast_mode=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_compiled_calls() -> None:
    module, x = ready()
    expected = module(x)[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x)[0]
    assert not direct(y)
    torch.testing.assert_close(y, expected)
    assert direct(module(x)[0])
