"""The benchmark machinery: cases, statistics, verification, schema, targets, plots, the example."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
from benchmarks import (
    cases,
    driver,
    loops,
    memory,
    peers,
    plot,
    report,
    roofline,
    schema,
    targets,
    timing,
    verify,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.schema import Record, Results
from benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"T": 5, "N": 3, "H": 7}
VERSIONS = {"fastrnn": "0.1", "torch": "2.13", "onnxruntime": "1.31", "python": "3.11"}
MACHINE = {"cpu": "A CPU", "cpu_slug": "a-cpu", "cores": 2, "threads": 2, "isa": "avx2"}
ENVIRONMENT = {**MACHINE, **VERSIONS, "system": "Linux", "date": "2000-01-01 00:00 UTC"}
TARGETS = 48
FULL = sorted(schema.RESULTS.glob("*/full.json"))


def small(cell: str, mode: str = "forward", **changes: Any) -> Case:
    return replace(Case(cell, mode, **SMALL), **changes)


def timed(
    case: Case, ours: float, theirs: float, *, ok: bool = True, backend: str = "cpu"
) -> Record:
    checks = {"fastrnn": {"ok": ok, "worst": 0.5, "tensor": "y", "message": "" if ok else "wrong"}}
    timings = {"fastrnn": Timing(ours, ours, ours, 9), "torch": Timing(theirs, theirs, theirs, 9)}
    return Record(case, checks, timings, {"fastrnn": backend}, bound_seconds=ours / 2)


def some_results() -> Results:
    records = [
        timed(Case(cell, mode, steps, batch, 128), 1e-3, 2e-3)
        for cell in cases.CELLS
        for mode in ("forward", "training")
        for steps, batch in ((1, 1), (50, 128))
    ]
    peaks = {"fastrnn": 40 << 20, "torch": 80 << 20, "fastrnn-recompute": 20 << 20}
    recompute = ("fastrnn", "fastrnn-recompute", "torch")
    sized = [(Case("lstm", "training", 200, 32, 512, "memory", contestants=recompute), peaks)]
    ceiling = roofline.Roofline(2, 1e11, "a test", {1 << 20: 1e10})
    settings = vars(driver.quick_settings(2))
    return Results(ENVIRONMENT, settings, ceiling.to_dict(), records, sized)


# ---- cases


def test_registry_is_valid() -> None:
    everything = cases.registry()
    ids = [case.id for case in everything]
    assert len(set(ids)) == len(ids)
    for case in everything:
        assert case.cell in cases.CELLS + cases.LOOP_CELLS
        assert case.mode in cases.MODES
        assert case.group in cases.GROUPS
        assert case.contestants[0].startswith("fastrnn")
        assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    quick = cases.select(quick=True)
    assert {case.group for case in quick} == set(cases.GROUPS)
    assert len(quick) < len(everything) / 4


def test_grid_covers_the_promised_range() -> None:
    grid = cases.grid()
    assert {case.T for case in grid} >= {1, 784}
    assert {case.N for case in grid} >= {1, 128}
    assert {case.H for case in grid} >= {32, 1024}
    assert any(case.H % 8 and case.N % 8 for case in grid)


def test_only_narrows_and_says_what_it_does_not_know() -> None:
    chosen = cases.select(quick=False, only="gru/training/*")
    assert {(case.cell, case.mode) for case in chosen} == {("gru", "training")}
    assert len(cases.select(quick=False, only="lstm/forward/T100-N1-H512")) >= 1
    with pytest.raises(ValueError, match="'lstmm' matches no case of --quick"):
        cases.select(quick=True, only="lstmm")


def test_flops_of_a_known_case() -> None:
    case = Case("lstm", "forward", 100, 32, 256)
    assert case.flops == 2 * 100 * 32 * 4 * 256 * 512
    assert replace(case, mode="training").flops == 3 * case.flops


# ---- verification


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"bidirectional": True}, {"ragged": "lengths"}, {"ragged": "packed"}, {"I": 1}],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_contestants_agree(cell: str, mode: str, changes: dict[str, Any]) -> None:
    case = small(cell, mode, **changes)
    problem = peers.Problem(case)
    names = ["fastrnn"] + (["onnx"] if mode == "forward" and "ragged" not in changes else [])
    truth, peer = verify.truth(case, problem), verify.peer_outputs(case, problem, "fastrnn")
    for name in names:
        result = verify.check(peers.build(case, name, problem), truth, peer)
        assert result.ok, result.message


def test_training_verifies_every_gradient() -> None:
    case = small("lstm", "training", proj=4)
    problem = peers.Problem(case)
    weights = {f"d{name}" for name in problem.weights}
    assert set(verify.truth(case, problem)) == {"y", "h_n", "c_n", "dx", *weights}


@pytest.mark.parametrize("tensor", ["y", "h_n", "dweight_hh_l0", "dx"])
@pytest.mark.parametrize("damage", ["value", "nan", "shape", "missing"])
def test_verification_goes_red_on_a_planted_wrong_result(tensor: str, damage: str) -> None:
    case = small("gru", "training")
    problem = peers.Problem(case)
    truth, peer = verify.truth(case, problem), verify.peer_outputs(case, problem, "fastrnn")
    contestant = peers.build(case, "torch", problem)
    sound = contestant.outputs

    def planted() -> peers.Outputs:
        outputs = {name: value.detach().clone() for name, value in sound().items()}
        if damage == "missing":
            del outputs[tensor]
        elif damage == "shape":
            outputs[tensor] = outputs[tensor][..., :1]
        else:
            outputs[tensor].view(-1)[-1] += float("nan") if damage == "nan" else 1e-3
        return outputs

    assert verify.check(contestant, truth, peer).ok
    contestant.outputs = planted
    result = verify.check(contestant, truth, peer)
    assert not result.ok
    assert tensor in result.message


def test_no_speedup_on_a_red_check() -> None:
    record = timed(small("lstm"), 1e-3, 2e-3, ok=False)
    assert record.speedup("torch") is None
    assert record.share() is None
    results = some_results()
    results.records = [record]
    printed = report.text(results)
    assert "RED" in printed
    assert "2.00" not in printed.split("Targets")[0]


def test_what_a_library_raises_becomes_a_red_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(driver, "build", broken)
    settings = replace(driver.quick_settings(1), verify_only=True)
    ceiling = roofline.Roofline(1, 1e11, "a test", {1 << 20: 1e10})
    record = driver.run_case(small("lstm"), settings, ceiling, driver.Workers(1))
    assert not record.ok
    assert record.error == "RuntimeError: planted"


def test_a_run_behind_its_limit_spends_less_on_what_is_left() -> None:
    settings = replace(driver.quick_settings(1), limit=100.0)
    assert driver.paced(settings, 0.0, 0.0, 50.0) is settings
    assert driver.paced(settings, 50.0, 10.0, 10.0) is settings  # ends at 100 s
    late = driver.paced(settings, 60.0, 10.0, 10.0)  # would end at 120 s: 40 s are left for 60
    assert late.budget == pytest.approx(settings.budget * 40 / 60)
    assert late.patience == 1.0
    over = driver.paced(settings, 150.0, 10.0, 10.0)
    assert 0 < over.budget < late.budget
    assert over.min_rounds == settings.min_rounds


# ---- roofline, targets, report


def test_roofline_binds_where_it_should() -> None:
    ceiling = roofline.Roofline(1, 1e11, "a test", {1 << 20: 1e10})
    wide = Case("lstm", "forward", 100, 64, 512)
    assert ceiling.bound_seconds(wide) == pytest.approx(wide.flops / 1e11)
    streamed = 4 * 4 * 512 * 512 / 1e10
    gemm = 2 * 100 * 4 * 512 * 512 / 1e11
    single = Case("lstm", "forward", 100, 1, 512)
    assert ceiling.bound_seconds(single) == pytest.approx(100 * streamed + gemm)
    training = ceiling.bound_seconds(replace(wide, mode="training"))
    assert training == pytest.approx(3 * wide.flops / 1e11)
    assert roofline.Roofline.from_dict(ceiling.to_dict()).bandwidths == ceiling.bandwidths


def test_ceilings_of_a_case_are_medians_of_its_own_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        flops, bytes = itertools.cycle([4e10, 5e10, 9e10]), itertools.cycle([9e9, 4e9, 5e9])

        def measure_peak_flops(self, threads: int, seconds: float) -> float:
            return next(self.flops)

        def measure_bandwidth(self, threads: int, size: int, seconds: float) -> float:
            assert size == 4 << 20
            return next(self.bytes)

    native = Native()
    monkeypatch.setattr(roofline, "_native", lambda: native)
    # A turn that is taken again, because the machine is busy, would have other figures.
    monkeypatch.setattr(timing, "foreign_limit", lambda wall: float("inf"))
    ceiling = roofline.Roofline(1, 1e11, "a test", {1 << 20: 1e12, 4 << 20: 1e10, 8 << 20: 1e12})
    wide, single = Case("lstm", "forward", 9, 64, 512), Case("lstm", "forward", 9, 1, 512)
    assert set(ceiling.probes(wide)) == {roofline.PEAK}
    probes = ceiling.probes(single)
    assert set(probes) == {roofline.PEAK, f"{roofline.BANDWIDTH}{4 << 20}"}
    timings = timing.measure(probes, budget=0.0, min_rounds=3)
    own = ceiling.meanwhile(timings)
    assert own.peak_flops == pytest.approx(5e10)
    assert own.bandwidths == pytest.approx({**ceiling.bandwidths, 4 << 20: 5e9})
    assert own.bound_seconds(wide) == pytest.approx(2 * ceiling.bound_seconds(wide))
    assert own.of(probes) == pytest.approx(dict(zip(probes, (5e10, 5e9), strict=True)))


def test_probes_take_turns_with_the_contestants_and_are_none_of_them() -> None:
    settings = replace(driver.quick_settings(1), budget=0.0, min_rounds=1)
    ceiling = roofline.Roofline(1, 1e15, "a test", {4096: 1e15})  # absurd: what counts is measured
    record = driver.run_case(small("lstm"), settings, ceiling, driver.Workers(1))
    assert not record.error
    assert set(record.timings) == set(record.case.contestants)
    assert 1e8 < record.details["ceiling"][roofline.PEAK] < 1e13
    assert record.bound_seconds is not None
    assert record.bound_seconds > 10 * ceiling.bound_seconds(record.case)


def test_layer_norm_is_measured_against_the_worst_of_four_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = replace(small("lstm"), mode="training", group="layer_norm", option="layer_norm")
    problem = loops.LoopProblem(case)
    expected = loops.truth(case, problem)
    drawn: list[Any] = []
    run = loops._run
    monkeypatch.setattr(loops, "_run", lambda each: drawn.append(run(each)) or drawn[-1])
    peer = loops.peer_outputs(case, problem, expected)
    assert len(drawn) == 4
    for name, truth in expected.items():
        errors = [verify.error(each[name], truth) for each in drawn]
        assert verify.error(peer[name], truth) == max(errors), name
        assert len(set(errors)) > 1, name


def test_targets_pass_miss_and_not_measured() -> None:
    outcomes = targets.evaluate(some_results())
    assert len(outcomes) == TARGETS
    by_text = {outcome.text: outcome for outcome in outcomes}
    assert by_text["LSTM forward, N=1: against torch.nn"].status == "pass"
    assert by_text["GRU training, N=1: against torch.nn"].status == "MISS"
    assert by_text["bf16 weights: against torch's bfloat16 LSTM"].status == "not measured"
    recompute = by_text["LSTM recompute=True, T=200 N=32 H=512: peak memory of torch.nn's"]
    assert (recompute.value, recompute.status) == (0.25, "pass")


def test_a_shape_handed_over_keeps_its_number_and_is_marked() -> None:
    record = timed(small("lstm"), 1.0, 0.9, backend="torch")
    assert record.speedup("torch") == 0.9
    assert record.to_dict()["speedup_vs_torch"] == 0.9
    results = some_results()
    results.records = [record]
    assert "torch's kernel" in report.text(results)
    listed = report.slower(results.records)
    assert record.case.id in listed
    assert "0.90" in listed
    assert "torch's kernel" in listed


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.parent.name)
def test_peers_ahead_are_named_in_the_documents(path: Path) -> None:
    """docs/not-faster.md has the table of each committed full run."""
    results = Results.load(path)
    table = report.ahead(results)
    rated = [(record, targets.vs_best(record)) for record in results.records]
    behind = [(r, record.case.id) for record, r in rated if r is not None and r < 0.95]
    named = [row.split("`")[1] for row in table.splitlines()[2:]]
    assert named == [case for _, case in sorted(behind)]  # the slowest first
    document = Path(plot.IMAGES.parent / "not-faster.md").read_text()
    assert table in document, f"python -m benchmarks.report {path} --ahead"


def test_the_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "full.json"
    results = some_results()
    results.records = [timed(small("lstm"), 1.0, 0.9), timed(small("gru"), 1.0, 0.97)]
    results.records[0].timings["onnx"] = Timing(0.5, 0.5, 0.5, 9, disturbed=True)
    results.save(path)
    assert report.main([str(path)]) == 0
    assert report.slower(results.records) in capsys.readouterr().out
    assert report.main([str(path), "--ahead"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2:] == ["| `lstm/forward/T5-N3-H7` | ONNX RT | 0.50 | disturbed |"]


def test_slower_cases_stay_in_the_report() -> None:
    results = some_results()
    results.records.append(timed(Case("rnn", "forward", 3, 2, 33), 2e-3, 1e-3))
    assert "rnn/forward/T3-N2-H33" in report.slower(results.records)


# ---- files


def test_schema_round_trip(tmp_path: Path) -> None:
    results = some_results()
    path = tmp_path / "deep" / "full.json"
    results.save(path)
    assert Results.load(path).to_dict() == results.to_dict()
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.CSV_COLUMNS
    assert len(rows) == 2 * len(results.records) + 3
    assert not list(path.parent.glob("*.part"))


def test_schema_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        Results.from_dict({**some_results().to_dict(), "schema": 0})


def test_plot_from_a_small_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "full.json"
    some_results().save(path)
    assert plot.main([str(path), "--out", str(tmp_path / "a")]) == 0
    assert plot.main([str(path), "--out", str(tmp_path / "b")]) == 0
    assert "speedup.svg" in capsys.readouterr().out
    for name in ("speedup.svg", "roofline.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    quiet = (tmp_path / "a" / "speedup.svg").read_text()
    shaken = some_results()
    shaken.records[0].timings["torch"].disturbed = True
    plot.draw_all(shaken, tmp_path / "c")
    hollow = (tmp_path / "c" / "speedup.svg").read_text()
    assert hollow.count("fill: #ffffff; stroke: #1f77b4") == 1
    assert "fill: #ffffff; stroke: #1f77b4" not in quiet
    with pytest.raises(ValueError, match="no timed grid case"):
        plot.draw_all(replace(some_results(), records=[]), tmp_path)


def test_committed_results_can_be_read() -> None:
    for path in sorted(schema.RESULTS.glob("*/*.json")):
        if not path.stem.startswith("models"):
            results = Results.load(path)
            assert results.records
            rows = [re.split(r"\s{2,}", line) for line in report.text(results).splitlines()]
            for record in results.records:
                medians = [report._ms(each.median) for each in record.timings.values()]
                wanted = [report._short(record.case), *medians]
                assert any(row[1:] and set(wanted) <= set(row) for row in rows)
            continue
        # Of `python -m benchmarks.models`: whole models have no case.
        written = json.loads(path.read_text())
        assert (written["schema"], written["kind"]) == (schema.SCHEMA, "models")
        assert written["environment"].keys() >= {"cpu", "threads", "isa", "torch", "date"}
        timings = [timing for each in written["models"] for timing in each["timings"].values()]
        assert timings
        assert all(timing["median"] > 0 for timing in timings)


def test_cpu_slug() -> None:
    assert schema.slug("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz") == "intel-xeon-e5-2690-v4"
    assert schema.slug("AMD EPYC 9R14 96-Core Processor") == "amd-epyc-9r14-96-core"


# ---- the whole program


def test_list_prints_ids(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--full", "--only", "lstm/step"]) == 0
    assert capsys.readouterr().out.split() == ["lstm/step/T1-N1-H256"]


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--threads", "0"]], ids=" ".join)
def test_bad_arguments_end_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_one_case_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    out = tmp_path / "one.json"
    try:
        arguments = ["--only", "rnn/forward/T1-N1-H128", "--threads", "1", "--out", str(out)]
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "RNN forward" in printed
    assert "Targets" in printed
    [record] = Results.load(out).records
    assert set(record.timings) == {"fastrnn", "torch", "onnx"}
    assert record.ok


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_peak_memory_sees_the_saved_activations() -> None:
    case = Case("lstm", "training", 64, 64, 128, "memory")
    [(_, peaks)] = memory.measure([case], threads=1)
    tape = 64 * 64 * 5 * 128 * 4  # gates and cells
    for name in ("fastrnn", "torch"):
        assert tape <= peaks[name] <= 10 * tape
