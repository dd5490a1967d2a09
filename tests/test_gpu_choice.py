"""Which backend serves a call on a GPU, without one: problems, times and kernels are made up."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn import backends, dispatch
from fastrnn.backends import Problem
from fastrnn.backends.cuda_native import Plan
from fastrnn.gpu import choice, times, trial

H200 = times.Device("NVIDIA H200", 132)
STEP = {"us": 1.0}


def problem(**changes: object) -> Problem:
    usual = Problem("lstm", "cuda", torch.bfloat16, False, 128, 16, 512, 512, 0, 1, 1)
    return usual._replace(**changes)  # type: ignore[arg-type]


def plans(p: Problem) -> list[Plan]:
    return [Plan("", "", "sentinel", (), 8, 1, 32, 1, STEP["us"]) for _ in range(2)]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU on which the CUDA kernels take everything, at STEP["us"], and Triton's nothing; trials
    have their tensors on the CPU."""
    monkeypatch.setitem(backends.SERVES, "cuda", lambda p: "")
    monkeypatch.setitem(backends.SERVES, "triton", lambda p: "not in this test")
    monkeypatch.setattr(times, "cuda_plans", plans)
    monkeypatch.setattr(trial, "cuda_plans", plans)
    monkeypatch.setattr(times, "device", lambda ordinal: H200)
    monkeypatch.setattr(choice, "where", lambda ordinal: torch.device("cpu"))
    monkeypatch.setitem(STEP, "us", 1.0)
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of the library's data that a test may change."""
    data = copy.deepcopy(times.table().data)
    monkeypatch.setattr(times, "_table", [times.Table(data)])
    return data


Kernel = Callable[["trial._Layer"], dict[str, torch.Tensor]]


def right(layer: trial._Layer) -> dict[str, torch.Tensor]:
    return layer.truth(layer.dtype)


def wrong(layer: trial._Layer) -> dict[str, torch.Tensor]:
    """One gradient of many is half too large."""
    found = layer.truth(layer.dtype)
    found["the gradient of weight 1"] *= 1.5
    return found


def raising(layer: trial._Layer) -> dict[str, torch.Tensor]:
    raise RuntimeError("an illegal instruction")


def kernel(monkeypatch: pytest.MonkeyPatch, run: Kernel) -> list[tuple[str, str]]:
    """Plants what the kernels compute; returns the list of their runs."""
    ran: list[tuple[str, str]] = []

    def instead(self: trial._Layer, *named: str) -> dict[str, torch.Tensor]:
        ran.append(named)  # type: ignore[arg-type]
        return run(self)

    monkeypatch.setattr(trial._Layer, "run", instead)
    return ran


# ---- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "us", "backend"),
    [
        ({}, 1.0, "cuda"),  # beside cuDNN's STANDARD
        ({}, 4.0, "torch"),  # not by the margin
        ({"steps": 1}, 1.0, "torch"),  # a call of ours costs more than a step
        ({"hidden_size": 768, "input_size": 768, "dtype": torch.float16}, 1.0, "torch"),
        ({"cell": "gru", "dtype": torch.float16}, 1.0, "cuda"),  # no persistent GRU in cuDNN
        ({"hidden_size": 100, "batch": 4}, 1.0, "torch"),  # its kernels for few units
        ({"directions": 2, "num_layers": 3, "training": True}, 1.0, "cuda"),
        ({"dtype": torch.float64}, 1.0, "cuda"),  # it would refuse in earnest
        ({"lengths": True}, 1.0, "cuda"),  # beside a Python loop
        ({"cell": "lstm_layer_norm"}, 50.0, "cuda"),
        ({"cell": "rhn", "gates": 2, "depth": 5}, 1.0, "cuda"),
        ({"cell": "bnlstm", "given": torch.bfloat16}, 1.0, "cuda"),
        ({"cell": "rnn_tanh", "lengths": True, "steps": 1}, 1.0, "reference"),
        ({}, 0.0, "torch"),  # a library that does not tell
        ({"lengths": True}, 0.0, "cuda"),
    ],
    ids=str,
)
def test_the_least_time_by_a_margin(
    changes: dict[str, Any], us: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEP, "us", us)
    p = problem(**changes)
    found = dispatch.decide(p)
    assert found.backend == backend, found
    others = dict(found.rejected)
    assert others["triton"] == "not in this test"
    if backend == "cuda":
        assert "will be tried against the reference at the first call" in found.reason
        if us:
            layers = p.num_layers * (2 if p.training else 1)
            assert f"predicted {us * layers:.3g} us a step; " in found.reason
    else:
        assert "us a step" in found.reason
        assert "cuda" in others
        assert "tried" not in found.reason


