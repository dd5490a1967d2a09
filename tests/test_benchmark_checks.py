"""What a benchmark's check and its counts see: repeated calls, ragged batches, shaken ceilings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
import fastrnn
from benchmarks import driver, loops, models, peers, plot, report, roofline, schema, timing, verify
from benchmarks.cases import Case
from benchmarks.schema import Record, Results
from benchmarks.timing import Timing, Turn
from tests.campaigns import AT

DOCS = plot.IMAGES.parent


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_call_that_is_wrong_from_the_second_time_on_is_red(mode: str) -> None:
    """A call of a shape seen before takes a way of its own, and that one is timed."""
    case = Case("lstm", mode, 5, 3, 7)
    problem = peers.Problem(case)
    truth, peer = verify.truth(case, problem), verify.peer_outputs(case, problem, "fastrnn")
    contestant = peers.build(case, "torch", problem)
    sound, calls = contestant.outputs, []

    def outputs() -> peers.Outputs:
        calls.append(1)
        found = {name: value.detach().clone() for name, value in sound().items()}
        found["y"][-1] += 1e-3 * (len(calls) > 1)
        return found

    contestant.outputs = outputs
    result = verify.check(contestant, truth, peer)
    assert not result.ok
    assert "error of y" in result.message


BESIDE = [
    Case("rhn", "training", 4, 5, 7, "loops", depth=2, contestants=("fastrnn", "loop-compiled")),
    Case("bnlstm", "training", 4, 5, 7, "loops",
         contestants=("fastrnn", "loop", "loop-compiled", "fastrnn-plain")),
    Case("lstm", "training", 4, 5, 7, "regularised", option="update",
         contestants=("fastrnn", "fastrnn-plain", "loop", "loop-compiled")),
    Case("gru", "training", 4, 5, 7, "layer_norm", option="layer_norm",
         contestants=("fastrnn", "loop", "fastrnn-plain")),
]  # fmt: skip


@pytest.mark.parametrize("case", BESIDE, ids=lambda case: case.cell)
def test_what_is_beside_a_loop_is_verified_as_it_is_timed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[list[bool]] = []  # for each compilation whether a call was a timed one
    timed: list[bool] = []

    def compile(step: Any, **_: Any) -> Any:
        calls: list[bool] = []
        compiled.append(calls)
        return lambda *args: calls.append(bool(timed)) or step(*args)

    def time(contestants: Sequence[peers.Contestant], *_: Any) -> dict[str, Timing]:
        timed.append(True)
        for each in contestants:
            each.call()
        return {each.name: Timing(1.0, 1.0, 1.0, 1) for each in contestants}

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(driver, "_time", time)
    monkeypatch.setattr(roofline.Roofline, "probes", lambda *_: {})
    settings, ceiling = driver.quick_settings(1), roofline.Roofline(1, 1e11, "a test", {4096: 1e10})
    record = driver.run_case(case, settings, ceiling, driver.Workers(1))
    assert record.ok, (record.error, record.checks)
    names = [name for name in case.contestants if name != "loop"]
    assert list(record.checks) == names
    assert set(record.timings) == set(case.contestants)
    assert len(compiled) == ("loop-compiled" in names)
    assert all({True, False} == set(calls) for calls in compiled)

    timed.clear()
    build = loops.build
    for wrong in names:

        def planted(case: Case, name: str, *args: Any, wrong: str = wrong) -> peers.Contestant:
            contestant = build(case, name, *args)
            sound = contestant.outputs
            if name == wrong:
                contestant.outputs = lambda: {**sound(), "h_n": sound()["h_n"] + 1e-3}
            return contestant

        monkeypatch.setattr(loops, "build", planted)
        record = driver.run_case(case, settings, ceiling, driver.Workers(1))
        assert not record.error
        assert [name for name in names if not record.checks[name]["ok"]] == [wrong]
        assert "error of h_n" in record.checks[wrong]["message"]
        assert not record.ok
        assert not record.timings
        assert not timed


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_output_of_a_step_is_verified(cell: str) -> None:
    case = Case(cell, "step", 1, 1, 8, "step", contestants=("fastrnn", "torch-cell"))
    problem = peers.Problem(case)
    truth = verify.truth(case, problem)
    assert {"y", "h_n"} <= set(truth)
    ours = peers.build(case, "fastrnn", problem)
    assert verify.check(ours, truth, verify.peer_outputs(case, problem, "fastrnn")).ok
    assert set(ours.outputs()) == set(truth)


def test_the_backend_is_that_of_the_switch_under_which_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switch, seen = getattr(torch.backends.mkldnn, "rnn", None), []
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this torch has no switch for bf16 weights of recurrent layers")

    def explain(*_: object) -> SimpleNamespace:
        seen.append((switch.fp32_precision, torch.is_grad_enabled()))
        return SimpleNamespace(backend="cpu")

    monkeypatch.setattr(fastrnn, "explain", explain)
    before, case = switch.fp32_precision, Case("lstm", "forward", 2, 2, 7, "bf16")
    for name in ("fastrnn", "fastrnn-bf16"):
        contestant = peers.build(case, name)
        with contestant.context():
            assert seen.pop() == (switch.fp32_precision, False)
    assert switch.fp32_precision == before


def test_padding_is_no_work() -> None:
    dense = Case("gru", "training", 100, 32, 64)
    for ragged in ("lengths", "packed"):
        case = replace(dense, ragged=ragged)
        lengths = sorted(peers.Problem(case).lengths.tolist())
        assert lengths == sorted(case.lengths)
        assert (lengths[0], lengths[-1]) == (25, 100)
        assert case.flops == pytest.approx(dense.flops * sum(lengths) / 3200)
    assert replace(dense, ragged="packed", N=1, T=3).lengths == [1]
    assert dense.lengths == [100] * 32


def test_a_shaken_ceiling_is_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Shaken:
        def turn(self) -> Turn:
            return Turn([1e-9], 1.0, True)

    calm = lambda self: Turn([1e-3], 0.0, False)  # noqa: E731
    monkeypatch.setattr(timing.LocalRunner, "turn", calm)
    monkeypatch.setattr(roofline.Roofline, "probes", lambda *_: {roofline.PEAK: Shaken()})
    settings = replace(driver.quick_settings(1), budget=0.0, min_rounds=1)
    ceiling = roofline.Roofline(1, 1e11, "a test", {4096: 1e10})
    record = driver.run_case(Case("gru", "forward", 5, 3, 7), settings, ceiling, driver.Workers(1))
    assert not record.error
    assert not record.disturbed
    assert record.share_disturbed
    assert Record.from_dict(record.to_dict()).share_disturbed
    assert report._marks(record) == "roofline disturbed"
    quiet = replace(record, details={}, case=replace(record.case, N=4))
    assert not quiet.share_disturbed
    drawn = plot.draw_all(Results(AT, {}, None, [record, quiet]), tmp_path)
    hollow = ["fill: #ffffff; stroke: #d95f02" in path.read_text() for path in drawn]
    assert hollow == [False, True]
    quiet.timings = {"fastrnn": Timing(1.0, 1.0, 1.0, 3, disturbed=True)}
    assert quiet.share_disturbed


def test_a_model_that_is_wrong_in_inference_alone_is_red() -> None:
    class Odd(nn.GRU):
        calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, h = super().forward(x)
            self.calls += not torch.is_grad_enabled()
            return (y + 1e-3 if self.calls > 1 else y), h

    def spoil(model: nn.Module) -> nn.Module:
        model.__class__ = Odd
        return model

    def build(small: bool) -> tuple[nn.Module, models.Call]:
        x = torch.randn(4, 2, 3)

        def call(model: nn.Module) -> Sequence[Tensor]:
            return [model(x.to(next(model.parameters()).dtype))[0]]

        return nn.GRU(3, 5), call

    sound = models.Model("a", "torch", "", build)
    assert models.verify(sound, True) == ""
    assert models.verify(replace(sound, swap=spoil), True).startswith("inference output 0 is off")


def test_the_committed_figures_are_of_the_committed_results() -> None:
    words = plot.caption(schema.Results.load(schema.newest()))
    for name in ("speedup.svg", "roofline.svg"):
        assert f"<!-- {words} -->" in (plot.IMAGES / name).read_text(), "python -m benchmarks.plot"


def test_the_table_of_models_is_that_of_the_results() -> None:
    measured = {}
    for path in schema.RESULTS.glob("*/models*.json"):
        for row in json.loads(path.read_text())["models"]:
            measured[row["model"], row["mode"]] = row["timings"]
    text = (DOCS / "benchmarks.md").read_text()
    rows = re.findall(r"^\|(.*)\|.*\| (.*) \| (\d+) ms \| (\d+) ms \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == len(measured)
    name = ""
    for named, mode, theirs, ours, ratio in rows:
        name = named.strip() or name
        timings = measured[name, mode]
        assert not any(each["disturbed"] for each in timings.values())
        old, new = (1e3 * timings[key]["median"] for key in ("torch", "fastrnn"))
        assert (float(theirs), float(ours)) == pytest.approx((old, new), abs=0.51), name
        assert float(ratio) == pytest.approx(old / new, abs=0.0051), name
