"""Weights that are not plain parameters: normed, parametrised, pruned, tied, frozen, replaced."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import (
    PROJECTED,
    Kind,
    assert_alike,
    assert_same_bits,
    compare,
    gradients,
    leaf,
    loss_of,
    outcome,
    raised,
    random_state,
    results,
    tensors,
    twins,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))


def compare_changed(kind: Kind, change: Callable[[Any], Any], **options: Any) -> tuple[Any, Any]:
    """Apply `change` to modules of both libraries and compare inference and training, twice."""
    ours, theirs = twins(kind, 6, 6, num_layers=2, **options)
    wide = copy.deepcopy(theirs).double()
    results(ours, X)
    for module in (ours, theirs, wide):
        torch.manual_seed(2)
        change(module)
    for module in (ours, wide):
        module.load_state_dict(theirs.state_dict())
    for run in (outcome, results, outcome):
        assert_alike(run(ours, X), run(wide, X), run(theirs, X))
    return ours, theirs


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Skew(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu(1) - weight.triu(1).T


def test_old_weight_norm(any_kind: Kind) -> None:
    def change(module: Any) -> None:
        nn.utils.weight_norm(module, "weight_hh_l0")
        nn.utils.weight_norm(module, "weight_ih_l1", dim=None)

    ours, _ = compare_changed(any_kind, change)
    assert "weight_hh_l0_g" in dict(ours.named_parameters())
    nn.utils.remove_weight_norm(ours, "weight_hh_l0")
    nn.utils.remove_weight_norm(ours, "weight_ih_l1")
    assert {n for n, _ in ours.named_parameters()} == set(ours._flat_weights_names)
    outcome(ours, X)


def test_parametrized_weight_norm(any_kind: Kind) -> None:
    def change(module: Any) -> None:
        for name in ("weight_hh_l0", "weight_ih_l1", "bias_hh_l1"):
            parametrizations.weight_norm(module, name)

    compare_changed(any_kind, change)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_old_spectral_norm(any_kind: Kind, mode: str) -> None:
    compare_changed(
        any_kind, lambda m: nn.utils.spectral_norm(m, "weight_hh_l0").train(mode == "train")
    )


def test_parametrized_spectral_norm(any_kind: Kind) -> None:
    """In training every reading of the weight improves it: only eval compares numbers."""
    ours, _ = compare_changed(
        any_kind, lambda m: parametrizations.spectral_norm(m, "weight_hh_l1").eval()
    )
    ours.train()
    for _ in range(30):
        outcome(ours, X)
    torch.testing.assert_close(torch.linalg.matrix_norm(ours.weight_hh_l1, 2), torch.tensor(1.0))


def test_orthogonal() -> None:
    def change(module: Any) -> None:
        parametrizations.orthogonal(module, "weight_hh_l0", use_trivialization=False)

    compare_changed(Kind("rnn", "RNN"), change)


def test_parametrize_and_remove(any_kind: Kind) -> None:
    def change(module: Any) -> None:
        parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
        parametrize.register_parametrization(module, "bias_ih_l1", Doubled())

    ours, _ = compare_changed(any_kind, change)
    inside = outcome(ours, X)
    with parametrize.cached():
        assert_same_bits(inside, outcome(ours, X))
    for leave in (True, False):
        name = "weight_hh_l0" if leave else "bias_ih_l1"
        parametrize.remove_parametrizations(ours, name, leave_parametrized=leave)
    assert {n for n, _ in ours.named_parameters()} == set(ours._flat_weights_names)
    outcome(ours, X)


def test_parametrize_square_recurrence() -> None:
    compare_changed(
        Kind("rnn", "RNN"),
        lambda m: parametrize.register_parametrization(m, "weight_hh_l1", Skew()),
    )


def test_prune(any_kind: Kind) -> None:
    def change(module: Any) -> None:
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        prune.random_unstructured(module, "weight_ih_l1", amount=3)
        prune.ln_structured(module, "weight_ih_l0", amount=2, n=2, dim=1)

    ours, theirs = compare_changed(any_kind, change)
    for module in (ours, theirs):
        for name in ("weight_hh_l0", "weight_ih_l1", "weight_ih_l0"):
            prune.remove(module, name)
    compare(ours, theirs, outcome, X)


def test_prune_again_after_use(any_kind: Kind) -> None:
    """A tighter mask takes effect at the next call."""
    ours, theirs = twins(any_kind, 6, 6)
    wide = copy.deepcopy(theirs).double()
    for amount in (0.3, 0.6):
        for module in (ours, theirs, wide):
            prune.l1_unstructured(module, "weight_hh_l0", amount=amount)
        assert_alike(results(ours, X), results(wide, X), results(theirs, X))
        assert_alike(outcome(ours, X), outcome(wide, X), outcome(theirs, X))


def test_tied_layers(kind: Kind) -> None:
    def change(module: Any) -> None:
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{name}_l1", getattr(module, f"{name}_l0"))

    ours, theirs = compare_changed(kind, change)
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 4


def test_tied_directions_and_roles(kind: Kind) -> None:
    def change(module: Any) -> None:
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.weight_hh_l0 = module.weight_ih_l0
        module.bias_ih_l0 = module.bias_hh_l0

    compare_changed(kind, change, bidirectional=True)


def test_weights_shared_by_two_modules(any_kind: Kind) -> None:
    def pair(build: Callable[..., Any], state: dict) -> nn.Sequential:
        first, second = build(6, 6), build(6, 6)
        first.load_state_dict(state)
        for name in second._flat_weights_names:
            setattr(second, name, getattr(first, name))
        return nn.ModuleList([first, second])

    def run(modules: nn.ModuleList, x: Tensor) -> dict[str, Tensor]:
        dtype = next(modules.parameters()).dtype
        modules.zero_grad()
        outputs = [m(x.to(dtype))[0] for m in modules]
        loss_of(outputs).backward()
        return gradients(modules)

    state = any_kind.theirs(6, 6).state_dict()
    compare(pair(any_kind.ours, state), pair(any_kind.theirs, state), run, X)


def frozen_subsets(kind: Kind) -> list[tuple[str, ...]]:
    names = list(dict(kind.theirs(6, 6).named_parameters()))
    return [s for k in range(1, len(names) + 1) for s in itertools.combinations(names, k)]


def test_any_frozen_subset(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    wide = copy.deepcopy(theirs).double()
    hx = random_state(ours, 3)
    for frozen in frozen_subsets(any_kind):
        for module in (ours, theirs, wide):
            for name, p in module.named_parameters():
                p.requires_grad_(name not in frozen)
        assert_alike(outcome(ours, X, hx), outcome(wide, X, hx), outcome(theirs, X, hx))


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_hh_l1"])
def test_deleted_and_reassigned_weight(any_kind: Kind, name: str) -> None:
    def as_parameter(module: Any) -> None:
        weight = getattr(module, name)
        delattr(module, name)
        assert not hasattr(module, name)
        setattr(module, name, nn.Parameter(weight.detach() * 3))

    def as_tensor(module: Any) -> None:
        weight = getattr(module, name).detach()
        delattr(module, name)
        setattr(module, name, weight * 3)

    compare_changed(any_kind, as_parameter)
    ours, theirs = twins(any_kind, 6, 6, num_layers=2)
    wide = copy.deepcopy(theirs).double()
    for module in (ours, theirs, wide):
        as_tensor(module)
    assert_alike(results(ours, X), results(wide, X), results(theirs, X))
    assert_alike(outcome(ours, X), outcome(wide, X), outcome(theirs, X))


def test_weight_drop_pattern(any_kind: Kind) -> None:
    """AWD-LSTM: a raw parameter, and a fresh masked tensor assigned before every call."""

    def change(module: Any) -> None:
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.detach()))

    def run(module: Any, seed: int) -> dict[str, Tensor]:
        mask = torch.rand(
            module.weight_hh_l0_raw.shape, generator=torch.Generator().manual_seed(seed)
        )
        module.weight_hh_l0 = module.weight_hh_l0_raw * (mask > 0.5)
        return outcome(module, X)

    ours, theirs = twins(any_kind, 6, 6)
    wide = copy.deepcopy(theirs).double()
    for module in (ours, theirs, wide):
        change(module)
    for seed in (1, 2):
        got, same, ref64 = (run(m, seed) for m in (ours, theirs, wide))
        assert "dweight_hh_l0_raw" in got
        assert_alike(got, ref64, same)


def test_functional_call(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6, num_layers=2, bidirectional=True)
    before = outcome(ours, X)
    weights = {n: torch.randn_like(p) / 3 for n, p in ours.named_parameters()}
    partial = {"weight_hh_l0": weights["weight_hh_l0"]}

    def run(module: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        module.zero_grad()
        leaves = {n: leaf(w, dtype) for n, w in given.items()}
        outputs = tensors(functional_call(module, leaves, (X.to(dtype),)))
        loss_of(outputs).backward()
        found = {f"d{n}": w.grad for n, w in leaves.items()}
        return {**found, **gradients(module), "output": outputs[0].detach()}

    for given in (weights, partial, weights):
        compare(ours, theirs, run, given)
    assert_same_bits(outcome(ours, X), before)


def test_functional_call_without_gradients(any_kind: Kind) -> None:
    """Weights put in for one call do not stay behind in anything that was prepared from them."""
    ours, theirs = twins(any_kind, 6, 6)

    def run(module: Any, factor: float) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        given = {n: p.detach() * factor for n, p in module.named_parameters()}
        with torch.no_grad():
            returned = functional_call(module, given, (X.to(dtype),))
        return {f"out[{i}]": t for i, t in enumerate(tensors(returned))}

    for factor in (1.0, 2.0, 0.5):
        compare(ours, theirs, run, factor)
        compare(ours, theirs, results, X)


def test_projected_weight_can_be_frozen_and_replaced() -> None:
    ours, theirs = twins(PROJECTED, 6, 6)
    for module in (ours, theirs):
        module.weight_hr_l0 = nn.Parameter(torch.eye(3, 6))
        module.weight_hr_l0.requires_grad_(False)
    compare(ours, theirs, outcome, X)


def test_mixed_dtypes_are_refused(kind: Kind) -> None:
    for module in twins(kind, 6, 6):
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().double())
        assert issubclass(raised(module, X)[0], (RuntimeError, ValueError, TypeError))