def test_explain_says_what_torch_asks_cudnn_for() -> None:
    assert "cuDNN's STANDARD" in dispatch.decide(problem()).reason
    half = problem(dtype=torch.float16, hidden_size=256, input_size=256)
    found = dispatch.decide(half)
    assert "cuDNN's PERSIST_STATIC)" in found.reason
    assert "no 1.5 times faster than torch" in dict(found.rejected)["cuda"]


def test_triton_serves_where_the_cuda_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.SERVES, "cuda", lambda p: "the CUDA library is not built")
    monkeypatch.setattr(backends, "_triton_gpu", lambda: "")
    monkeypatch.setattr(backends, "_triton_missing", lambda: "")
    monkeypatch.setitem(backends.SERVES, "triton", backends._serves_triton)
    found = dispatch.decide(problem(cell="gru", hidden_size=128, lengths=True))
    assert found.backend == "triton"
    assert dict(found.rejected)["cuda"] == "the CUDA library is not built"
    wide = dispatch.decide(problem(hidden_size=512))
    assert wide.backend == "torch"
    assert "does not fit on chip" in dict(wide.rejected)["triton"]
    normed = dispatch.decide(problem(cell="gru_layer_norm", hidden_size=128))
    assert normed.backend == "reference"
    assert dict(normed.rejected)["triton"] == "it has no kernels with layer_norm"


def test_the_faster_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.SERVES, "triton", lambda p: "")
    p = problem(cell="rhn", gates=2, depth=2, hidden_size=64)
    assert dispatch.decide(p).backend == "cuda"
    choice.forget()
    monkeypatch.setitem(STEP, "us", 30.0)
    found = dispatch.decide(p)
    assert found.backend == "triton"
    assert dict(found.rejected)["cuda"] == "predicted 30 us a step"


@pytest.mark.parametrize("hidden", [16, 100, 256])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rhn", "bnlstm"])
def test_the_model_of_triton_grows_with_the_work(cell: str, hidden: int) -> None:
    p = problem(cell=cell, hidden_size=hidden, gates=2 if cell == "rhn" else 0, depth=1)
    one = times._triton_us(p, H200)
    assert one >= 1.5
    assert times._triton_us(p._replace(training=True), H200) > 2 * one
    if cell != "bnlstm":
        assert times._triton_us(p._replace(batch=16 * 133), H200) > one
    if cell == "rhn":
        assert times._triton_us(p._replace(depth=4), H200) == pytest.approx(4 * one)


def row(**changes: object) -> dict[str, Any]:
    usual = {
        "cell": "lstm", "format": "bfloat16", "training": False, "directions": 1, "packed": False,
        "depth": 1, "T": 1024, "N": 16, "H": 512, "us": {"cuda": 0.9, "torch": 1.2},
        "call": {"cuda": 100.0, "torch": 50.0},
    }  # fmt: skip
    return usual | changes


def measured(data: dict[str, Any], *rows: dict[str, Any], **more: Any) -> None:
    entry = {"name": "NVIDIA H200", "sms": 132, "source": "a campaign", "verified": []}
    data["devices"].append(entry | {"rows": list(rows)} | more)


def test_measured_times_come_first(shipped: dict[str, Any]) -> None:
    assert "predicted" in dispatch.decide(problem()).reason
    choice.forget()
    measured(shipped, row())
    found = dispatch.decide(problem(steps=1024))
    assert found.backend == "cuda"  # by 1.2: measured on both sides, the margin is 1.05
    assert "measured 0.9 us a step on a campaign; " in found.reason
    assert "torch's own kernels: measured 1.2 us" in found.reason
    # The call itself was measured too: few steps do not pay.
    assert dispatch.decide(problem(steps=128)).backend == "torch"


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({}, True),
        ({"batch": 32}, True),
        ({"batch": 33}, False),
        ({"hidden_size": 400}, True),
        ({"hidden_size": 640}, False),  # padded to another power of two
        ({"cell": "gru"}, False),
        ({"dtype": torch.float16}, False),
        ({"training": True}, False),
        ({"directions": 2}, False),
        ({"packed": True}, False),
        ({"regularisers": "zoneout 0.1"}, False),
        ({"proj_size": 64}, False),
        ({"steps": 7}, True),  # the call is known apart from its steps
    ],
    ids=str,
)
def test_what_a_row_speaks_for(
    changes: dict[str, Any], there: bool, shipped: dict[str, Any]
) -> None:
    measured(shipped, row())
    found = times.estimate("cuda", problem(**changes), H200)
    assert found is not None
    assert (found.source == "a campaign") == there


