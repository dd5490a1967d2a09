"""Which backend runs a call, what is said about it, and how to overrule it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

import fastrnn
from fastrnn import backends, dispatch
from fastrnn import handover as handover_data
from fastrnn.backends import cpu
from fastrnn.sequence import describe
from tests.tolerances import assert_close_by_rule

MODULES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


def call(module: torch.nn.Module, x: Tensor, **options: object) -> Tensor:
    result = module(x, **options)
    return result if isinstance(result, Tensor) else result[0]


def make(name: str) -> tuple[torch.nn.Module, Tensor]:
    x = torch.randn((2, 3) if "Cell" in name else (5, 2, 3))
    return getattr(fastrnn, name)(3, 4), x


@pytest.mark.parametrize("name", MODULES)
def test_default_is_the_native_backend(name: str) -> None:
    module, x = make(name)
    with torch.no_grad():  # a single step with gradients is torch's, see fastrnn.handover
        found = fastrnn.explain(module, x)
    assert found.backend == "cpu"
    assert found.plan
    assert found.reason
    assert found.rejected == []
    assert str(found).startswith("backend: cpu\nplan: ")


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", MODULES)
def test_backends_agree(name: str, backend: str) -> None:
    module, x = make(name)
    with fastrnn.use_backend(backend):
        found = fastrnn.explain(module, x)
        got = call(module, x)
        grads = torch.autograd.grad(got.square().sum(), list(module.parameters()))
    assert found.backend == backend
    assert f"use_backend('{backend}')" in found.reason
    with fastrnn.use_backend("reference"):
        same = call(module, x)
        expected = torch.autograd.grad(same.square().sum(), list(module.parameters()))
    assert_close_by_rule(name, got, same.double(), same)
    for a, b in zip(grads, expected, strict=True):
        assert_close_by_rule(f"gradient of {name}", a, b.double(), b)


LACKING = [
    ("torch", "GRU", {"reset_after": False}, {}, "torch.nn has no reset_after=False"),
    ("torch", "LSTM", {}, {"lengths": [5, 2]}, "torch.nn has no lengths"),
    ("torch", "LSTM", {}, {"reset": torch.ones(5, 2).bool()}, "torch.nn has no reset"),
    ("torch", "LSTM", {}, {"return_cells": True}, "torch.nn has no return_cells"),
    ("torch", "LSTM", {"recompute": True}, {}, "torch.nn has no recompute"),
    ("cpu", "GRU", {"dtype": torch.float16}, {}, "no torch.float16 kernels"),
    ("cuda", "RNN", {}, {}, "the input is on cpu"),
    ("triton", "RNN", {}, {}, "only runs under its interpreter"),
]
LACKING_IDS = [f"{backend}-{name}-{why}" for backend, name, _, _, why in LACKING]


@pytest.mark.parametrize(("backend", "name", "make", "options", "why"), LACKING, ids=LACKING_IDS)
def test_strict_raises_and_names_the_reason(
    backend: str, name: str, make: dict, options: dict, why: str
) -> None:
    module = getattr(fastrnn, name)(3, 4, **make)
    x = torch.randn(5, 2, 3).to(module.weight_ih_l0.dtype)
    message = (
        rf"use_backend\('{backend}'\): the {backend} backend cannot serve.*{why}.*strict=False"
    )
    with fastrnn.use_backend(backend):
        with pytest.raises(RuntimeError, match=message):
            module(x, **options)
        with pytest.raises(RuntimeError, match=why):
            fastrnn.explain(module, x, **options)
    module(x, **options)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "RHN", "BNLSTM"])
def test_explaining_a_call_that_fails_fails(name: str) -> None:
    more = {"max_length": 5} if name == "BNLSTM" else {}
    module, x = getattr(fastrnn, name)(3, 4, **more), torch.randn(5, 2, 3)
    for bad, words in ((x.double(), "type"), (x[..., :2], "Expected 3")):
        for shaped in (bad, bad[:, 0]):
            with pytest.raises((ValueError, RuntimeError), match=words):
                module(shaped)
            with pytest.raises((ValueError, RuntimeError), match=words):
                fastrnn.explain(module, shaped)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastrnn.explain(module, x.bfloat16()).backend == "cpu"


@pytest.mark.parametrize(("backend", "name", "make", "options", "why"), LACKING, ids=LACKING_IDS)
def test_not_strict_falls_through_and_records_it(
    backend: str, name: str, make: dict, options: dict, why: str
) -> None:
    module = getattr(fastrnn, name)(3, 4, **make)
    x = torch.randn(5, 2, 3).to(module.weight_ih_l0.dtype)
    with fastrnn.use_backend(backend, strict=False) as chosen:
        got = call(module, x, **options)
        assert len(chosen.fallbacks) == 1
        found = fastrnn.explain(module, x, **options)
        assert len(chosen.fallbacks) == 1, "explaining is not running"
    asked, ran, reason = chosen.fallbacks[0]
    assert (asked, ran) == (backend, found.backend) != (backend, backend)
    assert why in reason
    assert found.rejected[0] == (backend, reason)
    assert f"rejected: {backend}: " in str(found)
    assert got.isfinite().all()


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name: got 'cudnn', expected one of 'cpu', 'cuda'"):
        fastrnn.use_backend("cudnn")
    with pytest.raises(ValueError, match=r"name: got None"):
        fastrnn.use_backend(None)  # type: ignore[arg-type]


def test_nesting_errors_and_threads() -> None:
    module, x = make("LSTM")

    def backend() -> str:
        return fastrnn.explain(module, x).backend

    seen = []
    with fastrnn.use_backend("reference"):
        with fastrnn.use_backend("torch"):
            assert backend() == "torch"
        assert backend() == "reference"
        with pytest.raises(KeyError), fastrnn.use_backend("torch"):
            raise KeyError
        assert backend() == "reference"
        other = threading.Thread(target=lambda: seen.append(backend()))
        other.start()
        other.join()
    assert seen == ["cpu"]
    again = fastrnn.use_backend("torch")
    for _ in range(2):
        with again, again:
            assert backend() == "torch"
        assert backend() == "cpu"


def test_environment() -> None:
    """A name that is not one is in tests/dropin/test_dropin_dispatch.py."""
    code = (
        "import torch, fastrnn\n"
        "m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)\n"
        "for _ in range(2): m(x)\n"
        "print(fastrnn.explain(m, x))\n"
        "with fastrnn.use_backend('reference'): print(fastrnn.explain(m, x).backend)\n"
        "try: m(x, lengths=[5, 1])\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTRNN_BACKEND": "torch"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FASTRNN_BACKEND=torch") == 1
    assert "unset FASTRNN_BACKEND" in done.stderr
    assert "backend: torch" in done.stdout
    assert "asked for by FASTRNN_BACKEND" in done.stdout
    assert "\nreference\n" in done.stdout
    assert "FASTRNN_BACKEND: the torch backend cannot serve" in done.stdout


@pytest.fixture
def handover(monkeypatch: pytest.MonkeyPatch) -> None:
    box = handover_data.Handover(torch.float32, False, (1, 50), (2, 8), (1, 4), "1.2x in tests")
    monkeypatch.setitem(handover_data.HANDOVER, "gru", (box,))


def test_the_ends_of_a_box_belong_to_it() -> None:
    box = handover_data.Handover(torch.float32, False, (2, 50), (2, 8), (3, 4), "")
    inside = list(itertools.product((2, 50), (2, 8), (3, 4)))
    assert all(box.covers(torch.float32, False, *sizes) for sizes in inside)
    for sizes in ((1, 2, 3), (51, 2, 3), (2, 1, 3), (2, 9, 3), (2, 2, 2), (2, 2, 5)):
        assert not box.covers(torch.float32, False, *sizes)
    assert not box.covers(torch.float32, True, *inside[0])
    assert not box.covers(torch.float64, False, *inside[0])


def test_rows_of_a_cell_and_gradients_of_a_state_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of many rows, and one training step, are boxes of fastrnn.handover."""
    monkeypatch.setattr(handover_data, "_VENDOR", "intel")
    x = torch.randn(5, 4)
    assert fastrnn.explain(fastrnn.RNNCell(4, 130), x).backend == "torch"
    assert fastrnn.explain(fastrnn.RNN(4, 130), x[None]).backend == "torch"
    module, x = fastrnn.GRU(4, 448).requires_grad_(False), torch.randn(1, 2, 4)
    h = torch.zeros(1, 2, 448, requires_grad=True)
    assert fastrnn.explain(module, x).backend == "cpu"
    assert fastrnn.explain(module, x, h).backend == "torch"


