"""Gradients of BNLSTM against finite differences, and gradients of gradients; native, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from tests.tolerances import assert_close_by_rule

T, N, I, H = 3, 3, 2, 3
LENGTHS = torch.tensor([2, 3, 1])
RESET = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two_layers": {"num_layers": 2},
    "nobias": {"bias": False},
    "sequence": {"input_stats": "sequence"},
    "sequence_lengths": {"input_stats": "sequence", "bidirectional": True, "lengths": LENGTHS},
    "lengths_reset": {"lengths": LENGTHS, "reset": RESET},
    "packed": {"bidirectional": True, "packed": True},
    "batch_first": {"batch_first": True, "lengths": LENGTHS},
    "return_cells": {"return_cells": True, "bidirectional": True, "lengths": LENGTHS},
    "eval": {"eval": True, "bidirectional": True, "lengths": LENGTHS, "reset": RESET},
    "eval_sequence": {"eval": True, "input_stats": "sequence"},
}


def make(
    options: str, dtype: torch.dtype = torch.float64
) -> tuple[torch.nn.Module, tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
    """A module as a function of all that can have a gradient: x, states and parameters."""
    settings = dict(OPTIONS[options])
    call = {k: settings.pop(k) for k in ("lengths", "reset", "return_cells") if k in settings}
    packed, in_eval = settings.pop("packed", False), settings.pop("eval", False)
    module = fastrnn.BNLSTM(I, H, max_length=2, eps=0.1, gamma_init=0.5, dtype=dtype, **settings)
    for buffer in module.buffers():
        if buffer.dtype == dtype:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    module.train(not in_eval)
    x = torch.randn((N, T, I) if module.batch_first else (T, N, I), dtype=dtype)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(layers, N, H, dtype=dtype) for _ in range(2)]
    names = [n for n, _ in module.named_parameters()]
    parameters = [p.detach() + 0.1 * torch.randn_like(p) for p in module.parameters()]

    def function(x: Tensor, h0: Tensor, c0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given: Tensor | PackedSequence = x
        if packed:
            given = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        # Copies of the buffers: the function has to be the same at each call.
        state = {k: b.clone() for k, b in module.named_buffers()}
        state |= dict(zip(names, rest, strict=True))
        output, hidden, *cells = functional_call(module, state, (given, (h0, c0)), call)
        return (output.data if packed else output, *hidden, *cells)

    inputs = tuple(t.requires_grad_() for t in (x, *states, *parameters))
    return module, inputs, function


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: str) -> None:
    _, inputs, function = make(options)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradgradcheck(options: str) -> None:
    """Along random directions; element by element for the smallest set of options."""
    _, inputs, function = make(options)
    assert gradgradcheck(function, inputs, fast_mode=options != "plain")


@pytest.mark.parametrize("options", OPTIONS)
def test_double_backward_in_float32(options: str) -> None:
    """A gradient penalty by the rule against the reference backend."""
    module, inputs, function = make(options, torch.float32)

    def penalty(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        loss = sum((o**2).sum() for o in function(*inputs))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return first, torch.autograd.grad((first[0] ** 2).sum(), inputs)

    got = penalty(inputs)
    with fastrnn.use_backend("reference"):
        same = penalty(inputs)
        module.double()
        ref64 = penalty(tuple(t.detach().double().requires_grad_() for t in inputs))
    for order in (0, 1):
        for i, value in enumerate(got[order]):
            label = f"order {order + 1}, input {i}"
            assert_close_by_rule(label, value, ref64[order][i], same[order][i])


def test_third_derivative() -> None:
    _, inputs, function = make("plain")
    x, *rest = inputs

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(function(x, *rest)[0].square().sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, (x,))


def test_retained_graph_gives_the_same_bits() -> None:
    _, inputs, function = make("bidirectional", torch.float32)
    loss = sum(o.square().sum() for o in function(*inputs))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(a, b)


def test_backward_after_the_statistics_moved_on() -> None:
    """A graph keeps the statistics it was made with, in training and in eval."""
    module = fastrnn.BNLSTM(I, H, max_length=2)
    for mode in (True, False):
        x = torch.randn(T, N, I, requires_grad=True)
        module.train(mode)
        loss = module(x)[0].square().sum()
        expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
        module.train()
        module(torch.randn(T, N, I))
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
