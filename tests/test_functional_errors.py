"""Sizes and weights that the functions refuse, in the words of the modules' constructors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import functional

X = torch.zeros(4, 2, 3)
LSTM = list(fastrnn.LSTM(3, 5).parameters())
PROJECTED = list(fastrnn.LSTM(3, 5, proj_size=1).parameters())
BNLSTM = fastrnn.BNLSTM(3, 5, max_length=4)
STATISTICS = BNLSTM._statistics()


def bnlstm(input: Tensor, hx: None, weights: Any, **options: Any) -> Any:
    statistics = options.pop("flat_statistics", STATISTICS)
    return functional.bnlstm(input, hx, weights, statistics, **options)


FUNCTIONS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "lstm": (functional.lstm, LSTM),
    "gru": (functional.gru, list(fastrnn.GRU(3, 5).parameters())),
    "rnn": (functional.rnn, list(fastrnn.RNN(3, 5).parameters())),
    "rhn": (functional.rhn, list(fastrnn.RHN(3, 5, depth=2).parameters())),
    "bnlstm": (bnlstm, BNLSTM._weights()),
}


@pytest.mark.parametrize("weights", [LSTM, PROJECTED], ids=["plain", "projected"])
def test_proj_size(weights: list[Tensor]) -> None:
    message = "proj_size should be a positive integer or zero to disable projections"
    with pytest.raises(ValueError, match=message):
        nn.LSTM(3, 5, proj_size=-2)
    with pytest.raises(ValueError, match=f"{message}, got -2"):
        functional.lstm(X, None, weights, proj_size=-2)
    for bad in (1.0, True, "1", None):
        message = f"proj_size should be of type int, got: {type(bad).__name__}"
        with pytest.raises(TypeError, match=message):
            functional.lstm(X, None, weights, proj_size=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layers_below_one(name: str, number: int) -> None:
    function, weights = FUNCTIONS[name]
    for given in (weights, []):
        with pytest.raises(ValueError, match=f"num_layers.* got {number}"):
            function(X, None, given, num_layers=number)


@pytest.mark.parametrize("number", [1.0, 1.5, "1", None])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layers_that_are_no_integer(name: str, number: Any) -> None:
    function, weights = FUNCTIONS[name]
    with pytest.raises(TypeError, match=r"num_layers.*(of type|expected an) int"):
        function(X, None, weights, num_layers=number)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bools(name: str) -> None:
    """torch.nn's constructors, and so ours of the same name, take True for one layer."""
    function, weights = FUNCTIONS[name]
    if hasattr(nn, name.upper()):
        assert getattr(nn, name.upper())(3, 5, num_layers=True).num_layers is True
        assert function(X, None, weights, num_layers=True)[0].shape == (4, 2, 5)
        return
    for option in ("num_layers", *["first_step"] * (name == "bnlstm")):
        with pytest.raises(TypeError, match=rf"{option}: got True \(bool\), expected an int"):
            function(X, None, weights, **{option: True})


def test_first_steps_that_are_no_integer() -> None:
    with pytest.raises(TypeError, match=r"first_step: got 2.5 \(float\), expected an int"):
        bnlstm(X, None, BNLSTM._weights(), first_step=2.5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_that_are_no_tensors(name: str) -> None:
    function, weights = FUNCTIONS[name]
    with pytest.raises(TypeError, match=r"flat_weights: got NoneType, expected a list of tensors"):
        function(X, None, None)
    with pytest.raises(TypeError, match=r"flat_weights: got Parameter, expected a list"):
        function(X, None, weights[0])
    for index in range(len(weights)):
        given = [*weights[:index], None, *weights[index + 1 :]]
        message = rf"flat_weights\[{index}\]: got NoneType, expected a tensor"
        with pytest.raises(TypeError, match=message):
            function(X, None, given)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
            function(X, None, given)
    assert function(X, None, nn.ParameterList(weights))[0].shape == (4, 2, 5)


def test_statistics_that_are_no_tensors() -> None:
    weights = BNLSTM._weights()
    with pytest.raises(TypeError, match=r"flat_statistics\[6\]: got NoneType, expected a tensor"):
        bnlstm(X, None, weights, flat_statistics=[*STATISTICS[:6], None])
    with pytest.raises(RuntimeError, match=r"flat_statistics\[6\]: got shape \(\), expected 1 dim"):
        bnlstm(X, None, weights, flat_statistics=[*STATISTICS[:6], STATISTICS[6][0]])
    with pytest.raises(RuntimeError, match=r"flat_weights\[1\]: got shape \(\), expected 2 dim"):
        bnlstm(X, None, [weights[0], weights[1][0, 0], *weights[2:]])
