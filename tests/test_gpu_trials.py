"""Kernels of a GPU are tried before their first use: kernels that are made up, on the CPU."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn import backends, dispatch
from fastrnn.backends import Problem
from fastrnn.gpu import choice, trial
from tests import made_up_gpu
from tests.made_up_gpu import kernel, measured, problem, raising, right, wrong

gpu, shipped = made_up_gpu.gpu, made_up_gpu.shipped

FAMILIES: list[dict[str, Any]] = [
    {},
    {"cell": "gru_reset_before", "directions": 2},
    {"cell": "rnn_relu", "dtype": torch.float16},
    {"cell": "lstm_layer_norm", "dtype": torch.float32},
    {"proj_size": 64},
    {"regularisers": "zoneout 0.1", "dtype": torch.float32},
    {"cell": "rhn", "gates": 3, "depth": 2},
    {"cell": "bnlstm", "dtype": torch.float32, "given": torch.bfloat16},
]


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
def test_kernels_are_tried_once(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = kernel(monkeypatch, right)
    p = problem(lengths=True, **changes)
    assert "will be tried" in dispatch.decide(p).reason
    assert not ran
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert dispatch.settle(p) == "cuda"
    assert torch.equal(torch.get_rng_state(), expected)
    count = len(ran)
    assert count >= 2
    assert set(ran) == {("cuda,sentinel", "cuda,sentinel")}
    for more in (p, p._replace(batch=3, steps=9), p._replace(hidden_size=300)):
        assert dispatch.settle(more) == "cuda"
    assert len(ran) == count
    found = dispatch.decide(p)
    assert found.backend == "cuda"
    assert "tried" not in found.reason


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
def test_a_wrong_kernel_is_found(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = kernel(monkeypatch, wrong)
    p = problem(lengths=True, **changes)
    with pytest.warns(RuntimeWarning, match=r"are not used on this GPU: .*weight 1 is off by") as w:
        assert dispatch.settle(p) == "reference"
    assert len(w) == 1
    count = len(ran)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.settle(p) == "reference"
        found = dispatch.decide(p)
    assert len(ran) == count
    assert "the gradient of weight 1 is off by" in dict(found.rejected)["cuda"]
    # Asked for, they run: use_backend is the user's word.
    with fastrnn.use_backend("cuda"):
        assert dispatch.settle(p) == "cuda"


@pytest.mark.filterwarnings("ignore:fastrnn")
def test_a_kernel_that_raises_or_differs_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, raising)
    with pytest.warns(RuntimeWarning, match="its trial raised RuntimeError: an illegal instr"):
        assert dispatch.settle(problem()) == "torch"
    assert "an illegal instruction" in dict(dispatch.decide(problem()).rejected)["cuda"]
    runs: list[int] = []

    def moody(layer: trial._Layer) -> dict[str, torch.Tensor]:
        runs.append(1)
        found = layer.truth(layer.dtype)
        return found | {"y": found["y"] + 1e-6 * len(runs)}

    kernel(monkeypatch, moody)
    single = problem(dtype=torch.float32, cell="gru")
    assert dispatch.settle(single) == "torch"
    assert dict(dispatch.decide(single).rejected)["cuda"] == "two runs differ in y"

    def lost(layer: trial._Layer) -> dict[str, torch.Tensor]:
        found = layer.truth(layer.dtype)
        return found | {"h_n": found["h_n"] * float("nan")}

    kernel(monkeypatch, lost)
    assert dispatch.settle(problem(cell="gru")) == "torch"
    assert "h_n is off by nan" in dict(dispatch.decide(problem(cell="gru")).rejected)["cuda"]


def test_no_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(layer: trial._Layer) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel(monkeypatch, full)
    assert dispatch.settle(problem()) == "torch"
    kernel(monkeypatch, right)
    assert dispatch.settle(problem()) == "cuda"


def test_nothing_is_tried_in_a_traced_or_captured_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = kernel(monkeypatch, right)
    with FakeTensorMode():
        assert dispatch.settle(problem()) == "torch"
        assert dispatch.settle(problem(lengths=True)) == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trial.hindrance() == "a call that is being captured"
    monkeypatch.undo()
    assert not ran


def test_nothing_is_tried_inside_a_backward_pass() -> None:
    """There a trial's own backward pass, in a thread that is waited for, could never begin."""
    found = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
            found.append(trial.hindrance())
            return dx

    Asks.apply(torch.ones(1, requires_grad=True)).backward()
    assert found == ["a call inside a backward pass"]
    assert trial.hindrance() == ""


def test_every_tile_of_triton_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of more rows have a trial of their own, with a batch that brings them about."""
    few, many = problem(hidden_size=64), problem(hidden_size=64, batch=9000)
    keys = [trial.key_of("triton", p, 0) for p in (few, many)]
    assert keys[0] != keys[1]
    for key, p in zip(keys, (few, many), strict=True):
        (size,) = trial._sizes(key, p)
        assert trial.key_of("triton", size, 0).plans == key.plans
        assert size.batch <= p.batch
    assert next(iter(trial._sizes(keys[0], few))).batch < 10


def test_what_was_tried_before_is_used_in_a_traced_call(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, right)
    assert dispatch.settle(problem()) == "cuda"
    with FakeTensorMode():
        assert dispatch.settle(problem()) == "cuda"


def test_a_compiled_call_needs_every_tile_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch, and so the rows of a program, are not known; wide layers have one tile only."""
    monkeypatch.setitem(backends.SERVES, "triton", lambda p: "")
    monkeypatch.setitem(backends.SERVES, "cuda", lambda p: "not in this test")
    monkeypatch.setattr("fastrnn.backends.triton.plan.PROGRAMS", 4)
    kernel(monkeypatch, right)

    def compiled(p: Problem) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(choice, "is_compiling", lambda: True)
            return dispatch.settle(p)

    p = problem(cell="gru", hidden_size=128, lengths=True)
    assert dispatch.settle(p) == "triton"
    assert compiled(p) == "reference"
    assert dispatch.settle(p._replace(batch=65)) == "triton"
    assert compiled(p) == "triton"
    wide = problem(cell="rnn_tanh", hidden_size=256, lengths=True)
    assert compiled(wide) == "reference"
    assert dispatch.settle(wide) == "triton"
    assert compiled(wide) == "triton"


def test_what_the_data_verified_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, shipped: dict[str, Any]
) -> None:
    ran = kernel(monkeypatch, wrong)
    measured(shipped, verified=[["cuda", "lstm", "bfloat16"]])
    assert "tried" not in dispatch.decide(problem()).reason
    with FakeTensorMode():
        assert dispatch.settle(problem()) == "cuda"
    assert not ran
    with pytest.warns(RuntimeWarning, match="float16"):
        assert dispatch.settle(problem(dtype=torch.float16, lengths=True)) == "reference"
    assert ran


def test_one_trial_for_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = kernel(monkeypatch, right)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(dispatch.settle(problem()))) for _ in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == ["cuda"] * 4
    assert len(ran) == 2  # the second for the bits