def test_a_row_with_a_total_only(shipped: dict[str, Any]) -> None:
    measured(shipped, row(cell="rhn", depth=10, T=35, us={"cuda": 9.0}, call={}))
    p = problem(cell="rhn", depth=10, gates=2, steps=70)
    found = times.estimate("cuda", p, H200)
    assert found is not None
    assert (found.step_us, found.call_us, found.source) == (9.0, 0.0, "a campaign")
    assert times.estimate("cuda", p._replace(steps=200), H200).source == ""  # type: ignore[union-attr]
    assert times.estimate("cuda", p._replace(gates=3), H200).source == ""  # type: ignore[union-attr]


def test_torch_is_measured_for_the_algorithm_it_asks_for(shipped: dict[str, Any]) -> None:
    measured(shipped, row(format="float16", us={"torch": 3.0, "cuda": 1.0}))
    p = problem(dtype=torch.float16)
    assert times.estimate("torch", p, H200).source == "a campaign"  # type: ignore[union-attr]
    odd = p._replace(batch=15)  # which cuDNN's persistent kernel does not take
    assert times.estimate("torch", odd, H200).source == ""  # type: ignore[union-attr]
    assert times.estimate("cuda", odd, H200).source == "a campaign"  # type: ignore[union-attr]
    two = times.estimate("torch", p._replace(num_layers=2), H200)
    assert two is not None
    assert two.source == ""


def test_a_part_of_a_gpu_falls_through_to_the_model(shipped: dict[str, Any]) -> None:
    measured(shipped, row(), verified=[["cuda", "lstm", "bfloat16"]])
    for other in (times.Device("NVIDIA H200 MIG 1g.18gb", 16), times.Device("NVIDIA H200", 114)):
        found = times.estimate("torch", problem(), other)
        assert found is not None
        assert found.source == ""
        assert not times.table().verified(other, "cuda", "lstm", "bfloat16")
    assert times.table().verified(H200, "cuda", "lstm", "bfloat16")


def test_the_shipped_data() -> None:
    data = json.loads(times.TABLE.read_text())
    assert data["devices"] == []  # until a campaign ran
    assert "nothing was measured" in data["provenance"]
    with pytest.raises(ValueError, match=r"table.json: got schema 7, expected 1"):
        times.Table(data | {"schema": 7})


# ---- trials --------------------------------------------------------------------------------------

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


def test_a_traced_batch_normalised_layer_is_not_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    serves = backends._serves_triton
    monkeypatch.setattr(backends, "_triton_gpu", lambda: "")
    p = problem(cell="bnlstm", hidden_size=32, batch=8)
    assert serves(p) == ""
    monkeypatch.setattr(backends, "is_compiling", lambda: True)
    assert "whose size is not known" in serves(p)


def test_cudnns_small_kernel_is_no_worse_than_its_standard_one() -> None:
    def us(batch: int) -> float:
        p = problem(hidden_size=64, batch=batch, training=True)
        found = times.estimate("torch", p, H200)
        assert found is not None
        return found.step_us

    assert us(8192) <= us(16) + 100


def test_what_was_tried_before_is_used_in_a_traced_call(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, right)
    assert dispatch.settle(problem()) == "cuda"
    with FakeTensorMode():
        assert dispatch.settle(problem()) == "cuda"


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


def test_asked_for_or_not_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, right)
    with fastrnn.use_backend("torch"):
        assert dispatch.settle(problem()) == "torch"
    with fastrnn.use_backend("triton"), pytest.raises(RuntimeError, match="not in this test"):
        dispatch.settle(problem())
    with fastrnn.use_backend("triton", strict=False) as asked:
        assert dispatch.settle(problem()) == "cuda"
    assert asked.fallbacks == [("triton", "cuda", "not in this test")]


def test_a_call_seen_before_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, right)
    asked: list[Problem] = []
    monkeypatch.setitem(backends.SERVES, "cuda", lambda p: asked.append(p) or "")
    p = problem(lengths=True)
    for steps in (128, 128, 100, 65):  # lengths of one order share what was found
        dispatch.settle(p._replace(steps=steps))
    assert len(asked) == 1
    dispatch.settle(p._replace(steps=129))
    assert len(asked) == 2
    assert choice._ranking.cache_info().maxsize == 512


def test_transforms_and_other_devices_are_as_they_were() -> None:
    assert dispatch.decide(problem(transforms=True)).backend == "reference"
    assert dispatch.decide(problem(device="xpu")).backend == "torch"
    with pytest.raises(RuntimeError, match="no backend can serve this call"):
        dispatch.decide(problem(dtype=torch.int64, lengths=True))


def test_calls_on_the_cpu_do_not_load_it() -> None:
    script = (
        "import sys, torch, fastrnn\n"
        "fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "fastrnn.GRU(3, 4)(torch.zeros(2, 1, 3), lengths=[2])[0].sum().backward()\n"
        "fastrnn.explain(fastrnn.LSTM(3, 4), torch.zeros(2, 1, 3))\n"
        "sys.exit('fastrnn.gpu' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=False
    )
    assert done.returncode == 0
