"""Activation checkpointing of single layers and every regulariser: the bits of the plain call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastrnn
from tests.tolerances import assert_same_bits

# Small layers of one layer: from the second call of a shape on they are prepared calls.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: fastrnn.LSTM(3, 4),
    "gru": lambda: fastrnn.GRU(3, 4),
    "rnn": lambda: fastrnn.RNN(3, 4),
    "layer_norm": lambda: fastrnn.GRU(3, 4, layer_norm=True),
    "recompute": lambda: fastrnn.LSTM(3, 4, recompute=True),
    "regularised": lambda: fastrnn.LSTM(
        3, 4, 2, dropout=0.5, recurrent_dropout=0.3, zoneout=0.2, weight_dropout=0.2
    ),
    "zoneout": lambda: fastrnn.RNN(3, 4, zoneout=0.2),
    "rhn": lambda: fastrnn.RHN(3, 4, depth=2, variational_input=0.3, variational_state=0.3),
    "bnlstm": lambda: fastrnn.BNLSTM(3, 4, max_length=9, h0_noise=0.1),
}


def saves(save: bool, ctx: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    mine = save and "fastrnn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE


def selective(save: bool) -> dict[str, Any]:
    policy = functools.partial(saves, save)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return {"use_reentrant": False, "context_fn": contexts}


WAYS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "our operators saved": selective(True),
    "nothing saved": selective(False),
    "profiled forward": {"use_reentrant": False},
    "profiled backward": {"use_reentrant": False},
}


def profiled(wanted: bool) -> AbstractContextManager[Any]:
    return torch.profiler.profile() if wanted else nullcontext()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_bits_of_the_plain_call(name: str, way: str) -> None:
    """Masks are those of the forward, and what the two passes save is alike, turn by turn."""
    module = MODULES[name]()
    initial = copy.deepcopy(module.state_dict())  # running statistics move
    x = torch.randn(5, 4, 3)

    def call(x: Tensor) -> Tensor:
        return module(x)[0]

    def run(again: bool) -> dict[str, Tensor]:
        module.load_state_dict(initial)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        with profiled(again and way == "profiled forward"):
            y = checkpoint(call, leaf, **WAYS[way]) if again else call(leaf)
        with profiled(again and way == "profiled backward"):
            y.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in module.named_parameters()}
        return {"y": y.detach(), "dx": leaf.grad, **grads}

    for _ in range(3):
        expected, found = run(False), run(True)
        for key, value in found.items():
            assert_same_bits(key, value, expected[key])


@pytest.mark.parametrize("name", ["lstm", "rhn", "bnlstm"])
def test_the_first_call_with_a_computed_weight(name: str) -> None:
    """Its repetition in the backward is the second: both save as much."""
    module = MODULES[name]()
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(5, 4, 3, requires_grad=True)
    torch.manual_seed(3)
    checkpoint(module, x, use_reentrant=False)[0].sum().backward()
    found, x.grad = x.grad, None
    if name == "bnlstm":  # whose running statistics have moved, of which training uses none
        module.reset_running_stats()
    torch.manual_seed(3)
    module(x)[0].sum().backward()
    assert_same_bits("dx", found, x.grad)


def test_a_weight_is_computed_once_in_a_call() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return 2 * weight

    layer, cell = fastrnn.GRU(3, 4), fastrnn.GRUCell(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Counted())
    nn.utils.parametrize.register_parametrization(cell, "weight_hh", Counted())
    x = torch.randn(5, 4, 3)
    for grad in (True, False):
        for call in (lambda: layer(x), lambda: layer.step(x[0]), lambda: cell(x[0])):
            for _ in range(3):
                calls.clear()
                with torch.set_grad_enabled(grad):
                    call()
                assert len(calls) == 1
