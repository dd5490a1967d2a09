"""Parameters, state_dict, initial values, and changes of the weights between two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import Kind, assert_same_bits, compare, outcome, raised, results, twins
from torch import nn

import fastrnn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "bidirectional": True},
]


@pytest.fixture(params=OPTIONS, ids=lambda o: "-".join(o) or "plain")
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def test_names_shapes_order(any_kind: Kind, options: dict) -> None:
    ours, theirs = any_kind.ours(5, 7, **options), any_kind.theirs(5, 7, **options)
    for listing in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(ours, listing)()] == [
            n for n, _ in getattr(theirs, listing)()
        ]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.shape, mine.dtype, mine.requires_grad) == (other.shape, other.dtype, True)
        assert type(mine) is nn.Parameter


def test_state_dict_loads_strictly_both_ways(any_kind: Kind, options: dict) -> None:
    ours, theirs = any_kind.ours(5, 7, **options), any_kind.theirs(5, 7, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for target, source in ((ours, theirs), (theirs, ours)):
        for p in source.parameters():
            nn.init.normal_(p)
        assert (
            str(target.load_state_dict(source.state_dict(), strict=True))
            == "<All keys matched successfully>"
        )
        assert_same_bits(dict(target.named_parameters()), dict(source.named_parameters()))


def test_state_dict_assign(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7)
    replacement = {k: torch.randn_like(v) for k, v in theirs.state_dict().items()}
    x = torch.randn(4, 2, 5)
    results(ours, x)
    for module in (ours, theirs):
        module.load_state_dict({k: v.clone() for k, v in replacement.items()}, assign=True)
    compare(ours, theirs, outcome, x)


def test_state_dict_errors_read_the_same(any_kind: Kind) -> None:
    ours, theirs = any_kind.ours(5, 7), any_kind.theirs(5, 7)
    for state in (
        {},
        any_kind.theirs(5, 8).state_dict(),
        any_kind.theirs(5, 7, num_layers=2).state_dict(),
    ):
        assert raised(ours.load_state_dict, state) == raised(theirs.load_state_dict, state)


def test_same_seed_same_initial_values(any_kind: Kind, options: dict) -> None:
    built, rng = [], []
    for build in (any_kind.ours, any_kind.theirs):
        torch.manual_seed(5)
        built.append(build(5, 7, **options))
        rng.append(torch.get_rng_state())
    assert_same_bits(built[0].state_dict(), built[1].state_dict())
    assert torch.equal(*rng)


def test_reset_parameters_draws_like_torch(any_kind: Kind, options: dict) -> None:
    ours, theirs = any_kind.ours(5, 7, **options), any_kind.theirs(5, 7, **options)
    for module in (ours, theirs):
        torch.manual_seed(6)
        module.reset_parameters()
    assert_same_bits(ours.state_dict(), theirs.state_dict())


def test_reset_parameters_of_a_subclass_with_a_child(any_kind: Kind) -> None:
    """Whatever the child is called: only the layer's own norms are not drawn."""
    built = []
    for module in twins(any_kind, 5, 7):
        module.ln_head = nn.Linear(7, 3)
        torch.manual_seed(6)
        module.reset_parameters()
        built.append(module.state_dict())
    assert_same_bits(*built)


def test_flatten_parameters_is_safe_anywhere(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2)
    x = torch.randn(3, 2, 5)
    assert ours.flatten_parameters() is None
    before = outcome(ours, x)
    ours.flatten_parameters()
    with torch.no_grad():
        ours.flatten_parameters()
    assert_same_bits(before, outcome(ours, x))
    ours.half().flatten_parameters()
    ours.to("meta").flatten_parameters()


@pytest.mark.parametrize(
    "module, theirs",
    [
        (lambda: fastrnn.LSTM(3, 4, proj_size=2), True),
        (lambda: fastrnn.GRU(3, 4, reset_after=False), True),
        (lambda: fastrnn.RNN(3, 4), True),
        (lambda: fastrnn.LSTM(3, 4, layer_norm=True), False),
        (lambda: fastrnn.RHN(3, 4), False),
        (lambda: fastrnn.BNLSTM(3, 4, max_length=2), False),
    ],
)
def test_flatten_parameters_does_what_cudnn_needs(
    module: Callable[[], Any], theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.nn's own puts them into one piece on a GPU; what cuDNN lacks is left alone."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", asked.append)
    built = module()
    asked.clear()
    built.flatten_parameters()
    assert asked == ([built] if theirs else [])


def test_module_switches(any_kind: Kind) -> None:
    module = any_kind.ours(5, 7)
    assert module.eval() is module
    assert not module.training
    assert module.train() is module
    assert module.requires_grad_(False) is module
    assert not any(p.requires_grad for p in module.parameters())
    assert module.float() is module
    assert module.zero_grad() is None


def double_in_place(module: Any) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


def double_through_data(module: Any) -> None:
    for p in module.parameters():
        p.data.mul_(2)


def replace_data(module: Any) -> None:
    for p in module.parameters():
        p.data = p.data * 2


def replace_parameters(module: Any) -> None:
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * 2))


def replace_in_dictionary(module: Any) -> None:
    for name, p in list(module.named_parameters()):
        module._parameters[name] = nn.Parameter(p.detach() * 2)


def write_vector(module: Any) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, module.parameters())


def optimiser_step(module: Any) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0, foreach=False)
    for p in module.parameters():
        p.grad = -p.detach().clone()
    optimiser.step()


def foreach_step(module: Any) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0, foreach=True)
    for p in module.parameters():
        p.grad = -p.detach().clone()
    optimiser.step()


def reload(module: Any) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [
        double_in_place,
        double_through_data,
        replace_data,
        replace_parameters,
        replace_in_dictionary,
        write_vector,
        optimiser_step,
        foreach_step,
        reload,
    ],
)
def test_changed_weights_are_seen(any_kind: Kind, change: Callable[[Any], None]) -> None:
    """A call uses the weights as they are at its time, whatever was cached before."""
    ours, theirs = twins(any_kind, 5, 7, num_layers=2)
    x = torch.randn(4, 2, 5)
    results(ours, x)
    change(ours)
    change(theirs)
    compare(ours, theirs, results, x)
    compare(ours, theirs, outcome, x)


def test_training_follows_torch_step_by_step(any_kind: Kind) -> None:
    """Ten optimiser steps in float64: the two loss curves stay together."""
    ours, theirs = twins(any_kind, 4, 6, num_layers=2, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    curves = []
    for module in (ours, theirs):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        losses = []
        for _ in range(10):
            optimiser.zero_grad()
            loss = module(x)[0].square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(curves[0], curves[1])
    assert curves[0][-1] < curves[0][0]
