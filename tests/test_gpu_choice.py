"""Which backend serves a call on a GPU, without one: problems, times and kernels are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import backends, dispatch
from fastrnn.backends import Problem, cuda_native
from fastrnn.backends.rows import Weights
from fastrnn.gpu import choice, times, trial
from tests import made_up_gpu
from tests.made_up_gpu import H200, STEP, kernel, measured, problem, right, row

gpu, shipped = made_up_gpu.gpu, made_up_gpu.shipped


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
    monkeypatch.setattr(backends, "_triton_gpu", lambda ordinal: "")
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


def test_a_traced_batch_normalised_layer_is_not_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    serves = backends._serves_triton
    monkeypatch.setattr(backends, "_triton_gpu", lambda ordinal: "")
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


class Device:
    """Stands in for torch.cuda.device."""

    current = 0

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.ordinal

    def __exit__(self, *_: object) -> None:
        Device.current = self.before


@pytest.fixture
def unlike(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Two GPUs, the current one older than the kernels need, that the real backends are asked
    about; returns the devices whose properties torch was asked for."""
    asked: list[object] = []
    capabilities = ((7, 5), (8, 0))

    def properties(ordinal: int) -> SimpleNamespace:  # as torch 2.6 has them
        asked.append(ordinal)
        major, minor = capabilities[ordinal]
        return SimpleNamespace(major=major, minor=minor)

    def no_kernel_on_the_first(need: object, backward: bool, ordinal: int) -> object:
        if ordinal == 0:
            raise RuntimeError("no kernel on the first GPU")
        return made_up_gpu.plans(problem())[0]._replace(text="that of the second GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Device.current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda ordinal=None: capabilities[Device.current if ordinal is None else ordinal],
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(backends, "_of_devices", {})
    monkeypatch.setattr(backends, "_triton_missing", lambda: "")
    monkeypatch.setattr(backends, "cuda_missing", lambda: "")
    monkeypatch.setattr(cuda_native, "emulated", lambda: False)
    monkeypatch.setattr(cuda_native, "choose", no_kernel_on_the_first)
    monkeypatch.setattr(cuda_native, "candidates", lambda *_: [])
    return asked


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_device_of_the_input_is_asked(
    name: str, unlike: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the current one: unasked, asked, in ``explain`` and in a traced call."""
    other = {"cuda": "triton", "triton": "cuda"}[name]
    monkeypatch.setitem(backends.SERVES, name, getattr(backends, f"_serves_{name}"))
    monkeypatch.setitem(backends.SERVES, other, lambda p: "not in this test")
    p = problem(hidden_size=64, lengths=True)
    first, second = p._replace(ordinal=0), p._replace(ordinal=1)
    words = {"cuda": "that of the second GPU", "triton": "kept on chip"}[name]
    why = {"cuda": "no kernel on the first GPU", "triton": "this GPU has 7.5"}[name]
    for traced in (False, True):
        monkeypatch.setattr(choice, "is_compiling", lambda traced=traced: traced)
        monkeypatch.setattr(trial, "verdict", lambda key: "")
        assert dispatch.decide(second).backend == name
        for older in (first, p):
            assert dispatch.decide(older).backend == "reference"
        with fastrnn.use_backend(name):
            assert dispatch.decide(second).backend == name
            for older in (first, p):
                with pytest.raises(RuntimeError, match=why):
                    dispatch.decide(older)
    assert words in dispatch._plan(name, second)
    assert Device.current == 0


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_explain_and_launches_know_one_shared_memory(unlike: list[object]) -> None:
    """Also where torch does not tell; a device is asked once."""
    from fastrnn.backends.triton import layer

    p = problem(hidden_size=128, input_size=3, ordinal=1)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), element_size=lambda: 2)
    weights = Weights([torch.empty(512, 3), torch.empty(512, 128)], "lstm", 1)
    for _ in range(2):
        launched = layer._plan(weights, "lstm", p.batch, x)  # type: ignore[arg-type]
        assert launched == backends.triton_numbers(p)[0]
    assert not launched.stream  # 128 KiB of weights stay on the chip of an A100
    assert unlike == [1]


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
