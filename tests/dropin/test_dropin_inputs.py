"""Values, shapes and gradients for every form of input that torch.nn takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    compare,
    outcome,
    random_packed,
    random_state,
    results,
    tensors,
    twins,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three_layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "everything": {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
def test_batched(any_kind: Kind, options: dict, dtype: torch.dtype, with_state: bool) -> None:
    ours, theirs = twins(any_kind, 17, 33, dtype=dtype, **options)
    x = torch.randn((3, 6, 17) if ours.batch_first else (6, 3, 17), dtype=dtype)
    hx = random_state(ours, 3) if with_state else None
    compare(ours, theirs, results, x, hx)
    compare(ours, theirs, outcome, x, hx)


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
def test_unbatched(any_kind: Kind, options: dict, with_state: bool) -> None:
    ours, theirs = twins(any_kind, 5, 7, **options)
    hx = random_state(ours, None) if with_state else None
    compare(ours, theirs, results, torch.randn(6, 5), hx)
    compare(ours, theirs, outcome, torch.randn(6, 5), hx)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 4, 5), (9, 1, 5), (2, 17, 3)])
def test_small_and_odd_sizes(kind: Kind, shape: tuple[int, int, int]) -> None:
    for hidden in (1, 8, 31):
        ours, theirs = twins(kind, shape[2], hidden, bidirectional=True)
        compare(ours, theirs, outcome, torch.randn(shape), random_state(ours, shape[1]))


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
def test_packed(any_kind: Kind, options: dict, sort: bool, with_state: bool) -> None:
    ours, theirs = twins(any_kind, 5, 7, **options)
    packed = random_packed(5, [7, 4, 4, 1] if sort else [2, 7, 1, 4, 7], sort)
    batch = int(packed.batch_sizes[0])
    hx = random_state(ours, batch) if with_state else None
    compare(ours, theirs, results, packed, hx)
    compare(ours, theirs, outcome, packed, hx)


@pytest.mark.parametrize("lengths", [[3], [4, 4, 4], [5, 1], [1, 1]], ids=str)
def test_packed_special_lengths(kind: Kind, lengths: list[int]) -> None:
    ours, theirs = twins(kind, 5, 7, num_layers=2, bidirectional=True)
    compare(ours, theirs, outcome, random_packed(5, lengths, True))


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
def test_packed_output_describes_itself_like_the_input(any_kind: Kind, sort: bool) -> None:
    packed = random_packed(5, [4, 2, 1] if sort else [2, 4, 1], sort)
    for module in twins(any_kind, 5, 7):
        output, _ = module(packed)
        assert type(output) is PackedSequence
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            mine, given = getattr(output, name), getattr(packed, name)
            assert mine is None if given is None else torch.equal(mine, given)


def test_result_types(any_kind: Kind) -> None:
    for module in twins(any_kind, 5, 7):
        returned = module(torch.randn(3, 2, 5))
        assert type(returned) is tuple
        assert len(returned) == 2
        assert type(returned[1]) is (tuple if any_kind.has_cell_state else Tensor)


def test_keyword_arguments(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7)
    x, hx = torch.randn(3, 2, 5), random_state(ours, 2)
    for first, second in zip(tensors(ours(input=x, hx=hx)), tensors(ours(x, hx)), strict=True):
        assert torch.equal(first, second)
    assert len(tensors(theirs(input=x, hx=hx))) == len(tensors(ours(x, hx)))


def test_state_as_list() -> None:
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    x, hx = torch.randn(3, 2, 5), random_state(ours, 2)
    for first, second in zip(tensors(ours(x, list(hx))), tensors(ours(x, hx)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(any_kind: Kind, batch_first: bool) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn((0, 4, 5) if batch_first else (4, 0, 5))
    for hx in (None, random_state(ours, 0)):
        compare(ours, theirs, results, x, hx)
        compare(ours, theirs, outcome, x, hx)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(3, 6, 5).transpose(0, 1),
    "feature_stride_2": lambda: torch.randn(6, 3, 10)[..., ::2],
    "feature_slice": lambda: torch.randn(6, 3, 9)[..., 2:7],
    "time_stride_2": lambda: torch.randn(12, 3, 5)[::2],
    "expanded_batch": lambda: torch.randn(6, 1, 5).expand(6, 3, 5),
    "expanded_time": lambda: torch.randn(1, 3, 5).expand(6, 3, 5),
    "expanded_feature": lambda: torch.randn(6, 3, 1).expand(6, 3, 5),
    "feature_first": lambda: torch.randn(5, 3, 6).permute(2, 1, 0),
    "offset": lambda: torch.randn(6 * 3 * 5 + 1)[1:].reshape(6, 3, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_input_in_any_layout(any_kind: Kind, layout: Callable[[], Tensor]) -> None:
    ours, theirs = twins(any_kind, 5, 7)
    compare(ours, theirs, results, layout())
    compare(ours, theirs, outcome, layout())


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed"])
def test_state_in_any_layout(any_kind: Kind, layout: str) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "expanded":
            return t[:1, :1].expand_as(t)
        return (
            t.repeat(1, 1, 2)[..., ::2]
            if layout == "strided"
            else t.transpose(0, 1).clone().transpose(0, 1)
        )

    hx = random_state(ours, 3)
    hx = tuple(laid_out(t) for t in hx) if any_kind.has_cell_state else laid_out(hx)
    compare(ours, theirs, results, torch.randn(6, 3, 5), hx)
    compare(ours, theirs, outcome, torch.randn(6, 3, 5), hx)


def test_arguments_are_not_written_to(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2)
    x, hx = torch.randn(4, 3, 5), random_state(ours, 3)
    before = [t.clone() for t in (x, *tensors(hx))]
    outcome(ours, x, hx)
    results(ours, x, hx)
    for now, then in zip((x, *tensors(hx)), before, strict=True):
        assert torch.equal(now, then)


def test_outputs_share_no_memory_with_each_other(any_kind: Kind) -> None:
    """Writing into one output leaves the others, the weights and the next call as they were."""
    ours, _ = twins(any_kind, 5, 7)
    x, hx = torch.randn(4, 3, 5), random_state(ours, 3)
    with torch.no_grad():
        expected = [t.clone() for t in tensors(ours(x, hx))]
        for i in range(len(expected)):
            returned = tensors(ours(x, hx))
            returned[i].fill_(9.0)
            for j, value in enumerate(returned):
                assert i == j or torch.equal(value, expected[j])
        for value, before in zip(tensors(ours(x, hx)), expected, strict=True):
            assert torch.equal(value, before)


def test_inference_mode(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7)
    with torch.inference_mode():
        x = torch.randn(4, 3, 5)
        for first, second in zip(tensors(ours(x)), results(ours, x).values(), strict=True):
            assert first.is_inference()
            assert torch.equal(first, second)
    compare(ours, theirs, outcome, torch.randn(4, 3, 5))
