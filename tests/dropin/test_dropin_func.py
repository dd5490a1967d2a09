"""torch.func inside torch.compile: what is compiled equals what runs eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, func

import fastrnn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's own jvp
]

MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "lstm": lambda: fastrnn.LSTM(3, 2),
    "gru": lambda: fastrnn.GRU(3, 2),
    "rhn": lambda: fastrnn.RHN(3, 2, depth=2),
    "bnlstm": lambda: fastrnn.BNLSTM(3, 2, max_length=4),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=list(MODULES))
def frozen(request: pytest.FixtureRequest) -> torch.nn.Module:
    return MODULES[request.param]().eval().requires_grad_(False)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager")


def transforms(module: torch.nn.Module) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    def outputs(x: Tensor) -> Tensor:
        return module(x)[0]

    def loss(x: Tensor) -> Tensor:
        return outputs(x).pow(2).sum()

    x, many = torch.randn(2, 2, 3), torch.randn(3, 2, 2, 3)
    return {
        "grad": (func.grad(loss), (x,)),
        "jvp": (lambda x, t: func.jvp(outputs, (x,), (t,)), (x, torch.randn_like(x))),
        "vmap": (func.vmap(outputs), (many,)),
        "vmap of grad": (func.vmap(func.grad(loss)), (many,)),
    }


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "vmap of grad"])
def test_compiled_transform(frozen: torch.nn.Module, name: str) -> None:
    function, inputs = transforms(frozen)[name]
    torch.testing.assert_close(compiled(function)(*inputs), function(*inputs))


def test_compiled_hessian() -> None:
    module = MODULES["gru"]().requires_grad_(False)
    second = func.hessian(lambda x: module(x)[0].pow(2).sum())
    x = torch.randn(1, 1, 3)
    expected = second(x)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(compiled(second)(x), expected)


def test_compiled_step_of_sgd() -> None:
    """functional_call and grad with respect to the parameters, as training loops in JAX's style."""
    module = MODULES["lstm"]()
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def step(weights: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return func.functional_call(module, weights, (x,))[0].pow(2).sum()

        gradients = func.grad(loss)(weights)
        return {name: w - 0.1 * gradients[name] for name, w in weights.items()}

    x = torch.randn(2, 2, 3)
    torch.testing.assert_close(compiled(step)(weights, x), step(weights, x))
