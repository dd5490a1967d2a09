"""Constructor, attributes and repr against torch.nn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from dropin_cases import KINDS, Kind, raised
from torch import nn

from tests.versions import OLD

SAME_TEXT: list[tuple[tuple, dict[str, Any]]] = [
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "0.5"}),
    ((3, 4), {"dropout": "half"}),
    ((3, 4), {"dropout": None}),
    ((3, 4), {"dropout": float("nan")}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"bias": None}),
    ((3, 4), {"batch_first": 1}),
    ((3, 4), {"batch_first": "yes"}),
    (("3", 4), {}),
    ((3.0, 4), {}),
    ((0, 4), {}),
    ((-1, 4), {}),
    ((3, "4"), {}),
    ((3, 4.0), {}),
    ((3, 0), {}),
    ((3, -1), {}),
    ((3, 4), {"num_layers": 0}),
    ((3, 4), {"num_layers": -2}),
    ((3, 4), {"num_layers": "2"}),
    ((3, 4), {"proj_size": 2, "num_layers": 0}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": 5}),
    ((3, 4), {"dtype": torch.int32}),
    ((3, 4), {"device": "nowhere"}),
]
SAME_TYPE: list[tuple[tuple, dict[str, Any]]] = [
    ((), {}),
    ((3,), {}),
    ((3, 4), {"no_such_argument": 1}),
    ((3, 4), {"input_size": 3}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "dropout": 0.5},
    {"bias": False},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 3, "dropout": 1, "bidirectional": True, "bias": False, "batch_first": True},
]


def label(value: Any) -> str | None:
    return (
        "-".join(f"{k}={v}" for k, v in value.items()) or "none"
        if isinstance(value, dict)
        else None
    )


def accepts(make: Any, args: tuple, options: dict) -> bool:
    """Whether the constructor of torch 2.6, which checks less, lets these pass."""
    try:
        make(*args, **options)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(("args", "options"), SAME_TEXT, ids=label)
def test_bad_argument_raises_what_torch_raises(kind: Kind, args: tuple, options: dict) -> None:
    if OLD and accepts(kind.theirs, args, options):
        assert accepts(kind.ours, args, options)
        return
    assert raised(lambda: kind.ours(*args, **options)) == raised(
        lambda: kind.theirs(*args, **options)
    )


@pytest.mark.parametrize(("args", "options"), SAME_TYPE, ids=label)
def test_bad_call_raises_the_same_type(kind: Kind, args: tuple, options: dict) -> None:
    ours = raised(lambda: kind.ours(*args, **options))
    assert ours[0] is raised(lambda: kind.theirs(*args, **options))[0]


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "Tanh", None, 3])
def test_bad_nonlinearity(nonlinearity: Any) -> None:
    rnn = Kind("rnn", "RNN")
    for options in (
        {"nonlinearity": nonlinearity},
        {"nonlinearity": nonlinearity, "hidden_size": 0},
    ):
        sizes = (3,) if "hidden_size" in options else (3, 4)
        assert raised(rnn.ours, *sizes, **options) == raised(rnn.theirs, *sizes, **options)
    assert raised(lambda: rnn.ours(3, 4, 1, nonlinearity)) == raised(
        lambda: rnn.theirs(3, 4, 1, nonlinearity)
    )


@pytest.mark.parametrize("name", ["GRU", "RNN"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_proj_size_is_only_for_lstm(name: str, proj_size: int) -> None:
    kind = Kind(name, name)
    expected = (ValueError, "proj_size argument is only supported for LSTM, not RNN or GRU")
    assert raised(lambda: kind.theirs(3, 4, proj_size=proj_size)) == expected
    assert raised(lambda: kind.ours(3, 4, proj_size=proj_size)) == expected


def test_dropout_on_one_layer_warns_like_torch(kind: Kind) -> None:
    texts = []
    for build in (kind.ours, kind.theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build(3, 4, dropout=0.25)
        texts.append([(w.category, str(w.message)) for w in caught])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_attributes(any_kind: Kind, options: dict) -> None:
    ours, theirs = any_kind.ours(5, 7, **options), any_kind.theirs(5, 7, **options)
    names = [*nn.RNNBase.__constants__, "_flat_weights_names", "_all_weights", "training"]
    names += ["nonlinearity"] if any_kind.name == "RNN" else []
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name


def test_constants_are_torchs(kind: Kind) -> None:
    assert set(kind.theirs(2, 3).__constants__) <= set(kind.ours(2, 3).__constants__)


def test_weight_lists_hold_the_parameters(any_kind: Kind) -> None:
    module = any_kind.ours(5, 7, num_layers=2, bidirectional=True)
    parameters = list(module.parameters())
    flat = [w for layer in module.all_weights for w in layer]
    for found in (module._flat_weights, flat, [ref() for ref in module._flat_weight_refs]):
        assert len(found) == len(parameters)
        assert all(a is b for a, b in zip(found, parameters, strict=True))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("LSTM", (3, 5, 2, False, True, 0.5, True, 2)),
        ("GRU", (3, 5, 2, False, True, 0.5, True)),
        ("RNN", (3, 5, 2, "relu", False, True, 0.5, True)),
        ("RNN", (3, 5, 1, "tanh")),
    ],
)
def test_positional_arguments(name: str, args: tuple) -> None:
    kind = Kind(name, name)
    ours, theirs = kind.ours(*args), kind.theirs(*args)
    assert repr(ours) == repr(theirs)
    for attribute in nn.RNNBase.__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_repr(any_kind: Kind, options: dict) -> None:
    ours, theirs = any_kind.ours(5, 7, **options), any_kind.theirs(5, 7, **options)
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_argument(kind: Kind, dtype: torch.dtype) -> None:
    assert {p.dtype for p in kind.ours(3, 4, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("meta")])
def test_device_argument(kind: Kind, device: Any) -> None:
    assert {p.device for p in kind.ours(3, 4, device=device).parameters()} == {torch.device(device)}


def test_default_dtype_and_device_context(kind: Kind) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in kind.ours(3, 4).parameters())
    torch.set_default_dtype(torch.float64)
    try:
        assert all(p.dtype == torch.float64 for p in kind.ours(3, 4).parameters())
    finally:
        torch.set_default_dtype(torch.float32)


def test_classes_build_on_torchs_base() -> None:
    for kind in KINDS:
        assert isinstance(kind.ours(2, 3), nn.RNNBase)


def test_unrecognised_mode_is_refused(kind: Kind) -> None:
    """Only the base class takes a mode; it stays torch's."""
    base = next(c for c in type(kind.ours(2, 3)).__mro__ if c is nn.RNNBase)
    assert raised(lambda: base("LSTMM", 2, 3)) == (ValueError, "Unrecognized RNN mode: LSTMM")
