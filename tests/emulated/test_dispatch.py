"""What runs on a GPU unasked: the tensors are on the CPU and said to be on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import dispatch
from fastrnn.backends import Problem, cuda_native
from fastrnn.gpu import choice, trial
from tests.tolerances import assert_same_bits

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every problem is said to be on a GPU, where nothing is verified yet."""
    users = ("functional.bnlstm", "nn.bnlstm_call", "nn.bnlstm_explain", "nn.bnlstm_inference")
    for name, what in (("dispatch", "_problem"), *((user, "describe_problem") for user in users)):
        place = importlib.import_module(f"fastrnn.{name}")
        made = getattr(place, what)
        monkeypatch.setattr(
            place, what, lambda *a, made=made, **k: made(*a, **k)._replace(device="cuda")
        )
    # `choose` takes what is on the CPU for granted.
    monkeypatch.setattr(dispatch, "CPU_MISSING", "this is a GPU")
    monkeypatch.setattr(choice, "where", lambda ordinal: torch.device("cpu"))
    choice.forget()
    yield
    choice.forget()


def problem(**changes: object) -> Problem:
    usual = Problem("lstm", "cuda", BF16, True, 200, 4, 3, 20, 0, 1, 1, lengths=True)
    return usual._replace(**changes)  # type: ignore[arg-type]


FAMILIES: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float16, "directions": 2},
    {"dtype": torch.float32},
    {"cell": "gru"},
    {"cell": "gru_reset_before"},
    {"cell": "rnn_tanh"},
    {"cell": "rnn_relu"},
    {"hidden_size": 130},
    {"proj_size": 12},
    {"cell": "lstm_layer_norm"},
    {"cell": "gru_layer_norm", "dtype": torch.float32},
    {"cell": "lstm_layer_norm", "proj_size": 12},
    {"regularisers": "zoneout 0.1"},
    {"cell": "gru", "regularisers": "zoneout 0.1"},
    {"cell": "rnn_relu", "regularisers": "zoneout 0.1"},
    {"cell": "rhn", "gates": 2, "depth": 2},
    {"cell": "rhn", "gates": 3, "depth": 2, "dtype": torch.float32},
    {"cell": "bnlstm", "dtype": torch.float32, "given": BF16},
    {"cell": "bnlstm", "dtype": torch.float32, "given": torch.float32},
]


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
def test_every_family_passes_its_trial(changes: dict[str, Any]) -> None:
    p = problem(**changes)
    found = dispatch.decide(p)
    assert found.backend == "cuda", found
    assert "will be tried" in found.reason
    key = trial.key_of("cuda", p, 0)
    assert trial.attempt(key, p, torch.device("cpu")) == ""
    again = dispatch.decide(p)
    assert again.backend == "cuda"
    assert "tried" not in again.reason


def test_what_replaces_a_refused_grid_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "_too_large", set())
    monkeypatch.setattr(cuda_native, "_chosen", {})
    p = problem(cell="gru", dtype=torch.float32)
    assert dispatch.settle(p) == "cuda"
    before = trial.key_of("cuda", p, 0)

    def refuse(*_: object) -> None:
        raise RuntimeError("fastrnn CUDA library: launching: " + cuda_native._REFUSED)

    rnn, x = fastrnn.GRU(3, 20), torch.randn(5, 4, 3)
    with monkeypatch.context() as full, fastrnn.use_backend("cuda"):
        full.setattr(cuda_native._cuda, "forward", refuse)
        full.setattr(cuda_native._cuda, "backward", refuse)
        rnn(x)[0].sum().backward()
    after = trial.key_of("cuda", p, 0)
    assert before.plans != after.plans == ("steps", "steps")
    assert "will be tried" in dispatch.decide(p).reason
    assert dispatch.settle(p) == "cuda"
    assert trial.verdict(after) == ""
    assert "tried" not in dispatch.decide(p).reason


def test_modules_run_on_it_unasked() -> None:
    x = torch.randn(150, 2, 3, dtype=BF16)
    rnn = fastrnn.LSTM(3, 8, dtype=BF16)
    asked = []
    with torch.no_grad():
        plain = fastrnn.explain(rnn, x)
        assert plain.backend == "torch"  # whose kernel is given up for a number only
        found = fastrnn.explain(rnn, x, lengths=[150, 20])
        assert (found.backend, "tried" in found.reason) == ("cuda", True)
        assert found.plan.startswith("bf16; forward: ")
        got = rnn(x, lengths=[150, 20])[0]
        assert "tried" not in fastrnn.explain(rnn, x, lengths=[150, 20]).reason
        with fastrnn.use_backend("cuda"):
            asked.append(rnn(x, lengths=[150, 20])[0])
    assert_same_bits("y", got, asked[0])


def test_a_planted_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are packed a quarter too large."""
    honest = cuda_native.Launcher.pack

    def spoiled(self: Any, matrices: Any, *rest: Any) -> list[int]:
        return honest(self, [m * 1.25 for m in matrices], *rest)

    monkeypatch.setattr(cuda_native.Launcher, "pack", spoiled)
    rnn = fastrnn.GRU(3, 8, dtype=BF16)
    x = torch.randn(150, 2, 3, dtype=BF16)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="the cuda kernels of gru .* is off by"):
            got = rnn(x, lengths=[150, 20])[0]
        found = fastrnn.explain(rnn, x, lengths=[150, 20])
        assert found.backend == "reference"
        assert "is off by" in dict(found.rejected)["cuda"]
        with fastrnn.use_backend("reference"):
            assert_same_bits("y", got, rnn(x, lengths=[150, 20])[0])


def test_a_kernel_that_fails_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("launching: no kernel image is available for execution")

    monkeypatch.setattr(cuda_native._cuda, "rhn_forward", fails)
    rnn = fastrnn.RHN(3, 8, depth=2)
    x = torch.randn(150, 2, 3)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="no kernel image"):
        rnn(x)
    with torch.no_grad():
        assert fastrnn.explain(rnn, x).backend == "reference"


@pytest.mark.compile
# torch's own, raised while it traces
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_call_takes_what_was_tried_before() -> None:
    rnn = fastrnn.RHN(3, 8, depth=2)
    x = torch.randn(150, 2, 3)
    with torch.no_grad():
        expected = rnn(x)[0]  # tried here
        assert "tried" not in fastrnn.explain(rnn, x).reason
        compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
        for steps in (150, 140, 130):  # the third with a dynamic T
            assert_same_bits("y", compiled(x[:steps])[0], rnn(x[:steps])[0])
        assert expected.shape == (150, 2, 8)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_call_tries_nothing() -> None:
    rnn = fastrnn.RHN(3, 8, depth=2)
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        torch.compile(rnn, fullgraph=True, backend="aot_eager")(x)
    assert trial._verdicts == {}
