"""Gradients of fastrnn.RHN against finite differences, and gradients of gradients."""

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

T, N, I, H = 3, 2, 2, 3
LENGTHS = torch.tensor([2, 3])
RESET = torch.tensor([[False, True], [True, False], [False, False]])
MASKED: dict[str, Any] = {"variational_input": 0.3, "variational_state": 0.4}
UNTIED: dict[str, Any] = {**MASKED, "tie_gate_masks": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "depth 1": {"depth": 1},
    "depth 2": {"depth": 2},
    "depth 3": {"depth": 3, "bidirectional": True},
    "no bias": {"bias": False, "depth": 2},
    "two layers": {"num_layers": 2, "depth": 2, **MASKED},
    "tied": {"depth": 2, "bidirectional": True, **MASKED},
    "untied": {"depth": 2, "bidirectional": True, **UNTIED},
    "lengths": {"depth": 2, "bidirectional": True, "lengths": LENGTHS, **MASKED},
    "reset": {"depth": 2, "bidirectional": True, "reset": RESET, **UNTIED},
    "recompute": {"depth": 3, "recompute": True, "lengths": LENGTHS, "reset": RESET, **UNTIED},
    "packed": {"depth": 2, "bidirectional": True, "packed": True, **MASKED},
    "batch_first": {"depth": 2, "batch_first": True, "lengths": LENGTHS},
}
CASES = [(coupled, name) for coupled in (True, False) for name in OPTIONS]


class Checked:
    """A module as a function of all that can have a gradient; masks are the same in every call."""

    def __init__(self, coupled: bool, name: str, dtype: torch.dtype = torch.float64) -> None:
        settings = dict(OPTIONS[name])
        call = {k: settings.pop(k) for k in ("lengths", "reset") if k in settings}
        packed = settings.pop("packed", False)
        options = {"couple_carry": coupled, "init_range": 0.6, "transform_bias": -0.3}
        self.module = module = fastrnn.RHN(I, H, dtype=dtype, **options, **settings)
        x = torch.randn((N, T, I) if module.batch_first else (T, N, I), dtype=dtype)
        h0 = torch.randn(module.num_layers * (1 + module.bidirectional), N, H, dtype=dtype)
        names = [n for n, _ in module.named_parameters()]
        leaves = [x, h0, *(p.detach().clone() for p in module.parameters())]
        self.inputs = tuple(t.requires_grad_() for t in leaves)

        def function(x: Tensor, h0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            given: Tensor | PackedSequence = x
            if packed:
                given = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            # torch.manual_seed keeps the stack for a GPU to come: this is called per element.
            torch.default_generator.manual_seed(5)
            weights = dict(zip(names, rest, strict=True))
            output, h_n = functional_call(module, weights, (given, h0), call)
            return output.data if packed else output, h_n

        self.function: Callable[..., tuple[Tensor, ...]] = function


@pytest.mark.parametrize(("coupled", "name"), CASES)
def test_gradcheck(coupled: bool, name: str) -> None:
    checked = Checked(coupled, name)
    backend = fastrnn.explain(checked.module, checked.inputs[0]).backend
    assert backend == "cpu"
    assert gradcheck(checked.function, checked.inputs)


@pytest.mark.parametrize(("coupled", "name"), CASES)
def test_gradgradcheck(coupled: bool, name: str) -> None:
    """Along random directions; element by element for masks of all kinds. What is not there is
    each layer's own matter, however layers are put together."""
    checked = Checked(coupled, name)
    alone = name in ("depth 1", "depth 2", "recompute")
    fast = name != "recompute"
    assert gradgradcheck(
        checked.function, checked.inputs, check_undefined_grad=alone, fast_mode=fast
    )


@pytest.mark.parametrize("wanted", ["x", "state", "weights"])
def test_gradgradcheck_of_part_of_the_inputs(wanted: str) -> None:
    kept = {"x": range(1), "state": range(1, 2), "weights": range(2, 99)}[wanted]
    for output in range(2):
        checked = Checked(True, "lengths")
        inputs = tuple(t.detach().requires_grad_(i in kept) for i, t in enumerate(checked.inputs))
        function = checked.function
        assert gradgradcheck(lambda *a, f=function, o=output: f(*a)[o], inputs, fast_mode=True)


def penalty(checked: Checked, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """First gradients of sum(output^2), and those of a gradient penalty on x."""
    loss = sum((o**2).sum() for o in checked.function(*inputs))
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return [first, torch.autograd.grad((first[0] ** 2).sum(), inputs)]


@pytest.mark.parametrize(("coupled", "name"), CASES)
def test_double_backward_in_float32(coupled: bool, name: str) -> None:
    """A gradient penalty by the rule against the reference backend, without random masks: those of
    float32 and float64 are not drawn alike."""
    checked = Checked(coupled, name, torch.float32)
    checked.module.variational_input = checked.module.variational_state = 0.0
    got = penalty(checked, checked.inputs)
    with fastrnn.use_backend("reference"):
        same = penalty(checked, checked.inputs)
        checked.module.double()
        wide = tuple(t.detach().double().requires_grad_() for t in checked.inputs)
        ref64 = penalty(checked, wide)
    for order in (0, 1):
        for i, value in enumerate(got[order]):
            label = f"order {order + 1}, input {i}"
            assert_close_by_rule(label, value, ref64[order][i], same[order][i])


def test_third_derivative() -> None:
    checked = Checked(False, "untied")
    x, *rest = checked.inputs

    def slope(x: Tensor) -> Tensor:
        y = checked.function(x, *rest)[0].sum()
        return torch.autograd.grad(y, x, create_graph=True)[0]

    assert gradgradcheck(slope, (x,))


def test_backward_in_eval() -> None:
    checked = Checked(True, "depth 3")
    gradients = []
    for mode in (True, False):
        checked.module.train(mode)
        outputs = checked.function(*checked.inputs)
        gradients.append(torch.autograd.grad(sum(o.sum() for o in outputs), checked.inputs))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_retained_graph_gives_the_same_bits() -> None:
    checked = Checked(True, "recompute", torch.float32)
    loss = sum(o.sum() for o in checked.function(*checked.inputs))
    first = torch.autograd.grad(loss, checked.inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, checked.inputs), strict=True):
        assert torch.equal(a, b)
