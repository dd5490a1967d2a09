"""What the GPU campaign makes of measurements, without a GPU: the fit, grids, reports."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from benchmarks.cases import Case
from benchmarks.gpu import (
    __main__ as command,
)
from benchmarks.gpu import (
    cases,
    grid,
    model,
    plot,
    probes,
    refit,
    report,
    stage,
    steps,
)
from benchmarks.gpu.clock import HostClock
from benchmarks.gpu.stage import COMPLETE, PARTIAL, RED, Stop
from benchmarks.schema import Record, Results
from tests.bnlstm_problems import BNCase, BNProblem
from tests.campaigns import AT, timed
from tests.gpu import on_gpu
from tests.gpu import test_gpu_bnlstm as on_bnlstm
from tests.gpu import test_gpu_modules as on_modules
from tests.gpu import test_gpu_rhn as on_rhn
from tests.problems import Case as LayerCase
from tests.problems import Problem, check
from tests.rhn_problems import Case as HighwayCase
from tests.rhn_problems import Problem as HighwayProblem

ROOT = Path(__file__).resolve().parent.parent
NO_SOURCES = "csrc is not here: an installed wheel is under test"
needs_sources = pytest.mark.skipif(not model.SOURCE.exists(), reason=NO_SOURCES)


# ---- the cost model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not model.SOURCE.exists():
        pytest.skip(NO_SOURCES)
    with model.CostModel(tmp_path_factory.mktemp("model")) as it:
        yield it


def kernels(evaluator: model.CostModel) -> list[model.Step]:
    found = []
    for cell in (0, 1, 3):
        for number_format in (0, 2):
            for backward in (False, True):
                for N, H in (
                    (1, 64),
                    (8, 128),
                    (8, 256),
                    (16, 512),
                    (64, 512),
                    (16, 1024),
                    (64, 1024),
                ):
                    best = evaluator.best(cell, number_format, backward, N, H)
                    found += [best[0]] if best else []
    for exchange in (0, 1, 3):  # the others, at a tile of theirs
        for N in (1, 8):
            found.append(model.Step(0, 0, 0, N, 64, 1, 1, exchange, 64, 1, 1, 0, 2, 1, 1, 1, 1))
    return found


def test_the_model_answers_as_documented(evaluator: model.CostModel) -> None:
    """docs/cuda-kernels.md: LSTM forward, bf16, 8 rows: 0.85 us at H = 256, 1.04 at 1024."""
    evaluator.device((132, 232448, 65536, 90, 15))
    assert evaluator.best(0, 0, False, 8, 256)[1] == pytest.approx(0.85, abs=0.01)
    assert evaluator.best(0, 0, False, 8, 1024)[1] == pytest.approx(1.04, abs=0.01)
    assert evaluator.best(0, 0, False, 8, 2049) is None
    with pytest.raises(ValueError, match="has no constant"):
        evaluator.set({"colour": 1.0})
    with pytest.raises(ValueError, match="not understood"):
        evaluator.ask(["step 1 2 3"])


def test_known_constants_are_found_again(evaluator: model.CostModel) -> None:
    """Times made by other constants than those the fit starts from, with 1% of noise."""
    start = model.read_constants()
    changed = {
        "hop_sentinel": 1100.0, "l2_total": 3000.0, "epilogue": 320.0, "epilogue_element": 3.0,
        "flops_16bit": 2100.0, "mhz": 1980.0,
    }  # fmt: skip
    truth = {**start, **changed}
    steps = kernels(evaluator)
    evaluator.set(truth)
    draw = random.Random(5)
    measured = [
        (step, us * (1 + draw.uniform(-0.01, 0.01)))
        for step, us in zip(steps, evaluator.microseconds(steps), strict=True)
    ]
    probed = {name: truth[name] for name in ("mhz", "flops_16bit", "flops_tf32", "l2_of_sm")}
    found = refit.fit(evaluator, measured, start, probed)
    assert found.worst < 1.03
    assert found.typical < 1.01
    assert max(m / b for _, m, b, _ in found.rows) > 1.2  # it was far off before
    for name in ("hop_sentinel", "l2_total", "epilogue_element", "mhz"):
        assert found.constants[name] == pytest.approx(truth[name], rel=0.15), name
    assert "within a factor of 1.0" in refit.text(found)
    with pytest.raises(ValueError, match="measured is empty"):
        refit.fit(evaluator, [], start)
    with pytest.raises(ValueError, match="no time"):
        refit.fit(evaluator, [(steps[0], 0.0)], start)


@needs_sources
def test_constants_are_data(tmp_path: Path) -> None:
    constants = model.read_constants()
    assert list(constants)[:2] == ["mhz", "flops_16bit"]
    header = tmp_path / "cost_model.h"
    before = model.HEADER.read_text()
    header.write_text(before)
    model.write_constants({**constants, "hop_sentinel": 812.5}, "a test.", header)
    text = header.read_text()
    assert model.read_constants(header) == {**constants, "hop_sentinel": 812.5}
    assert "// Provenance: a test." in text
    assert len(text.splitlines()) == len(before.splitlines())
    with pytest.raises(ValueError, match="constants differ"):
        model.write_constants({"mhz": 1.0}, "a test.", header)
    header.write_text("nothing")
    with pytest.raises(ValueError, match="has no line"):
        model.read_constants(header)


def said(probe: str, **numbers: float) -> dict[str, Any]:
    return {"probe": probe, "ok": True, "message": "", **numbers}


LINES = [
    said("device", sms=132),
    said("hop_sentinel", ctas=16, words=1, cycles=500.0, mhz=1900.0),
    said("hop_sentinel", ctas=132, words=1, cycles=640.0, us=0.33, mhz=1980.0),
    said("hop_flags", ctas=132, words=1) | {"ok": False, "message": "wrong"},
    said("hop_cluster", ctas=8, words=1, cycles=300.0, mhz=1980.0),
    said("hop_cluster", ctas=8, words=513, cycles=1324.0, mhz=1980.0),
    said("read_same", kib=128, ctas=1, rotated=0, bytes_per_cycle=60.0),
    said("read_same", kib=128, ctas=132, rotated=1, bytes_per_cycle=30.0),
    said("multiply_tf32", flops_per_cycle=1300.0),
]


def test_what_probes_say_of_constants() -> None:
    found = refit.probed_constants({"probes": LINES})
    assert found == {
        "mhz": 1980.0,
        "hop_sentinel": 640.0,
        "hop_cluster": 300.0,
        "dsmem": pytest.approx(4 * 8 * 512 / 1024),
        "l2_of_sm": 60.0,
        "l2_total": 30.0 * 132,
        "flops_tf32": 1300.0,
    }
    assert refit.probed_constants({}) == {}
    text = "some noise\n" + "\n".join(json.dumps(line) for line in LINES)
    assert probes.parse(text.splitlines()) == LINES
    assert probes.red(LINES) == ["hop_flags: wrong"]


# ---- grids ---------------------------------------------------------------------------------------


def host(backends: dict[str, str]) -> grid.Setting:
    return grid.Setting("cpu", HostClock(), backends, budget=0.0, min_rounds=1)


def test_a_case_is_verified_and_timed_and_refusals_are_asked_for() -> None:
    case = Case(
        "lstm", "training", 400, 3, 7, "wide",
        contestants=("fastrnn", "fastrnn-triton", "torch", "flashrnn"),
    )  # fmt: skip
    record = grid.run_case(case, host({"fastrnn": "cpu", "fastrnn-triton": "cuda"}))
    assert record.ok, record.error
    assert set(record.timings) == {"fastrnn", "torch"}
    assert set(record.details["us_per_step"]) == {"fastrnn", "torch"}
    assert "the input is on cpu" in record.details["refused"]["fastrnn-triton"]
    assert "not installed" in record.details["refused"]["flashrnn"]
    assert record.speedup("torch") is not None
    assert record.backends["fastrnn"] == "cpu"
    assert record.checks["fastrnn"]["ok"]
    again = Record.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again.details == record.details
    assert "fastrnn-triton refused" in grid.line(record)


@pytest.mark.parametrize("cell", ["rhn", "bnlstm"])
def test_loops_run_in_another_dtype(cell: str) -> None:
    case = Case(
        cell,
        "training",
        4,
        5,
        6,
        "loops",
        depth=2,
        dtype="bfloat16",
        contestants=("fastrnn", "loop"),
    )
    record = grid.run_case(case, host({"fastrnn": "cpu"}))
    assert record.ok, (record.error, record.checks)
    assert set(record.timings) == {"fastrnn", "loop"}
    assert record.details["cudnn"] == ""


def test_a_red_contestant_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        "gru", "forward", 5, 3, 7, "wide", contestants=("fastrnn", "fastrnn-triton", "torch")
    )
    honest = grid.Field.check

    def spoiled(self: Any) -> Any:
        found = honest(self)
        found[wrong] = {**found[wrong], "ok": False, "message": "wrong"}
        return found

    monkeypatch.setattr(grid.Field, "check", spoiled)
    wrong = "fastrnn-triton"
    record = grid.run_case(case, host({"fastrnn": "cpu", wrong: "reference"}))
    assert record.ok
    assert set(record.timings) == {"fastrnn", "torch"}
    assert record.details["red"] == {wrong: "wrong"}
    wrong = "fastrnn"
    record = grid.run_case(case, host({"fastrnn": "cpu", "fastrnn-triton": "reference"}))
    assert not record.ok
    assert record.speedup("torch") is None
    assert "fastrnn RED: wrong" in grid.line(record)
    assert "x" not in grid.line(record).partition("torch")[2]


def test_grids_resume_and_leave_out_what_killed_them(tmp_path: Path) -> None:
    many = [Case("lstm", "forward", 5, n, 7, "wide") for n in range(1, 6)]
    ran: list[int] = []

    def runner(case: Case, setting: grid.Setting) -> Record:
        ran.append(case.N)
        if case.N == 2:
            raise grid.Broken(Record(case, error="CUDA error: an illegal memory access"))
        if case.N == 3:
            raise KeyboardInterrupt  # as if the process had been ended
        return timed(case, fastrnn=1.0, torch=2.0)

    def go(stop: Stop) -> bool:
        return grid.run(many, tmp_path, stop, AT, host({}), runner)

    with pytest.raises(grid.Broken):
        go(Stop(100))
    with pytest.raises(KeyboardInterrupt):
        go(Stop(100))
    assert not go(Stop(0))
    assert go(Stop(100))
    assert ran == [1, 2, 3, 4, 5]
    records = Results.load(tmp_path / "grid.json").records
    assert [record.error for record in records][1:3] == [
        "CUDA error: an illegal memory access",
        "the process did not survive this case",
    ]
    assert go(Stop(0))  # nothing is left
    assert (tmp_path / "grid.csv").read_text().count("\n") == 1 + 2 * 3


def test_sticky_errors_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(grid, "Field", fails)
    case = Case("lstm", "forward", 5, 1, 7, "wide")
    message = "out of memory"
    assert "out of memory" in grid.run_case(case, host({})).error
    message = "CUDA error: unspecified launch failure"
    with pytest.raises(grid.Broken):
        grid.run_case(case, host({}))


def test_stop() -> None:
    now = [0.0]
    stop = Stop(10, now=lambda: now[0])
    assert not stop
    assert stop.left() == 10
    now[0] = 11
    assert stop
    assert stop.left() == 0


# ---- results -------------------------------------------------------------------------------------


def filled(folder: Path, evaluator: model.CostModel) -> Results:
    """A folder as a campaign leaves it, with made-up numbers."""
    results = Results(AT, {"verify_only": False})
    for case in cases.GRIDS["grid-16bit"]()[:6]:
        record = timed(case, fastrnn=1e-3, torch=3e-3)
        record.details = {"refused": {}, "red": {}, "cudnn": "STANDARD"}
        results.records.append(record)
    for case in cases.GRIDS["grid-loops"]()[:2]:  # one of them is refused by the CUDA backend
        ours = {"fastrnn_triton": 1e-3} | ({"fastrnn": 2e-3} if case.cell == "rhn" else {})
        results.records.append(timed(case, **ours, loop=5e-2))
    for step, case in zip(kernels(evaluator), steps.cases(), strict=False):
        record = timed(case, fastrnn=1e-3)
        record.backends["fastrnn"] = "a plan"
        us = evaluator.microseconds([step])[0]
        record.details = {
            "step": list(vars(step).values()), "model_us_per_step": us,
            "us_per_step": {"fastrnn": 1.3 * us},
        }  # fmt: skip
        results.records.append(record)
    results.save(folder / "grid.json")
    stage.save(folder / "probes.json", {"probes": LINES})
    stage.save(
        folder / "tests.json", {"tests": {"a": {"outcome": "failed", "message": "", "seconds": 1}}}
    )
    state = {"one": {"status": "complete", "seconds": 3.0, "runs": 1, "message": ""}}
    stage.save(folder / "state.json", {"environment": AT, "stages": state})
    return results


def test_fit_table_report_and_figures(tmp_path: Path, evaluator: model.CostModel) -> None:
    evaluator.set(model.read_constants())
    results = filled(tmp_path, evaluator)
    assert command.inside("refit", tmp_path, Stop(60)) == COMPLETE
    fitted = json.loads((tmp_path / "refit.json").read_text())
    assert fitted["worst_factor"] < 1.2
    assert set(fitted["constants"]) == set(model.read_constants())
    assert fitted["source"] == "A GPU, 2000-01-01 00:00 UTC"
    found = json.loads((tmp_path / "dispatch.json").read_text())
    assert (found["name"], found["sms"], found["verified"]) == ("A GPU", 132, [])
    assert len(found["rows"]) == 8  # six beside torch, two beside loops
    assert found["rows"][0] == {
        "cell": "lstm", "format": "bfloat16", "training": False, "directions": 1, "packed": False,
        "depth": 1, "T": 1024, "N": 16, "H": 768, "us": {"cuda": 0.9766, "torch": 2.9297},
        "call": {},
    }  # fmt: skip
    text = report.text(tmp_path)
    for words in (
        "A GPU, 132 SMs", "hop_flags", "RED", "Tests: 1 failed", "FAILED a", "Time steps",
        "1.30", "Targets", "LSTM forward - wide", "3.00",
    ):  # fmt: skip
        assert words in text, words
    drawn = plot.draw_all(results, tmp_path / "img")
    assert [path.name for path in drawn] == ["gpu_speedup.svg", "gpu_steps.svg"]
    first = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in plot.draw_all(results, tmp_path / "img")] == first
    with pytest.raises(ValueError, match="neither"):
        plot.draw_all(Results(AT, {}), tmp_path)
    assert command.main(["--stage", "report", "--results", str(tmp_path)]) == 0


def test_nothing_to_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.inside("refit", tmp_path, Stop(60)) == 3
    assert "nothing was timed yet" in capsys.readouterr().err


def test_forced_stages_forget_their_results(tmp_path: Path, evaluator: model.CostModel) -> None:
    filled(tmp_path, evaluator)
    wide = next(each for each in command.STAGES if each.name == "grid-16bit")
    suite = next(each for each in command.STAGES if each.name == "tests")
    command._forget([wide, suite], tmp_path)
    groups = {record.case.group for record in Results.load(tmp_path / "grid.json").records}
    assert groups == {"loops", "steps"}
    assert json.loads((tmp_path / "tests.json").read_text())["tests"] == {}


SUITE = """
import pytest
import torch
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("the reason")
"""


def test_the_test_stage_resumes(tmp_path: Path) -> None:
    """In processes of their own: pytest inside pytest."""
    (tmp_path / "test_some.py").write_text(SUITE)
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import suite; "
        "from benchmarks.gpu.stage import Stop; here = Path(sys.argv[1]); "
        "sys.exit(suite.run([here / 'test_some.py'], here, Stop(float(sys.argv[2]))))"
    )

    def go(seconds: float) -> int:
        words = [sys.executable, "-c", code, str(tmp_path), str(seconds)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode

    def outcomes() -> list[str]:
        found = json.loads((tmp_path / "tests.json").read_text())["tests"]
        return [each["outcome"] for each in found.values()]

    assert go(0) == PARTIAL
    assert go(60) == RED
    assert outcomes() == ["passed", "failed", "skipped"]
    held = json.loads((tmp_path / "tests.json").read_text())
    assert "the reason" in str(held)
    first = next(iter(held["tests"]))
    held["tests"][first]["outcome"] = "running"  # its process died
    stage.save(tmp_path / "tests.json", held)
    assert go(60) == RED
    assert outcomes() == ["failed", "failed", "skipped"]


# ---- the tests for a GPU, with the CPU in its place ----------------------------------------------


@pytest.mark.parametrize("name", on_modules.MODULES)
def test_module_checks_hold_on_the_cpu(name: str) -> None:
    call = on_modules.CALLS[len(name) % 3]
    on_modules.check_module("cpu", name, torch.bfloat16, call, where="cpu")


def test_highway_checks_hold_on_the_cpu() -> None:
    case = HighwayCase(torch.bfloat16, T=4, N=3, H=9, s_mask="untied", lengths=True)
    on_rhn.verify(HighwayProblem(case), "bf16", "cpu")
    p = HighwayProblem(case)
    p.s_mask = None  # caught: the problem that is solved is not the one checked
    got = on_gpu.on_host(on_rhn.solve_ops(on_gpu.moved(p, "cpu")))
    with pytest.raises(AssertionError, match="beyond the rule"):
        on_rhn.check(HighwayProblem(case), got)


def test_batch_norm_checks_hold_on_the_cpu() -> None:
    case = BNCase(T=4, N=3, H=9, lengths=True, reset=True)
    on_bnlstm.verify(BNProblem(case), "bf16x3", "cpu")
    p = BNProblem(case)
    p.weights[1] = p.weights[1] * 2  # caught: the problem that is solved is not the one checked
    got = on_gpu.on_host(on_bnlstm.solve_ops(on_bnlstm.on_device(p, "cpu")))
    with pytest.raises(AssertionError, match="beyond the rule"):
        on_bnlstm.check(BNProblem(case), got)


def test_layer_checks_hold_on_the_cpu() -> None:
    case = LayerCase("gru", torch.bfloat16, T=4, N=3, H=9, layout="packed")
    on_gpu.verify(Problem(case), "bf16", "cpu")
    p = Problem(case)
    p.weights[0] = p.weights[0] * 2  # caught: the problem that is solved is not the one checked
    there, honest = on_gpu.moved(p, "cpu"), Problem(case)
    with pytest.raises(AssertionError, match="beyond the rule"):
        check(honest, on_gpu.on_host(on_gpu.solve(there)))


# ---- compiled code -------------------------------------------------------------------------------


@needs_sources
def test_the_probes_compile(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("cuda_gate", ROOT / "scripts" / "cuda_gate.py")
    gate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gate)
    nvcc = gate.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not in PATH or CUDA_HOME")
    _, text, error = gate.compile_one(nvcc, probes.SOURCE, "90a", tmp_path)
    assert not error
    complaints, registers = gate.judge(text)
    assert not complaints
    assert sum("wrapper" in name for name in registers) == 15
    assert probes.compile_command(nvcc, "90a", tmp_path / "probes")[0] == nvcc
