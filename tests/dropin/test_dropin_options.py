"""Bad lengths, reset, return_cells and step: what the error says, and that nothing is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import (
    KINDS,
    Kind,
    assert_same_bits,
    compare,
    leaf,
    loss_of,
    outcome,
    raised,
    random_packed,
    random_state,
    results,
    tensors,
    twins,
)
from torch import Tensor

# Batches are T=4, N=3, I=5.
X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))
NAN = float("nan")

# What is passed -> words that the message must contain: the argument, what came, what was expected.
BAD_LENGTHS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "over_T": ([4, 5, 1], ("5", "T=4")),
    "far_over_T": (torch.tensor([4, 2**40, 1]), (str(2**40), "T=4")),
    "zero": ([4, 0, 1], ("0", "T=4")),
    "negative": ([4, -2, 1], ("-2", "T=4")),
    "too_few": ([4, 2], ("(2,)", "N=3")),
    "too_many": ([4, 2, 1, 1], ("(4,)", "N=3")),
    "empty": ([], ("(0,)", "N=3")),
    "two_dimensional": (torch.ones(3, 1, dtype=torch.int64), ("(3, 1)", "N=3")),
    "scalar": (torch.tensor(3), ("()", "N=3")),
    "int": (3, ("int", "N=3")),
    "string": ("432", ("str", "N=3")),
    "float_list": ([4.0, 2.0, 1.0], ("4.0", "integers")),
    "nan": ([4, NAN, 1], ("nan", "integers")),
    "infinite": ([4, float("inf"), 1], ("inf", "integers")),
    "float_tensor": (torch.tensor([4.0, 2.0, 1.0]), ("torch.float32", "integers")),
    "nan_tensor": (torch.tensor([4.0, NAN, 1.0]), ("torch.float32", "integers")),
    "bool_tensor": (torch.tensor([True, True, True]), ("torch.bool", "integers")),
    "bools": ([True, True, True], ("True", "integers")),
    "none_inside": ([4, None, 1], ("None", "integers")),
    "meta": (torch.ones(3, dtype=torch.int64, device="meta"), ("meta", "cpu")),
}
BAD_RESET: dict[str, tuple[Any, tuple[str, ...]]] = {
    "transposed": (torch.zeros(3, 4, dtype=torch.bool), ("(3, 4)", "(4, 3)")),
    "one_step_short": (torch.zeros(3, 3, dtype=torch.bool), ("(3, 3)", "(4, 3)")),
    "with_features": (torch.zeros(4, 3, 5, dtype=torch.bool), ("(4, 3, 5)", "(4, 3)")),
    "one_dimensional": (torch.zeros(4, dtype=torch.bool), ("(4", "(4, 3)")),
    "float": (torch.zeros(4, 3), ("torch.float32", "bool")),
    "integer": (torch.zeros(4, 3, dtype=torch.int64), ("torch.int64", "bool")),
    "list": ([[False] * 3] * 4, ("list", "bool")),
    "number": (True, ("bool", "(4, 3)")),
    "meta": (torch.zeros(4, 3, dtype=torch.bool, device="meta"), ("meta", "cpu")),
}


def refused(module: Any, argument: str, words: tuple[str, ...], call: Callable[[], Any]) -> None:
    """`call` raises an error that names `argument`; afterwards everything is as it was."""
    before = outcome(module, X)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = set(module.__dict__)
    rng = torch.get_rng_state()
    error, text = raised(call)
    assert error in (ValueError, TypeError)
    assert argument in text
    for word in words:
        assert word in text, text
    assert torch.equal(torch.get_rng_state(), rng)
    assert set(module.__dict__) == attributes
    assert_same_bits(module.state_dict(), weights)
    assert_same_bits(outcome(module, X), before)


@pytest.mark.parametrize(("lengths", "words"), BAD_LENGTHS.values(), ids=BAD_LENGTHS.keys())
def test_bad_lengths(kind: Kind, lengths: Any, words: tuple[str, ...]) -> None:
    ours, _ = twins(kind, 5, 7, num_layers=2, bidirectional=True)
    refused(ours, "lengths", words, lambda: ours(X, lengths=lengths))


@pytest.mark.parametrize(("reset", "words"), BAD_RESET.values(), ids=BAD_RESET.keys())
def test_bad_reset(kind: Kind, reset: Any, words: tuple[str, ...]) -> None:
    ours, _ = twins(kind, 5, 7, num_layers=2, bidirectional=True)
    refused(ours, "reset", words, lambda: ours(X, reset=reset))


def test_bad_options_batch_first(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7, batch_first=True)
    flipped = X.transpose(0, 1)
    refused(ours, "lengths", ("N=3", "T=4"), lambda: ours(flipped, lengths=[5, 1, 1]))
    wrong = torch.zeros(4, 3, dtype=torch.bool)
    refused(ours, "reset", ("(4, 3)", "(3, 4)", "batch_first"), lambda: ours(flipped, reset=wrong))


def test_options_with_a_packed_sequence(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    packed = random_packed(5, [4, 2, 1])
    reset = torch.zeros(4, 3, dtype=torch.bool)
    refused(ours, "lengths", ("PackedSequence",), lambda: ours(packed, lengths=[4, 2, 1]))
    refused(ours, "reset", ("PackedSequence",), lambda: ours(packed, reset=reset))


def test_bad_options_unbatched(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    row = X[:, 0]
    refused(ours, "lengths", ("N=1",), lambda: ours(row, lengths=[2, 2]))
    refused(ours, "lengths", ("5", "T=4"), lambda: ours(row, lengths=[5]))
    refused(ours, "reset", ("3",), lambda: ours(row, reset=torch.zeros(3, dtype=torch.bool)))


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda k: k.id)
def test_return_cells_without_cells(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    refused(ours, "return_cells", ("cell state",), lambda: ours(X, return_cells=True))


def test_options_are_keyword_only(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    assert raised(lambda: ours(X, None, [4, 2, 1]))[0] is TypeError
    assert raised(lambda: ours(X, no_such_option=1))[0] is TypeError
    assert raised(lambda: kind.ours(5, 7, 1, *([True] * 9)))[0] is TypeError


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_constructor_extras(kind: Kind, value: Any) -> None:
    error, text = raised(lambda: kind.ours(5, 7, recompute=value))
    assert error is TypeError
    assert "recompute" in text
    assert type(value).__name__ in text
    if kind.name == "GRU":
        error, text = raised(lambda: kind.ours(5, 7, reset_after=value))
        assert error is TypeError
        assert "reset_after" in text


def test_bad_step(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7, num_layers=2)
    both, _ = twins(kind, 5, 7, bidirectional=True)
    refused(both, "bidirectional", ("one direction",), lambda: both.step(X[0]))
    refused(ours, "x_t", ("3D",), lambda: ours.step(X))
    refused(ours, "x_t", ("list",), lambda: ours.step([1.0] * 5))
    before = outcome(ours, X)
    for call in (
        lambda: ours.step(X[0][:, 1:]),
        lambda: ours.step(X[0].double()),
        lambda: ours.step(X[0], random_state(ours, 2)),
        lambda: ours.step(X[0], random_state(ours, None)),
        lambda: ours.step(X[0, 0], random_state(ours, 3)),
    ):
        assert issubclass(raised(call)[0], (RuntimeError, ValueError, TypeError))
    assert_same_bits(outcome(ours, X), before)


def test_good_options_still_work(any_kind: Kind) -> None:
    """lengths as a list or tensor equals the packed batch; all-False reset is the plain call."""
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    lengths = [2, 4, 1]
    expected = results(ours, X)
    assert_same_bits(results_with(ours, reset=torch.zeros(4, 3, dtype=torch.bool)), expected)
    assert_same_bits(results_with(ours, lengths=[4, 4, 4]), expected)

    def run(module: Any) -> dict[str, Tensor]:
        x = leaf(X, next(module.parameters()).dtype)
        module.zero_grad()
        if module is ours:
            output, state = module(x, lengths=lengths)
        else:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, state = module(packed)
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
        outputs = [output, *tensors(state)]
        loss_of(outputs).backward()
        named = {f"out[{i}]": t.detach() for i, t in enumerate(outputs)}
        return {**named, **{n: p.grad.clone() for n, p in module.named_parameters()}, "dx": x.grad}

    compare(ours, theirs, run)
    for form in (torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32), tuple(lengths)):
        assert_same_bits(results_with(ours, lengths=form), results_with(ours, lengths=lengths))


def results_with(module: Any, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {f"out[{i}]": t for i, t in enumerate(tensors(module(X, **options)))}
