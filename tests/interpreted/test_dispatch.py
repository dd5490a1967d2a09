"""What Triton is given unasked: the tensors are on the CPU and said to be on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import dispatch
from fastrnn.backends import Problem
from fastrnn.gpu import choice, trial


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fastrnn.backends._triton_gpu", lambda ordinal: "")
    monkeypatch.setattr(choice, "where", lambda ordinal: torch.device("cpu"))
    choice.forget()
    yield
    choice.forget()


FAMILIES: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float32, "directions": 2},
    {"cell": "gru", "dtype": torch.float16},
    {"cell": "gru_reset_before"},
    {"cell": "rnn_relu", "regularisers": "zoneout 0.1"},
    {"proj_size": 12},
    {"regularisers": "zoneout 0.1", "dtype": torch.float32},
    {"cell": "rhn", "gates": 2, "depth": 2},
    {"cell": "bnlstm", "dtype": torch.float32, "given": torch.bfloat16},
]


def problem(**changes: object) -> Problem:
    usual = Problem("lstm", "cuda", torch.bfloat16, True, 200, 4, 3, 20, 0, 1, 1, lengths=True)
    return usual._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
def test_every_family_passes_its_trial(changes: dict[str, Any]) -> None:
    p = problem(**changes)
    found = dispatch.decide(p)
    assert found.backend == "triton", found
    assert "will be tried" in found.reason
    assert "is not built" in dict(found.rejected)["cuda"]
    assert dispatch.settle(p) == "triton"
    assert "tried" not in dispatch.decide(p).reason


def test_a_planted_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrent weights reach the kernels transposed."""
    from fastrnn.backends.triton import layer

    honest = layer.stacked
    monkeypatch.setattr(
        layer,
        "stacked",
        lambda ts: honest([t.flip(0) if t.dim() == 2 else t for t in ts]),
    )
    p = problem(cell="rnn_tanh")
    with pytest.warns(RuntimeWarning, match="the triton kernels of rnn_tanh .* is off by"):
        assert dispatch.settle(p) == "reference"
    assert "is off by" in dict(dispatch.decide(p).rejected)["triton"]
    with fastrnn.use_backend("triton"):
        assert dispatch.settle(p) == "triton"
    assert trial.verdict(trial.key_of("triton", p, 0))
