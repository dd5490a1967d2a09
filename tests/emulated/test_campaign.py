"""The GPU campaign's stage `steps` on emulated kernels: calls, check, what it asks the model."""

from __future__ import annotations

import pytest

pytest.importorskip("numpy")
from benchmarks.cases import Case
from benchmarks.gpu import steps
from benchmarks.gpu.clock import HostClock
from benchmarks.gpu.grid import Setting
from benchmarks.gpu.model import CostModel, Step
from fastrnn.backends import cuda_native


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    ("cell", "exchange"), [("lstm", "sentinel"), ("lstm", "flags"), ("gru", ""), ("rnn", "cluster")]
)
def test_a_step_is_verified_timed_and_modelled(
    cell: str, exchange: str, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = Case(cell, mode, 8, 3, 40, "steps", I=8, dtype="bfloat16", option=exchange)
    with CostModel(tmp_path_factory.getbasetemp() / "model") as model:
        record = steps.run_case(case, Setting("cpu", HostClock(), budget=0, min_rounds=1), model)
        assert record.ok, (record.error, record.checks)
        step = Step(*record.details["step"])
        assert record.details["model_us_per_step"] == model.microseconds([step])[0] > 0
    assert "fastrnn" in record.details["us_per_step"]
    assert exchange in record.backends["fastrnn"]
    assert (step.N, step.H, step.backward) == (3, 40, mode == "training")


def test_what_no_kernel_takes_is_refused() -> None:
    case = Case("gru", "forward", 8, 3, 40, "steps", I=8, dtype="bfloat16", option="flags")
    with CostModel() as model:
        record = steps.run_case(case, Setting("cpu", HostClock()), model)
    assert "none with exchange flags" in record.details["refused"]["fastrnn"]
    assert not record.timings
    assert cuda_native.emulated()
