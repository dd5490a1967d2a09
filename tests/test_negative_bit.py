"""Tensors with torch's lazy minus sign, as the imaginary part of a conjugate has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn

MODULES: dict[str, Callable[[], Any]] = {
    "lstm": lambda: fastrnn.LSTM(5, 7),
    "gru": lambda: fastrnn.GRU(5, 7),
    "rnn": lambda: fastrnn.RNN(5, 7),
    "lstm_2_layers": lambda: fastrnn.LSTM(5, 7, 2),
    "rhn": lambda: fastrnn.RHN(5, 7, depth=2),
    "bnlstm": lambda: fastrnn.BNLSTM(5, 7, max_length=4),
    "lstm_cell": lambda: fastrnn.LSTMCell(5, 7),
    "gru_cell": lambda: fastrnn.GRUCell(5, 7),
    "rnn_cell": lambda: fastrnn.RNNCell(5, 7),
}


def lazily(value: Any, negative: bool) -> Any:
    """The same numbers, with the negative bit or without."""
    if not isinstance(value, Tensor):
        return None if value is None else tuple(lazily(v, negative) for v in value)
    value = value.detach()
    return torch._neg_view(-value) if negative else value.clone()


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


def outcome(module: Any, x: Tensor, hx: Any, negative: bool, grad: bool) -> list[Tensor]:
    """Three calls, the later of which are prepared: results, and gradients of lazy gradients."""
    found = []
    for _ in range(3):
        input, state = lazily(x, negative), lazily(hx, negative)
        assert input.is_neg() is negative
        with torch.set_grad_enabled(grad):
            results = tensors(module(input.requires_grad_(grad), state))
        found += [r.detach() for r in results]
        if grad:
            module.zero_grad()
            torch.autograd.backward(results, [lazily(r.detach().cos(), negative) for r in results])
            found += [input.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    return found


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("with_state", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("name", MODULES)
def test_values_are_those_without(name: str, with_state: bool, grad: bool) -> None:
    module = MODULES[name]().eval()
    x = torch.randn(3, 5) if name.endswith("cell") else torch.randn(4, 3, 5)
    with torch.no_grad():
        state = module(x) if name.endswith("cell") else module(x)[1]
    hx = state if with_state else None
    expected = outcome(module, x, hx, False, grad)
    # By now the call is prepared, for tensors without the bit.
    for a, b in zip(outcome(module, x, hx, True, grad), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "lstm_2_layers"])
def test_step(name: str) -> None:
    module = MODULES[name]()
    x = torch.randn(3, 5)
    with torch.no_grad():
        expected, state = module.step(x)
        for _ in range(3):
            torch.testing.assert_close(module.step(lazily(x, True))[0], expected)
            second = module.step(x, state)[0]
            torch.testing.assert_close(module.step(x, lazily(state, True))[0], second)


@pytest.mark.parametrize("name", MODULES)
def test_weights(name: str) -> None:
    module, lazy = MODULES[name]().eval(), MODULES[name]().eval()
    lazy.load_state_dict(module.state_dict())
    for key, parameter in list(lazy.named_parameters()):
        setattr(lazy, key, torch.nn.Parameter(lazily(parameter, True)))
    x = torch.randn(3, 5) if name.endswith("cell") else torch.randn(4, 3, 5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                pairs = zip(tensors(lazy(x)), tensors(module(x)), strict=True)
                for a, b in pairs:
                    torch.testing.assert_close(a, b)
