"""Copies, pickles, saved files, pickles of older torch versions, replicas."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dropin_cases import Kind, assert_same_bits, compare, outcome, raised, results, twins
from torch import nn

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))


def through_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_old_protocol(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module, protocol=2))


def through_torch_save(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture(
    params=[copy.deepcopy, through_pickle, through_old_protocol, through_torch_save],
    ids=lambda f: f.__name__,
)
def duplicate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_duplicate_behaves_like_the_original(
    any_kind: Kind, duplicate: Callable, used: bool
) -> None:
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
    ours, theirs = twins(any_kind, 6, 6, **options)
    ours.eval()
    if used:
        results(ours, X)
        outcome(ours, X)
    twin = duplicate(ours)
    assert type(twin) is type(ours)
    assert repr(twin) == repr(ours)
    assert not twin.training
    assert_same_bits(outcome(twin, X), outcome(ours, X))
    compare(twin, theirs.eval(), results, X)


def test_duplicate_is_independent(any_kind: Kind, duplicate: Callable) -> None:
    ours, _ = twins(any_kind, 6, 6)
    before = results(ours, X)
    twin = duplicate(ours)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}
    assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.dropout = 0.25
    assert results(twin, X)["out[0]"].abs().max() == 0
    assert ours.dropout == 0
    assert_same_bits(results(ours, X), before)


def test_duplicate_keeps_frozen_and_tied_weights(any_kind: Kind, duplicate: Callable) -> None:
    ours, _ = twins(any_kind, 6, 6, num_layers=2)
    ours.weight_hh_l1 = ours.weight_hh_l0
    ours.bias_ih_l0.requires_grad_(False)
    twin = duplicate(ours)
    assert twin.weight_hh_l1 is twin.weight_hh_l0
    assert not twin.bias_ih_l0.requires_grad
    assert_same_bits(outcome(twin, X), outcome(ours, X))


def test_use_leaves_nothing_in_the_pickle(any_kind: Kind) -> None:
    """What a call prepares (packed weights) is not part of the module's state."""
    ours, _ = twins(any_kind, 6, 6)
    size = len(pickle.dumps(ours))
    results(ours, X)
    assert len(pickle.dumps(ours)) == size
    assert set(ours.state_dict()) == set(ours._flat_weights_names)


def test_shallow_copy(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 6, 6)
    twin = copy.copy(ours)
    assert_same_bits(outcome(twin, X), outcome(ours, X))
    assert twin.weight_hh_l0 is ours.weight_hh_l0


def test_state_dict_through_a_file(any_kind: Kind, tmp_path: Path) -> None:
    ours, theirs = any_kind.ours(6, 6), any_kind.theirs(6, 6)
    torch.save(ours.state_dict(), tmp_path / "weights.pt")
    theirs.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    compare(ours, theirs, outcome, X)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours.load_state_dict(
        torch.load(tmp_path / "weights.pt", weights_only=True, mmap=True), assign=True
    )
    compare(ours, theirs, outcome, X)


def restored(module: Any, state: dict[str, Any]) -> Any:
    fresh = type(module).__new__(type(module))
    fresh.__setstate__(state)
    return fresh


def test_state_without_weak_references(any_kind: Kind) -> None:
    assert "_flat_weight_refs" not in any_kind.ours(6, 6).__getstate__()


def test_pickle_from_before_projections(kind: Kind) -> None:
    """torch < 1.8: no proj_size."""
    ours, _ = twins(kind, 6, 6, num_layers=2)
    state = ours.__getstate__()
    del state["proj_size"]
    old = restored(ours, state)
    assert old.proj_size == 0
    assert_same_bits(outcome(old, X), outcome(ours, X))


@pytest.mark.parametrize("bias", [True, False])
def test_pickle_with_weight_lists(kind: Kind, bias: bool) -> None:
    """torch < 1.4: `all_weights` holds names, or in the oldest the parameters themselves."""
    options = {"num_layers": 2, "bidirectional": True, "bias": bias}
    ours, _ = twins(kind, 6, 6, **options)
    names = ours.__getstate__()
    names["all_weights"] = names.pop("_all_weights")
    assert_same_bits(outcome(restored(ours, names), X), outcome(ours, X))

    lists = ours.__getstate__()
    for key in ("_all_weights", "_flat_weights", "_flat_weights_names"):
        lists.pop(key, None)
    lists["all_weights"] = ours.all_weights
    old = restored(ours, lists)
    assert old._flat_weights_names == ours._flat_weights_names
    assert_same_bits(outcome(old, X), outcome(ours, X))


def test_state_of_a_torch_module(any_kind: Kind) -> None:
    """A state pickled by torch.nn knows none of our own attributes."""
    ours, theirs = twins(any_kind, 6, 6, num_layers=2)
    adopted = restored(ours, theirs.__getstate__())
    assert repr(adopted) == repr(ours)
    compare(adopted, theirs, outcome, X)


def test_share_memory(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    assert all(w.is_shared() for w in ours._flat_weights)
    compare(ours, theirs, outcome, X)


def test_replica_for_data_parallel(any_kind: Kind) -> None:
    """What DataParallel does on each device: a replica whose weights are then plain tensors."""
    ours, theirs = twins(any_kind, 6, 6, num_layers=2)
    before = outcome(ours, X)

    def replicated(module: Any) -> Any:
        replica = module._replicate_for_data_parallel()
        assert replica._flat_weights is not module._flat_weights
        assert replica._flat_weights_names is not module._flat_weights_names
        for name, p in module.named_parameters():
            setattr(replica, name, p * 1)
        return replica

    def run(module: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = next(module.parameters()).dtype
        module.zero_grad()
        output, _ = replicated(module)(x.to(dtype))
        output.square().sum().backward()
        return {"output": output.detach(), **{n: p.grad for n, p in module.named_parameters()}}

    compare(ours, theirs, run, X)
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert_same_bits(outcome(ours, X), before)


def test_data_parallel_without_devices(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    compare(nn.DataParallel(ours), nn.DataParallel(theirs), results, X)


def test_non_leaf_weights_cannot_be_copied(kind: Kind) -> None:
    """deepcopy refuses a weight that carries a graph, with torch's own words."""
    texts = []
    for module in twins(kind, 6, 6):
        weight = module.weight_hh_l0
        del module.weight_hh_l0
        module.weight_hh_l0 = weight * 2
        texts.append(raised(copy.deepcopy, module))
    assert texts[0] == texts[1]
