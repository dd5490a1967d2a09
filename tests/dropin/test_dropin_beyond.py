"""What torch.nn on the CPU does not give, or gives for some of its modules only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dropin_cases import (
    PROJECTED,
    Kind,
    assert_alike,
    assert_same_bits,
    leaf,
    loss_of,
    outcome,
    raised,
    random_packed,
    random_state,
    results,
    tensors,
    twins,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

from tests.versions import OLD


def test_not_a_torch_subclass(kind: Kind) -> None:
    """dynamo breaks the graph on subclasses of nn.LSTM, nn.GRU and nn.RNN."""
    assert not isinstance(kind.ours(2, 3), (nn.LSTM, nn.GRU, nn.RNN))


def test_signature_is_written_out(any_kind: Kind) -> None:
    """Names and defaults of torch's documentation, in its order, then keyword-only extras."""
    parameters = inspect.signature(type(any_kind.ours(5, 7))).parameters
    documented = ["input_size", "hidden_size", "num_layers"]
    documented += ["nonlinearity"] if any_kind.name == "RNN" else []
    documented += ["bias", "batch_first", "dropout", "bidirectional"]
    documented += ["proj_size"] if any_kind.name == "LSTM" else []
    documented += ["device", "dtype"]
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == documented


def test_skip_init(any_kind: Kind) -> None:
    cls = type(any_kind.ours(5, 7))
    module = nn.utils.skip_init(cls, 5, 7, **any_kind.options)
    module.load_state_dict(any_kind.theirs(5, 7).state_dict())
    outcome(module, torch.randn(3, 2, 5))


def test_weight_of_wrong_shape_is_refused(any_kind: Kind) -> None:
    """torch.nn.LSTM reads past the end of such a weight."""
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        ours, _ = twins(any_kind, 6, 6)
        good = getattr(ours, name)
        setattr(ours, name, nn.Parameter(good.detach()[1:]))
        error, text = raised(ours, torch.randn(4, 3, 6))
        assert issubclass(error, (RuntimeError, ValueError))
        assert "weight" in text or "bias" in text or "shape" in text or "size" in text
        setattr(ours, name, good)
        outcome(ours, torch.randn(4, 3, 6))


def test_missing_weight_is_named(kind: Kind) -> None:
    """torch.nn goes on with the weight it remembers; ours says which one is missing."""
    ours, _ = twins(kind, 6, 6)
    x = torch.randn(5, 3, 6)
    expected = results(ours, x)
    weight = ours.weight_hh_l0
    del ours.weight_hh_l0
    error, text = raised(ours, x)
    assert error is AttributeError
    assert "weight_hh_l0" in text
    ours.weight_hh_l0 = weight
    assert_same_bits(results(ours, x), expected)


@pytest.mark.parametrize("options", [{}, {"proj_size": 3}], ids=["plain", "proj"])
def test_packed_lstm_is_checked(options: dict) -> None:
    """torch.nn.LSTM leaves packed input to its kernels; ours has the messages of dense input."""
    ours, theirs = twins(Kind("lstm", "LSTM"), 5, 7, **options)
    packed = random_packed(5, [3, 2, 2], True)
    data, sizes = packed.data, packed.batch_sizes
    good, few = random_state(ours, 3), random_state(ours, 2)
    for x, hx in (
        (data[:, 1:], good),
        (data.double(), good),
        (data, few),
        (data, (few[0], good[1])),
        (data, (good[0], few[1])),
        (data, (good[0], good[1][..., 1:])),
    ):
        expected = raised(theirs.check_forward_args, x, hx, sizes)
        assert raised(ours, PackedSequence(x, sizes), hx) == expected


@pytest.mark.parametrize(
    "hx", [torch.zeros(1, 3, 7), (torch.zeros(1, 3, 7),), 3, "hx", [None, None]]
)
def test_lstm_state_that_is_no_pair(hx: Any) -> None:
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    error, text = raised(ours, torch.randn(4, 3, 5), hx)
    assert error is TypeError
    assert "hx" in text
    assert "(h_0, c_0)" in text
    outcome(ours, torch.randn(4, 3, 5))


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_single_state_that_is_no_tensor(name: str) -> None:
    ours, _ = twins(Kind(name, name), 5, 7)
    for hx in ((torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)), 3, "hx"):
        error, text = raised(ours, torch.randn(4, 3, 5), hx)
        assert error is TypeError
        assert "hx" in text
    outcome(ours, torch.randn(4, 3, 5))


@pytest.mark.parametrize("input", [None, [[1.0]], 3, "text"])
def test_input_that_is_no_tensor(any_kind: Kind, input: Any) -> None:
    ours, _ = twins(any_kind, 5, 7)
    error, text = raised(lambda: ours(input))
    assert error is TypeError
    assert "input" in text


