"""Many vectors at once through one backward: torch.autograd.grad(is_grads_batched=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.tolerances import assert_close_by_rule

MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: fastrnn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    "lstm_layer_norm": lambda: fastrnn.LSTM(3, 4, layer_norm=True),
    "gru": lambda: fastrnn.GRU(3, 4, recurrent_dropout=0.3, zoneout=0.1),
    "rnn": lambda: fastrnn.RNN(3, 4, batch_first=True),
    "rhn": lambda: fastrnn.RHN(3, 4, depth=2, variational_state=0.3),
    "bnlstm": lambda: fastrnn.BNLSTM(3, 4, max_length=5, eps=0.1),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_as_one_by_one(name: str, create_graph: bool) -> None:
    module = MODULES[name]().double()
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    for turn in range(3):  # the last of a prepared call, where there are such
        module.zero_grad()
        torch.manual_seed(turn)
        y = module(x)[0]
        vectors = torch.randn(6, *y.shape, dtype=torch.float64)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        many = torch.autograd.grad(
            y, inputs, vectors, is_grads_batched=True, create_graph=create_graph, **options
        )
        single = [torch.autograd.grad(y, inputs, v, **options) for v in vectors]
        for i, got in enumerate(many):
            if got is None:
                assert all(each[i] is None for each in single)
                continue
            expected = torch.stack([each[i] for each in single])
            assert_close_by_rule(f"input {i}", got, expected, expected)


def test_a_jacobian() -> None:
    module = fastrnn.GRU(3, 4)
    x = torch.randn(3, 2, 3)
    slow, fast = (
        torch.autograd.functional.jacobian(lambda x: module(x)[0], x, vectorize=vectorize)
        for vectorize in (False, True)
    )
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", [*MODULES, "lstm cell"])
def test_vmap_of_autograd_grad(name: str, create_graph: bool) -> None:
    """torch.func.vmap around torch.autograd.grad of an output that was computed before."""
    module = fastrnn.LSTMCell(3, 4).double() if "cell" in name else MODULES[name]().double()
    x = torch.randn(*[5] * ("cell" not in name), 4, 3, dtype=torch.float64, requires_grad=True)
    for turn in range(3):
        torch.manual_seed(turn)
        y = module(x)[0]
        inputs = [x, *module.parameters()]
        vectors = torch.randn(6, *y.shape, dtype=torch.float64)

        def gradients(v: Tensor, y: Tensor = y, inputs: Any = inputs) -> Any:
            return torch.autograd.grad(y, inputs, v, retain_graph=True, create_graph=create_graph)

        many = torch.func.vmap(gradients)(vectors)
        single = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in vectors]
        for i, got in enumerate(many):
            expected = torch.stack([each[i] for each in single])
            assert_close_by_rule(f"input {i}", got, expected, expected)
        assert many[0].requires_grad == create_graph
