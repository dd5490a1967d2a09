"""module.step: streaming one time step at a time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tolerances import assert_close_by_rule
from torch import Tensor, nn

import fastrnn

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm-proj": ("LSTM", {"proj_size": None}),  # half of the hidden size
    "gru": ("GRU", {}),
    "gru-reset-before": ("GRU", {"reset_after": False}),
    "rnn-tanh": ("RNN", {}),
    "rnn-relu": ("RNN", {"nonlinearity": "relu"}),
}
SIZES = [(1, 2, 1), (3, 7, 1), (6, 13, 1), (5, 32, 2), (33, 17, 3), (16, 64, 1)]


def build(kind: str, inputs: int = 6, hidden: int = 13, layers: int = 1, **more: Any) -> nn.Module:
    name, options = KINDS[kind]
    if "proj_size" in options:
        options = {"proj_size": max(1, hidden // 2)}
    return getattr(fastrnn, name)(inputs, hidden, layers, **options, **more)


def parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def run_steps(module: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for x_t in x.unbind(1 if module.batch_first and x.dim() == 3 else 0):
        y_t, state = module.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1 if module.batch_first and x.dim() == 3 else 0), state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs,hidden,layers", SIZES)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_steps_make_the_sequence(
    kind: str, inputs: int, hidden: int, layers: int, grad: bool
) -> None:
    module = build(kind, inputs, hidden, layers)
    exact = build(kind, inputs, hidden, layers).double()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(7, 3, inputs)
    with torch.set_grad_enabled(grad):
        got, state = run_steps(module, x)
    with fastrnn.use_backend("reference"):
        truth, truth_state = exact(x.double())
        same, same_state = module(x)
    assert_close_by_rule("output", got, truth, same)
    for a, b, c in zip(parts(state), parts(truth_state), parts(same_state), strict=True):
        assert_close_by_rule("state", a, b, c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts(kind: str, bias: bool, batch_first: bool, dtype: torch.dtype) -> None:
    module = build(kind, layers=2, bias=bias, batch_first=batch_first, dtype=dtype)
    x = torch.randn(4, 4, 6, dtype=dtype)
    with torch.no_grad():
        expected, h = module(x)
        got, state = run_steps(module, x)
        torch.testing.assert_close(got, expected)
        for a, b in zip(parts(state), parts(h), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b)
        single, single_state = run_steps(module, x[0])
        expected, h = module(x[0])
    torch.testing.assert_close(single, expected)
    for a, b in zip(parts(single_state), parts(h), strict=True):
        assert a.shape == b.shape == (2, b.size(-1))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_are_noticed(kind: str) -> None:
    module = build(kind)
    x = torch.randn(2, 6)

    def check() -> None:
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(module.step(x)[0], module(x.unsqueeze(0))[0][0])
        with torch.enable_grad():
            fresh = build(kind)
            fresh.load_state_dict(module.state_dict())
            torch.testing.assert_close(
                module.step(x)[0], fresh(x.unsqueeze(0))[0][0], msg="stale weights"
            )

    before = module.step(x)[0]
    check()
    optimiser = torch.optim.SGD(module.parameters(), 1.0)
    module.step(x)[0].sum().backward()
    optimiser.step()
    check()
    with torch.no_grad():
        module.weight_ih_l0.mul_(-1)
    check()
    module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
    check()
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})
    check()
    module.bias_ih_l0.data.add_(1.0)
    check()
    module.weight_ih_l0.data[0, 0] = 3.0
    module.flatten_parameters()
    check()
    module.double().float()
    check()
    assert not torch.equal(module.step(x)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_callers_own(kind: str) -> None:
    module = build(kind, layers=2)
    x = torch.randn(2, 6)
    with torch.no_grad():
        y, state = module.step(x)
        kept = [part.clone() for part in parts(state)]
        first = y.clone()
        y.zero_()
        assert all(torch.equal(a, b) for a, b in zip(parts(state), kept, strict=True))
        second, _ = module.step(x, state)
        assert all(torch.equal(a, b) for a, b in zip(parts(state), kept, strict=True))
        assert not torch.equal(first, second)
        assert not y.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_steps(kind: str) -> None:
    module = build(kind, layers=2).double()
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    got = torch.autograd.grad(run_steps(module, x)[0].square().sum(), leaves)
    expected = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_weights_in_grad_mode_and_a_state_with_gradient() -> None:
    module = build("gru").requires_grad_(False)
    h = torch.randn(1, 2, 13, requires_grad=True)
    x = torch.randn(2, 6)
    y, _ = module.step(x, h)
    (grad,) = torch.autograd.grad(y.sum(), h)
    assert grad.abs().sum() > 0
    assert not module.step(x, h.detach())[0].requires_grad


def test_strided_arguments() -> None:
    module = build("lstm", layers=2)
    x = torch.randn(6, 4).t()[::2]
    h = torch.randn(13, 2, 2).permute(2, 1, 0)
    c = torch.randn(2, 2, 26)[..., ::2]
    with torch.no_grad():
        a, (h1, c1) = module.step(x, (h, c))
        b, (h2, c2) = module(x.unsqueeze(0), (h, c))
    torch.testing.assert_close(a, b[0])
    torch.testing.assert_close(h1, h2)
    torch.testing.assert_close(c1, c2)


def test_empty_batch() -> None:
    module = build("lstm", layers=2)
    with torch.no_grad():
        y, (h, c) = module.step(torch.zeros(0, 6))
    assert y.shape == (0, 13)
    assert h.shape == c.shape == (2, 0, 13)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_errors(name: str) -> None:
    module = getattr(fastrnn, name)(6, 13, 2)
    x = torch.randn(2, 6)

    def state(*shape: int, **options: Any) -> Any:
        part = torch.zeros(shape, **options)
        return (part, part) if name == "LSTM" else part

    with torch.no_grad():
        expected = module.step(x)[0]
        both = getattr(fastrnn, name)(6, 13, bidirectional=True)
        with pytest.raises(ValueError, match=f"{name}.step: bidirectional=True, expected a module"):
            both.step(x)
        with pytest.raises(ValueError, match=f"{name}.step: Expected x_t to be 1D or 2D, got 3D"):
            module.step(x.unsqueeze(0))
        with pytest.raises(TypeError, match=f"{name}.step: x_t should be a Tensor, got list"):
            module.step([1.0] * 6)
        with pytest.raises(RuntimeError, match="Expected 6, got 5"):
            module.step(x[:, :5])
        with pytest.raises(ValueError, match="does not match weight dtype"):
            module.step(x.double())
        for bad in (state(1, 2, 13), state(2, 3, 13), state(2, 2, 12)):
            with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(2, 2, 13\), got"):
                module.step(x, bad)
        with pytest.raises(RuntimeError, match="should also be 3-D but got"):
            module.step(x, state(2, 13))
        with pytest.raises(RuntimeError, match="should also be 2-D but got"):
            module.step(x[0], state(2, 1, 13))
        with pytest.raises(RuntimeError, match="not the same dtype"):
            module.step(x, state(2, 2, 13, dtype=torch.float64))
        with pytest.raises(TypeError, match="hx should be a"):
            module.step(x, [torch.zeros(2, 2, 13)])
        if name == "LSTM":
            good = torch.zeros(2, 2, 13)
            with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
                module.step(x, (good, torch.zeros(2, 2, 12)))
        assert torch.equal(module.step(x)[0], expected)


def test_the_chosen_backend_is_used() -> None:
    module = build("gru")
    x = torch.randn(2, 6)
    with torch.no_grad():
        module.step(x)
        with fastrnn.use_backend("reference"):
            one = module.step(x)[0]
            other = module(x.unsqueeze(0))[0][0]
        assert torch.equal(one, other)
        with (
            fastrnn.use_backend("cuda"),
            pytest.raises(RuntimeError, match="the cuda backend cannot serve this call"),
        ):
            module.step(x)


def test_autocast_and_inference_mode() -> None:
    module = build("lstm", layers=2)
    x = torch.randn(2, 6)
    with torch.no_grad():
        expected = module.step(x)[0]
    with torch.inference_mode():
        y, state = module.step(x)
        assert torch.equal(y, expected)
        assert torch.equal(module.step(x, state)[0], module(x.unsqueeze(0), state)[0][0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module.step(x)[0].dtype == module(x.unsqueeze(0))[0].dtype
    with torch.no_grad():
        assert torch.equal(module.step(x)[0], expected)


def test_dropout_acts_between_layers_in_training_only() -> None:
    module = fastrnn.GRU(6, 13, 2, dropout=1.0)
    x = torch.randn(2, 6)
    with torch.no_grad():
        trained = module.train().step(x)[0]
        evaluated = module.eval().step(x)[0]
        blind = module.train()(torch.randn(1, 2, 6))[0][0]
        module.dropout = 0.0
        assert torch.equal(module.train().step(x)[0], evaluated)
    torch.testing.assert_close(trained, blind)
    assert not torch.equal(trained, evaluated)


def test_concurrent_callers() -> None:
    module = build("lstm", 16, 32, 2)
    inputs = torch.randn(4, 2, 16)
    with torch.no_grad():
        expected = [module.step(x)[0] for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(module.step(inputs[index])[0], expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_made_by_a_parametrisation() -> None:
    module = build("rnn-tanh")
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(2, 6)
    h = torch.randn(1, 2, 13)
    with torch.no_grad():
        torch.testing.assert_close(module.step(x, h)[0], module(x.unsqueeze(0), h)[0][0])
        module.parametrizations.weight_hh_l0.original0.mul_(2)
        torch.testing.assert_close(module.step(x, h)[0], module(x.unsqueeze(0), h)[0][0])


@pytest.mark.parametrize(
    "build",
    [
        lambda: fastrnn.LSTM(5, 64, recurrent_dropout=0.5, recurrent_dropout_per="sequence"),
        lambda: fastrnn.GRU(5, 64, weight_dropout=0.5),
        lambda: fastrnn.RHN(5, 64, depth=2, variational_state=0.5, variational_input=0.5),
    ],
    ids=["per_sequence", "weight", "variational"],
)
def test_masks_of_a_sequence_are_drawn_anew_by_each_step(build: Any) -> None:
    """As the docstring says; a whole sequence keeps them, and so does evaluation, without any."""
    module = build()
    x, state = torch.randn(3, 5), None
    _, state = module.step(x)
    first, second = (module.step(x, state)[0] for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    first, second = (module.step(x, state)[0] for _ in range(2))
    assert torch.equal(first, second)