def second_order(module: Any, x: Tensor, hx: Any) -> dict[str, Tensor]:
    dtype = next(module.parameters()).dtype
    x, hx = leaf(x, dtype), leaf(hx, dtype)
    wanted = [x, *tensors(hx), *module.parameters()]
    first = torch.autograd.grad(loss_of(tensors(module(x, hx))), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    return {
        **{f"first[{i}]": g.detach() for i, g in enumerate(first)},
        **{f"second[{i}]": g for i, g in enumerate(second)},
    }


@pytest.fixture
def without_onednn() -> Iterator[None]:
    unchanged = {} if OLD else {"_fp32_precision": None}
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, **unchanged)
    yield
    torch.backends.mkldnn.set_flags(_enabled=enabled, **unchanged)


@pytest.mark.usefixtures("without_onednn")
def test_double_backward_float32(any_kind: Kind) -> None:
    """oneDNN's LSTM has no second derivative; torch's plain loop is the comparison here."""
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    wide = any_kind.theirs(5, 7, num_layers=2, bidirectional=True, dtype=torch.float64)
    wide.load_state_dict(theirs.state_dict())
    arguments = torch.randn(4, 3, 5), random_state(ours, 3)
    assert_alike(*(second_order(module, *arguments) for module in (ours, wide, theirs)))


def test_double_backward_with_dropout(any_kind: Kind) -> None:
    """The second order differentiates the masks that were drawn, not new ones."""
    ours, _ = twins(any_kind, 5, 7, num_layers=2, dropout=0.5, dtype=torch.float64)
    hx = leaf(random_state(ours, 3), torch.float64)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ours(x, hx)[0]

    x = torch.randn(3, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


def test_ensemble_by_vmap(any_kind: Kind) -> None:
    models = [any_kind.ours(5, 7, num_layers=2) for _ in range(3)]
    stacked, _ = stack_module_state(models)
    x = torch.randn(4, 2, 5)

    def call(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], weights, (x,))[0]

    for i, output in enumerate(vmap(call)(stacked)):
        torch.testing.assert_close(output, models[i](x)[0])


def test_per_sample_gradients(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7)
    weights = {n: p.detach() for n, p in ours.named_parameters()}
    batch = torch.randn(3, 4, 5)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(ours, weights, (x,))[0].square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, batch)
    for i, x in enumerate(batch):
        for name, value in grad(loss)(weights, x).items():
            torch.testing.assert_close(together[name][i], value)


def test_very_long_sequence(kind: Kind) -> None:
    """T = 70,000 (cuDNN stops at 65,535): equal to two halves with the state carried over."""
    ours = kind.ours(2, 4)
    x = torch.randn(70_000, 1, 2)
    with torch.no_grad():
        whole, last = ours(x)
        first, state = ours(x[:40_000])
        second, end = ours(x[40_000:], state)
    assert torch.equal(whole, torch.cat([first, second]))
    assert all(torch.equal(a, b) for a, b in zip(tensors(last), tensors(end), strict=True))


def test_very_long_sequence_backward() -> None:
    ours = Kind("lstm", "LSTM").ours(2, 4)
    x = torch.randn(70_000, 1, 2, requires_grad=True)
    ours(x)[0].sum().backward()
    for value in (x.grad, *(p.grad for p in ours.parameters())):
        assert value.isfinite().all()
        assert value.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_trains_in_half_precision(any_kind: Kind, dtype: torch.dtype) -> None:
    """torch.nn.LSTM refuses to train in float16 and to run some bfloat16 shapes."""
    ours = any_kind.ours(6, 8, num_layers=2, dtype=dtype)
    found = outcome(ours, torch.randn(5, 3, 6))
    assert {t.dtype for t in found.values()} == {dtype}
    assert all(t.isfinite().all() for t in found.values())


def test_recompute_gives_the_same_gradients(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 17, 33, num_layers=2, bidirectional=True)
    cheap = any_kind.ours(17, 33, num_layers=2, bidirectional=True, recompute=True)
    cheap.load_state_dict(ours.state_dict())
    wide = any_kind.theirs(17, 33, num_layers=2, bidirectional=True, dtype=torch.float64)
    wide.load_state_dict(ours.state_dict())
    x, hx = torch.randn(6, 3, 17), random_state(ours, 3)
    assert_alike(outcome(cheap, x, hx), outcome(wide, x, hx), outcome(ours, x, hx))
    assert_same_bits(results(cheap, x, hx), results(ours, x, hx))
    assert cheap.extra_repr() == ours.extra_repr() + ", recompute=True"


def test_projection_option_is_reported() -> None:
    assert PROJECTED.ours(5, 7).extra_repr() == PROJECTED.theirs(5, 7).extra_repr()


def test_a_cell_without_a_batch_refuses_a_square_state(cell: Kind) -> None:
    """Which torch.nn takes for a batch of one."""
    square = torch.zeros(7, 7)
    hx = (square, square) if cell.has_cell_state else square
    error, text = raised(cell.ours(5, 7), torch.randn(5), hx)
    assert error is RuntimeError
    assert "expected 1: (H,)" in text
