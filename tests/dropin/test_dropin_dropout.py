"""Dropout between the layers, and the random numbers that it draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    assert_same_bits,
    compare,
    outcome,
    raised,
    random_packed,
    random_state,
    results,
    twins,
)
from torch import Tensor, nn


def seeded_outcome(module: Any, *args: Any) -> dict[str, Tensor]:
    torch.manual_seed(8)
    return outcome(module, *args)


def relu_of_ones(p: float, hidden: int = 40) -> Any:
    """A two-layer module whose output is the dropout factor: layer 0 gives ones, layer 1 copies."""
    module = Kind("rnn", "RNN").ours(1, hidden, 2, "relu", dropout=p)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        module.bias_ih_l0.fill_(1)
        nn.init.eye_(module.weight_ih_l1)
    return module


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropped_fraction_and_scale(p: float) -> None:
    module = relu_of_ones(p)
    output, _ = module(torch.zeros(20, 10, 1))
    dropped = output == 0
    assert torch.allclose(output[~dropped], torch.tensor(1 / (1 - p)))
    deviation = (p * (1 - p) / output.numel()) ** 0.5
    assert abs(dropped.float().mean() - p) < 5 * deviation
    for axis in range(3):
        assert dropped.float().mean(axis).std() > 0, "the mask is shared along an axis"


def test_backward_uses_the_mask_of_forward(kind: Kind) -> None:
    """With weight_ih_l1 at zero, its gradient is zero exactly where layer 0 was dropped."""
    module = kind.ours(3, 400, num_layers=2, dropout=0.25)
    with torch.no_grad():
        module.weight_ih_l1.zero_()
    x = torch.randn(1, 1, 3)
    kept = outcome(module.eval(), x)["dweight_ih_l1"]
    ratio = outcome(module.train(), x)["dweight_ih_l1"] / kept
    alive = kept.abs() > 1e-6
    dropped = alive & (ratio.abs() < 1e-3)
    columns = dropped.sum(0)[alive.any(0)]
    assert torch.allclose(ratio[alive & ~dropped], torch.tensor(1 / 0.75), rtol=1e-3)
    assert torch.equal(columns > 0, columns == alive.sum(0)[alive.any(0)])
    assert 0.1 < (columns > 0).float().mean() < 0.4


def test_last_layer_and_states_are_not_dropped(kind: Kind) -> None:
    """Output equals h_n at the last step: dropout stands between layers only."""
    module = kind.ours(3, 8, num_layers=2, dropout=0.5)
    output, state = module(torch.randn(6, 4, 3))
    hidden = state[0] if kind.has_cell_state else state
    assert torch.equal(output[-1], hidden[-1])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_same_seed_same_masks_as_torch(any_kind: Kind, packed: bool) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=3, dropout=0.5, bidirectional=True)
    x = random_packed(5, [4, 6, 1]) if packed else torch.randn(6, 3, 5)
    compare(ours, theirs, seeded_outcome, x, random_state(ours, 3))


@pytest.mark.parametrize("batch_first", [False, True])
def test_same_bits_twice_under_one_seed(any_kind: Kind, batch_first: bool) -> None:
    ours, _ = twins(
        any_kind, 17, 33, num_layers=3, dropout=0.5, bidirectional=True, batch_first=batch_first
    )
    x = torch.randn(6, 3, 17)
    first = seeded_outcome(ours, x)
    assert_same_bits(first, seeded_outcome(ours, x))
    assert not torch.equal(first["out[0]"], outcome(ours, x)["out[0]"])


def test_probability_one(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=3, dropout=1.0, bidirectional=True)
    compare(ours, theirs, outcome, torch.randn(6, 3, 5), random_state(ours, 3))
    compare(ours, theirs, outcome, random_packed(5, [2, 5, 1]))


def test_identity_in_eval(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=3, dropout=0.5)
    x = torch.randn(6, 3, 5)
    compare(ours.eval(), theirs.eval(), outcome, x)
    compare(ours, theirs, results, x)
    without = any_kind.ours(5, 7, num_layers=3)
    without.load_state_dict(ours.state_dict())
    assert_same_bits(outcome(ours, x), outcome(without, x))


def test_drawn_without_gradients_too(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2, dropout=0.5)
    x = torch.randn(6, 3, 5)
    assert not torch.equal(results(ours, x)["out[0]"], results(ours.eval(), x)["out[0]"])


def test_changed_at_run_time(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, dropout=0.9)
    x = torch.randn(6, 3, 5)
    outcome(ours, x)
    for p in (0.0, 1.0, 0.3, 1):
        ours.dropout = theirs.dropout = p
        compare(ours, theirs, seeded_outcome, x)
        assert ours.extra_repr() == theirs.extra_repr()


def test_out_of_range_at_run_time(kind: Kind) -> None:
    ours, theirs = twins(kind, 5, 7, num_layers=2)
    x = torch.randn(6, 3, 5)
    for p in (1.5, -0.5, float("nan")):
        ours.dropout = theirs.dropout = p
        expected = raised(theirs, x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert [raised(ours, x) for _ in range(3)] == [expected] * 3
        compare(ours.eval(), theirs.eval(), results, x)
        for module in (ours, theirs):
            module.train()


def test_switched_between_train_and_eval(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, dropout=0.5)
    x = torch.randn(6, 3, 5)
    for training in (True, False, True):
        compare(ours.train(training), theirs.train(training), seeded_outcome, x)


def test_generator_is_left_alone_unless_needed(any_kind: Kind) -> None:
    for options in ({"num_layers": 2}, {"num_layers": 1}):
        module = any_kind.ours(5, 7, **options)
        before = torch.get_rng_state()
        outcome(module, torch.zeros(4, 3, 5))
        assert torch.equal(before, torch.get_rng_state())
    module = any_kind.ours(5, 7, num_layers=2, dropout=0.5).eval()
    before = torch.get_rng_state()
    outcome(module, torch.zeros(4, 3, 5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_no_effect_on_one_layer(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7, dropout=0.5)
    compare(ours, theirs, outcome, torch.randn(6, 3, 5))


def test_deterministic_mode_changes_nothing(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2, dropout=0.5, bidirectional=True)
    x = torch.randn(6, 3, 5)
    torch.use_deterministic_algorithms(False)
    loose = seeded_outcome(ours, x)
    torch.use_deterministic_algorithms(True)
    assert_same_bits(loose, seeded_outcome(ours, x))
