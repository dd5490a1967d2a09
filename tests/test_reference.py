"""The references against torch.nn in float64 and against loops in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.reference import gru_layer, lstm_layer, rnn_layer
from tests import oracles
from tests.tolerances import assert_close_by_rule, assert_half_the_digits

T, N, I, H, P = 7, 4, 3, 5, 2
LENGTHS = torch.tensor([3, 7, 1, 5])
CELLS = ("lstm", "lstm_proj", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")


def torch_module(cell: str, bias: bool, bidirectional: bool) -> torch.nn.RNNBase:
    options = {"bias": bias, "bidirectional": bidirectional, "dtype": torch.float64}
    if cell.startswith("lstm"):
        return torch.nn.LSTM(I, H, proj_size=P if cell == "lstm_proj" else 0, **options)
    if cell == "gru":
        return torch.nn.GRU(I, H, **options)
    return torch.nn.RNN(I, H, nonlinearity=cell.removeprefix("rnn_"), **options)


def run_direction(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], **options: object
) -> tuple[Tensor, ...]:
    """(y, h_n[, c_n, cells]) of the reference for any cell name."""
    if cell.startswith("lstm"):
        return lstm_layer(x, h0, c0, weights, **options)
    if cell.startswith("gru"):
        return gru_layer(x, h0, weights, reset_after=cell == "gru", **options)
    return rnn_layer(x, h0, weights, nonlinearity=cell.removeprefix("rnn_"), **options)


def assert_equal(name: str, got: Tensor, expected: Tensor) -> None:
    assert_close_by_rule(name, got, expected.detach(), expected.detach())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("cell", [c for c in CELLS if c != "gru_reset_before"])
def test_equals_torch(cell: str, bias: bool, bidirectional: bool, lengths: Tensor | None) -> None:
    """Outputs, states and all gradients are those of torch.nn; lengths are those of packing."""
    module = torch_module(cell, bias, bidirectional)
    is_lstm, directions = cell.startswith("lstm"), 1 + bidirectional
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(directions, N, P if cell == "lstm_proj" else H, dtype=torch.float64)
    c0 = torch.randn(directions, N, H, dtype=torch.float64)
    h0.requires_grad_(), c0.requires_grad_()

    given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, state = module(given, (h0, c0) if is_lstm else h0)
    if lengths is not None:
        expected = pad_packed_sequence(expected, total_length=T)[0]
    states = state if is_lstm else (state,)

    weights = list(module._flat_weights)
    per = len(weights) // directions
    runs = [
        run_direction(
            cell, x, h0[d], c0[d], weights[d * per : (d + 1) * per], reverse=d == 1, lengths=lengths
        )
        for d in range(directions)
    ]
    outputs = [torch.cat([r[0] for r in runs], -1), torch.stack([r[1] for r in runs])]
    if is_lstm:
        outputs.append(torch.stack([r[2] for r in runs]))

    wanted = [expected, *states]
    for name, got, want in zip(("y", "h_n", "c_n"), outputs, wanted, strict=False):
        assert_equal(name, got, want)
    leaves = [x, h0, *weights] + [c0] * is_lstm
    upstream = [torch.randn_like(o) for o in wanted]
    ours = torch.autograd.grad(outputs, leaves, upstream)
    theirs = torch.autograd.grad(wanted, leaves, upstream)
    for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        assert_equal(f"gradient {i}", got, want)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 0.7


def oracle_run(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    clears: list[bool],
    backwards: bool,
) -> tuple[np.ndarray, ...]:
    """One sequence x (T, I) through the NumPy loops."""
    arrays = [w.numpy() for w in weights]
    end = {"clears": clears, "backwards": backwards}
    xs, h, c = x.numpy(), h0.numpy(), c0.numpy()
    if cell.startswith("lstm"):
        w_hr = arrays[4] if cell == "lstm_proj" else None
        return oracles.lstm(xs, h, c, *arrays[:4], w_hr, **end)
    if cell.startswith("gru"):
        return oracles.gru(xs, h, *arrays, reset_after=cell == "gru", **end)
    return oracles.rnn(xs, h, *arrays, relu=cell == "rnn_relu", **end)


def random_layer(cell: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """x (T, N, I), h0, c0 and the weights of one direction with biases."""
    gates = 4 if cell.startswith("lstm") else 3 if cell.startswith("gru") else 1
    out = P if cell == "lstm_proj" else H
    rows = gates * H
    weights = [draw(rows, I), draw(rows, out), draw(rows), draw(rows)]
    weights += [draw(P, H)] * (cell == "lstm_proj")
    return draw(T, N, I), draw(N, out), draw(N, H), weights


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_oracle(cell: str, reverse: bool) -> None:
    """Lengths and resets give what each sequence, cut to its own length, gives on its own."""
    x, h0, c0, weights = random_layer(cell)
    reset = torch.rand(T, N) < 0.4
    got = run_direction(cell, x, h0, c0, weights, reverse=reverse, lengths=LENGTHS, reset=reset)
    for n, length in enumerate(LENGTHS.tolist()):
        clears = reset[:length, n].tolist()
        want = oracle_run(cell, x[:length, n], h0[n], c0[n], weights, clears, reverse)
        assert_equal("y", got[0][:length, n], torch.from_numpy(want[0]))
        assert_equal("h_n", got[1][n], torch.from_numpy(want[1]))
        assert not got[0][length:, n].any()
        if cell.startswith("lstm"):
            assert_equal("c_n", got[2][n], torch.from_numpy(want[2]))
            assert_equal("cells", got[3][:length, n], torch.from_numpy(want[3]))
            assert not got[3][length:, n].any()


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_equals_finite_differences_of_oracle(cell: str) -> None:
    x, h0, c0, weights = random_layer(cell)
    clears = [False, False, False, True, False, False, False]
    leaves = [x, h0, *weights] + [c0] * cell.startswith("lstm")
    pull = draw(T, weights[4].shape[0] if cell == "lstm_proj" else H)

    def loss() -> float:
        y = oracle_run(cell, x[:, 0], h0[0], c0[0], weights, clears, False)[0]
        return float((y * pull.numpy()).sum())

    expected = [torch.from_numpy(oracles.central_difference(loss, v.numpy())) for v in leaves]
    for v in leaves:
        v.requires_grad_()
    reset = torch.tensor(clears)[:, None].expand(T, N)
    y = run_direction(cell, x, h0, c0, weights, reset=reset)[0]
    grads = torch.autograd.grad((y[:, 0] * pull).sum(), leaves)
    for i, (got, want) in enumerate(zip(grads, expected, strict=True)):
        assert_half_the_digits(f"gradient {i}", got, want)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str) -> None:
    x, h0, c0, weights = random_layer(cell)
    past = torch.arange(T)[:, None] >= LENGTHS
    holes = torch.where(past[..., None], torch.nan, x).requires_grad_()
    clean = run_direction(cell, x, h0, c0, weights, lengths=LENGTHS)
    got = run_direction(cell, holes, h0, c0, weights, lengths=LENGTHS)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)
    (grad,) = torch.autograd.grad(got[0].sum(), holes)
    assert torch.isfinite(grad).all()
    assert not grad[past].any()


@pytest.mark.parametrize("cell", CELLS)
def test_linear_mode_is_the_tangent(cell: str) -> None:
    """Where all pre-activations are tiny and positive, the linear cell is the cell itself."""
    x, h0, c0, weights = (
        random_layer(cell)[0].abs() * 1e-5,
        torch.zeros(N, P if cell == "lstm_proj" else H, dtype=torch.float64),
        torch.zeros(N, H, dtype=torch.float64),
        [w.abs() * 0.1 for w in random_layer(cell)[3]],
    )
    weights[2:4] = [w * 1e-5 for w in weights[2:4]]
    curved = run_direction(cell, x, h0, c0, weights)
    linear = run_direction(cell, x, h0, c0, weights, linear=True)
    for a, b in zip(curved, linear, strict=True):
        assert a.abs().max() > 1e-7
        assert_half_the_digits("linear mode", b, a)


def test_linear_mode_has_no_saturation() -> None:
    x, h0, c0, weights = random_layer("lstm")
    y, *_ = lstm_layer(x[:1] * 100, h0, c0, weights, linear=True)
    assert y.abs().max() > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_any_dtype(cell: str, dtype: torch.dtype) -> None:
    x, h0, c0, weights = random_layer(cell)
    out = run_direction(
        cell, x.to(dtype), h0.to(dtype), c0.to(dtype), [w.to(dtype) for w in weights]
    )
    exact = run_direction(cell, x, h0, c0, weights)
    for got, want in zip(out, exact, strict=True):
        assert got.dtype == dtype
        assert_half_the_digits(f"{cell} in {dtype}", got, want, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps(cell: str) -> None:
    x, h0, c0, weights = random_layer(cell)
    out = run_direction(cell, x[:0], h0, c0, weights)
    assert out[0].shape == (0, *h0.shape)
    assert torch.equal(out[1], h0)


def test_unknown_nonlinearity() -> None:
    x, h0, _, weights = random_layer("rnn_tanh")
    with pytest.raises(ValueError, match="nonlinearity: got 'selu', expected 'tanh' or 'relu'"):
        rnn_layer(x, h0, weights, nonlinearity="selu")