def test_a_box_of_one_makers_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    box = handover_data.Handover(torch.float32, False, (1, 9), (1, 9), (1, 9), "", vendor="intel")
    for vendor in ("intel", "amd", ""):
        monkeypatch.setattr(handover_data, "_VENDOR", vendor)
        assert box.covers(torch.float32, False, 5, 5, 5) == (vendor == "intel")
    assert cpu.vendor() in ("amd", "intel", "")


@pytest.mark.usefixtures("handover")
def test_handover() -> None:
    module, x = make("GRU")
    with torch.no_grad():
        found = fastrnn.explain(module, x)
        assert (found.backend, found.plan) == ("torch", "torch.gru")
        assert "measured faster here: 1.2x in tests" in found.reason
        got = module(x)[0]
        with fastrnn.use_backend("torch"):
            assert torch.equal(got, module(x)[0])
        assert fastrnn.explain(module, x[:, :1]).backend == "cpu"
        assert fastrnn.explain(module, x.repeat(11, 1, 1)).backend == "cpu"
        assert fastrnn.explain(fastrnn.GRU(3, 5), x).backend == "cpu"
        assert fastrnn.explain(fastrnn.LSTM(3, 4), x).backend == "cpu"
        lengths = fastrnn.explain(module, x, lengths=[5, 5])
        assert lengths.backend == "cpu"
        assert lengths.rejected == [("torch", "torch.nn has no lengths")]
    assert fastrnn.explain(module, x).backend == "cpu", "the box is for inference"


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    rnn = getattr(torch.backends.mkldnn, "rnn", None)
    switch = getattr(rnn, "fp32_precision", None)
    yield
    torch.set_float32_matmul_precision(before)
    if switch is not None:
        rnn.fp32_precision = switch


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("switch", ["rnn", "matmul"])
def test_bf16_weights_follow_torchs_switches(switch: str) -> None:
    module, x = make("LSTM")
    with torch.no_grad():
        exact = module(x)[0]
        assert "bf16 weights" not in fastrnn.explain(module, x).plan
    if switch == "matmul":
        torch.set_float32_matmul_precision("medium")
    elif not hasattr(torch.backends.mkldnn, "rnn"):
        pytest.skip("this torch has no precision switch for recurrent layers")
    else:
        torch.backends.mkldnn.rnn.fp32_precision = "bf16"
    with torch.no_grad():
        assert fastrnn.explain(module, x).plan.startswith("bf16 weights, ")
        rounded = module(x)[0]
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.02)
    assert "bf16 weights are for inference only" in fastrnn.explain(module, x).plan
    assert "bf16 weights" not in fastrnn.explain(module.double(), x.double()).plan


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_prepared_call_follows_torchs_switch(name: str) -> None:
    module, x = getattr(fastrnn, name)(16, 32).eval(), torch.randn(5, 2, 16)
    with torch.no_grad():
        for _ in range(3):
            exact = module(x)[0]
        torch.set_float32_matmul_precision("medium")
        for _ in range(3):
            assert not torch.equal(module(x)[0], exact)
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(module(x)[0], exact)


