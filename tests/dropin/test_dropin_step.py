"""`step` of modules whose weights come from torch's older utilities, and on meta."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import tensors
from torch import nn
from torch.nn.utils import prune

import fastrnn

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


def pruned(module: Any, name: str) -> None:
    prune.random_unstructured(module, name, 0.5)


def pruned_twice(module: Any, name: str) -> None:
    prune.random_unstructured(module, name, 0.3)
    prune.l1_unstructured(module, name, 0.3)


UTILITIES: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "weight_norm": (nn.utils.weight_norm, "_g"),
    "spectral_norm": (nn.utils.spectral_norm, "_orig"),
    "prune": (pruned, "_orig"),
    "prune_twice": (pruned_twice, "_orig"),
}
MODULES: dict[str, Callable[[], Any]] = {
    "lstm": lambda: fastrnn.LSTM(6, 5, 2),
    "lstm_proj": lambda: fastrnn.LSTM(6, 5, proj_size=3),
    "gru": lambda: fastrnn.GRU(6, 5, 2, batch_first=True),
    "rnn": lambda: fastrnn.RNN(6, 5),
    "rhn": lambda: fastrnn.RHN(6, 5, depth=2),
    "bnlstm": lambda: fastrnn.BNLSTM(6, 5, max_length=3),
}
utilities = pytest.mark.parametrize("utility", UTILITIES)
modules = pytest.mark.parametrize("name", MODULES)


def changed(name: str, utility: str) -> Any:
    module = MODULES[name]()
    for weight in ("weight_ih_l0", "weight_hh_l0"):
        UTILITIES[utility][0](module, weight)
    return module.eval()


def assert_step_is_the_sequence(module: Any) -> None:
    """`step` first: the call of the module would compute the weights."""
    for _ in range(2):
        y, _ = module.step(X)
        time_dim = 1 if module.batch_first else 0
        expected, _ = module(X.unsqueeze(time_dim))
        torch.testing.assert_close(y, expected.squeeze(time_dim))


@modules
@utilities
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_weights_are_those_of_the_call(name: str, utility: str, grad: bool) -> None:
    module = changed(name, utility)
    with torch.set_grad_enabled(grad):
        assert_step_is_the_sequence(module)
        with torch.no_grad():
            getattr(module, "weight_hh_l0" + UTILITIES[utility][1]).mul_(-3.0)
            if utility == "spectral_norm":  # of which a factor alone changes nothing
                module.weight_ih_l0_orig[0].mul_(9.0)
        assert_step_is_the_sequence(module)
        fresh = changed(name, utility)
        before = fresh.step(X)[0].detach().clone()
        fresh.load_state_dict(module.state_dict())
        y, _ = fresh.step(X)
        assert not torch.equal(y, before)
        torch.testing.assert_close(y, module.step(X)[0])
        assert_step_is_the_sequence(copy.deepcopy(fresh) if not grad else fresh)


@modules
@utilities
def test_training_through_step(name: str, utility: str) -> None:
    module = changed(name, utility).train()
    trained = getattr(module, "weight_hh_l0" + UTILITIES[utility][1])
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    values = []
    for _ in range(3):
        optimiser.zero_grad()
        y, state = module.step(X)
        y, _ = module.step(X, state)
        y.square().sum().backward()
        assert trained.grad is not None
        values.append(trained.detach().clone())
        optimiser.step()
    assert not torch.equal(values[0], values[1])


@modules
def test_other_hooks_stay_unrun(name: str) -> None:
    module = MODULES[name]()
    module.register_forward_pre_hook(lambda m, args: pytest.fail("a hook was run"))
    module.step(X)


@modules
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_on_meta(name: str, grad: bool) -> None:
    module = MODULES[name]().to("meta").eval()
    real, state, real_state = MODULES[name]().eval(), None, None
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            y, state = module.step(X.to("meta"), state)
            expected, real_state = real.step(X, real_state)
            assert y.is_meta
            assert y.shape == expected.shape
    if name != "bnlstm":
        shapes = [t.shape for t in tensors(real_state)]
        assert [t.shape for t in tensors(state)] == shapes


@modules
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sequence_without_gradients_on_meta(name: str, training: bool) -> None:
    module = MODULES[name]().to("meta").train(training)
    with torch.no_grad():
        for _ in range(3):
            assert module(torch.empty(3, 3, 6, device="meta"))[0].is_meta