@pytest.mark.parametrize("pays", [True, False])
def test_lstm_inference_with_bf16_weights_is_not_handed_over(
    monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    """The box was measured against our float32; AVX-512 and the switch are forced here."""
    monkeypatch.setattr(handover_data, "_AVX512", True)
    monkeypatch.setattr(handover_data, "_VENDOR", "intel")
    module, x = fastrnn.LSTM(4, 448), torch.randn(8, 16, 4)
    with torch.no_grad():
        assert fastrnn.explain(module, x).backend == "torch"
        for where in (dispatch, handover_data):
            monkeypatch.setattr(where, "bf16_allowed", lambda: True)
            monkeypatch.setattr(where, "bf16_pays", lambda batch: pays)
        found = fastrnn.explain(module, x)
        assert found.backend == ("cpu" if pays else "torch")
        assert found.plan.startswith("bf16 weights, " if pays else "torch.lstm")
        batch = describe(x, batch_first=False)
        chosen = dispatch.choose("lstm", x, batch, (448, 0, 1, 1), False, False, False)
        assert chosen == (("cpu", "bf16") if pays else ("torch", ""))


def test_options_no_native_kernel_serves() -> None:
    half, x = fastrnn.GRU(3, 4, dtype=torch.float16), torch.randn(5, 2, 3).half()
    found = fastrnn.explain(half, x)
    assert found.backend == "torch"
    assert found.rejected[0][0] == "cpu"
    assert fastrnn.explain(half, x, lengths=[5, 1]).backend == "reference"
    trains = fastrnn.LSTM(3, 4, dtype=torch.float16)
    assert fastrnn.explain(trains, x).backend == "reference"
    trains(x)[0].sum().backward()
    with torch.autocast("cpu", dtype=torch.float16):
        assert fastrnn.explain(fastrnn.LSTM(3, 4), x.float()).backend == "reference"


def problem(**changes: object) -> dispatch.Problem:
    usual = dispatch.Problem("lstm", "cuda", torch.float32, False, 5, 2, 3, 4, 0, 1, 1)
    return usual._replace(**changes)


def test_devices_without_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that our kernels can do nothing with; tests/test_gpu_choice.py has those they can."""
    from fastrnn.gpu import choice

    choice.forget()
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends.SERVES, name, lambda p: "no GPU in this test")
    found = dispatch.decide(problem())
    whys = [("cuda", "no GPU in this test"), ("triton", "no GPU in this test")]
    assert (found.backend, found.rejected) == ("torch", whys)
    found = dispatch.decide(problem(lengths=True))
    assert found.backend == "reference"
    assert found.rejected == [*whys, ("torch", "torch.nn has no lengths")]
    choice.forget()
    assert dispatch.decide(problem(device="mps")).backend == "torch"
    assert dispatch.decide(problem(device="meta")).backend == "cpu"


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CPU_MISSING", "no library in this test")
    monkeypatch.setattr(dispatch, "CPU_MISSING", "no library in this test")
    module, x = make("GRU")
    found = fastrnn.explain(module, x)
    assert found.backend == "torch"
    assert found.rejected == [("cpu", "no library in this test")]
    assert module(x, lengths=[5, 3])[0].shape == (5, 2, 4)
    with fastrnn.use_backend("cpu"), pytest.raises(RuntimeError, match="no library in this test"):
        module(x)


def test_explain_what_is_not_ours() -> None:
    found = fastrnn.explain(torch.nn.LSTM(3, 4), torch.randn(5, 2, 3))
    assert found.backend == "torch"
    assert "fastrnn.replace(model)" in found.reason
    with pytest.raises(TypeError, match=r"module: got Linear, expected an LSTM"):
        fastrnn.explain(torch.nn.Linear(3, 4), torch.randn(5, 2, 3))


def doubled(module: torch.nn.Module, name: str) -> torch.nn.Module:
    parametrize.register_parametrization(module, name, torch.nn.Identity())
    return module


class Inherits(torch.nn.LSTM):
    pass


class InheritsGRUCell(torch.nn.GRUCell):
    pass


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "RHN", "LSTMCell", "GRUCell", "RNNCell"])
def test_explain_parametrised_modules_and_subclasses_of_ours(name: str) -> None:
    ours = getattr(fastrnn, name)
    heir = type("Heir", (ours,), {})
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    expected = fastrnn.explain(ours(3, 4), x)
    assert expected.backend == "cpu"
    for module in (doubled(ours(3, 4), weight), heir(3, 4), doubled(heir(3, 4), weight)):
        assert fastrnn.explain(module, x) == expected


def test_explain_a_parametrised_bnlstm() -> None:
    module = fastrnn.BNLSTM(3, 4, max_length=5)
    x = torch.randn(5, 2, 3)
    assert fastrnn.explain(doubled(module, "weight_hh_l0"), x).backend == "cpu"


def test_explain_relatives_of_torchs_modules() -> None:
    x = torch.randn(5, 2, 3)
    found = fastrnn.explain(doubled(torch.nn.LSTM(3, 4), "weight_hh_l0"), x)
    assert found.backend == "torch"
    assert found.reason.startswith("this is torch.nn.LSTM; fastrnn.replace(model) swaps it")
    for module in (Inherits(3, 4), doubled(Inherits(3, 4), "weight_hh_l0")):
        found = fastrnn.explain(module, x)
        assert found.backend == "torch"
        assert found.reason.startswith("Inherits is a subclass of torch.nn's LSTM, which")
    found = fastrnn.explain(InheritsGRUCell(3, 4), x[0])
    assert found.backend == "torch"
    assert found.reason.startswith("InheritsGRUCell is a subclass of torch.nn's GRUCell, which")


def test_explain_takes_what_the_module_takes() -> None:
    module = fastrnn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
    x = torch.randn(2, 5, 3)
    state = (torch.zeros(4, 2, 4), torch.zeros(4, 2, 4))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 2], batch_first=True)
    assert fastrnn.explain(module, x, state).backend == "cpu"
    assert fastrnn.explain(module, packed).backend == "cpu"
    assert fastrnn.explain(module, x[0], reset=torch.ones(5).bool()).backend == "cpu"
    with pytest.raises(ValueError, match="lengths: got values"):
        fastrnn.explain(module, x, lengths=[9, 1])
