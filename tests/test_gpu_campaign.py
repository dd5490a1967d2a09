"""The GPU campaign's logic, on a machine without a GPU: stages, resuming, targets, arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
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
    build,
    campaign,
    cases,
    cudnn,
    device,
    probes,
    roofline,
    steps,
    targets,
)
from benchmarks.gpu.campaign import Campaign, ProcessRunner, Stage
from benchmarks.gpu.clock import HostClock, TimedRunner, per_step
from benchmarks.gpu.stage import COMPLETE, PARTIAL, RED, RESTART, load, save
from benchmarks.schema import Record
from tests.campaigns import AT, timed

ROOT = Path(__file__).resolve().parent.parent


# ---- the driver ----------------------------------------------------------------------------------


class Fake:
    """A runner with a script of exit statuses by stage, and a clock of its own."""

    def __init__(self, script: dict[str, list[int | None]], seconds: float = 5.0) -> None:
        self.script, self.seconds, self.time = script, seconds, 0.0
        self.calls: list[tuple[str, float]] = []

    def __call__(self, stage: Stage, seconds: float) -> int | None:
        self.calls.append((stage.name, seconds))
        self.time += min(self.seconds, seconds)
        return self.script[stage.name].pop(0)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def start(tmp: Path, stages: list[Stage], fake: Fake) -> Campaign:
    return Campaign(stages, tmp, fake, now=lambda: fake.time)


ONE, TWO, THREE = (Stage(name, 100, "") for name in ("one", "two", "three"))


def test_complete_stages_are_not_run_again_unless_forced(tmp_path: Path) -> None:
    fake = Fake(
        {"one": [COMPLETE, COMPLETE], "two": [RED, RED], "three": [PARTIAL, COMPLETE, COMPLETE]}
    )
    assert not start(tmp_path, [ONE, TWO, THREE], fake).run(1000, environment=AT)
    assert fake.names == ["one", "two", "three"]
    again = start(tmp_path, [ONE, TWO, THREE], fake)
    assert [again.status(s.name) for s in (ONE, TWO, THREE)] == ["complete", "red", "partial"]
    assert not again.run(1000)  # one of them is red
    assert fake.names[3:] == ["three"]
    start(tmp_path, [ONE, TWO, THREE], fake).run(1000, force=True)
    assert fake.names[4:] == ["one", "two", "three"]
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["environment"]["device"] == "A GPU"
    assert state["stages"]["three"]["runs"] == 3


def test_a_stage_whose_result_is_gone_is_run_again(tmp_path: Path) -> None:
    built = [True]
    first = replace(ONE, valid=lambda: built[0])
    fake = Fake({"one": [COMPLETE, COMPLETE]})
    assert start(tmp_path, [first], fake).run(100)
    assert start(tmp_path, [first], fake).run(100)
    built[0] = False
    assert start(tmp_path, [first], fake).run(100)
    assert fake.names == ["one", "one"]


def test_what_needs_a_failed_stage_is_left_out(tmp_path: Path) -> None:
    second = replace(TWO, needs="one")
    fake = Fake({"one": [3], "three": [COMPLETE]})
    it = start(tmp_path, [ONE, second, THREE], fake)
    assert not it.run(1000)
    assert fake.names == ["one", "three"]
    assert (it.status("one"), it.status("two")) == ("failed", "skipped")


def test_the_budget_ends_the_run_and_limits_stages(tmp_path: Path) -> None:
    fake = Fake({"one": [COMPLETE], "two": [PARTIAL], "three": []}, seconds=90)
    assert not start(tmp_path, [ONE, TWO, THREE], fake).run(150)
    assert fake.names == ["one", "two"]
    assert fake.calls[0][1] == 100
    assert fake.calls[1][1] == pytest.approx(150 - 90 - campaign.GRACE / 2)


def test_only_stages_that_know_what_killed_them_start_again(tmp_path: Path) -> None:
    able = replace(ONE, resumable=True)
    fake = Fake({"one": [RESTART, -11, COMPLETE], "two": [-11], "three": [None]})
    it = start(tmp_path, [able, TWO, replace(THREE, resumable=True)], fake)
    it.run(1000)
    assert fake.names == ["one", "one", "one", "two", "three"]
    assert [it.status(n) for n in ("one", "two", "three")] == ["complete", "failed", "out of time"]
    fake = Fake({"one": [RESTART] * 9})
    start(tmp_path / "more", [able], fake).run(1000)
    assert fake.names == ["one"] * campaign.RESTARTS


def test_a_process_that_overruns_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "GRACE", 0.2)

    class Sleeps(ProcessRunner):
        def command(self, stage: Stage, seconds: float) -> list[str]:
            return ["sleep", "60"] if stage is ONE else ["false"]

    assert Sleeps(tmp_path)(ONE, 0.1) is None
    assert Sleeps(tmp_path)(TWO, 5) == 1
    words = ProcessRunner(tmp_path, ["--write"]).command(ONE, 33.4)
    assert words[1:5] == ["-m", "benchmarks.gpu", "--inside", "one"]
    assert words[-3:] == ["--seconds", "33", "--write"]


def test_what_time_cut_off_is_run_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "GRACE", 0.1)

    class Sleeps(ProcessRunner):
        def command(self, stage: Stage, seconds: float) -> list[str]:
            return ["sleep", "60"]

    tests, mark = tmp_path / "tests.json", tmp_path / "running.txt"
    done = {"outcome": "passed", "seconds": 1.0, "message": ""}
    for turn in range(2):
        save(tests, {"tests": {"a": done, "b": {**done, "outcome": "running"}}})
        mark.write_text("a case")
        assert Sleeps(tmp_path)(ONE, 0.05) is None
        hangs = turn > 0
        assert mark.exists() == hangs
        assert set(load(tests)["tests"]) == ({"a", "b"} if hangs else {"a"})


def test_without_a_gpu_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ([], ["--stage", "probes"], ["--stage", "refit"]):
        assert command.main(words) == 2
        said = capsys.readouterr()
        assert not said.out
        assert said.err.count("\n") == 1
        assert said.err.startswith("no GPU campaign: torch finds no GPU here")


def test_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == command.NAMES
    assert set(cases.GRIDS) | {"steps"} <= set(listed)
    assert all(each.seconds < 8 * 60 for each in command.STAGES)
    assert all(each.needs in ("", *listed) for each in command.STAGES)
    for name in ("grid-16bit", "steps", "tests"):
        assert next(each for each in command.STAGES if each.name == name).resumable


def test_build_is_driven_without_an_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setattr(build, "_tool", lambda name: name)
    words = build.configure_command("90a", tmp_path)
    assert "-DFASTRNN_CUDA_ARCHS=90a" in words
    assert "-DFASTRNN_ISAS=baseline" in words
    assert f"-DFASTRNN_OUTPUT_DIR={ROOT / 'fastrnn'}" in words
    log = tmp_path / ".ninja_log"
    log.write_text("# ninja log v7\n0\t1500\t1\ta/pack.cu.o\tff\n100\t9100\t1\ta/lstm.cu.o\tee\n")
    assert build.seconds_per_file(log) == [("lstm.cu.o", 9.0), ("pack.cu.o", 1.5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert device.architecture() == "90a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert device.architecture() == "86"


# ---- cases, algorithms, targets ------------------------------------------------------------------


def test_every_target_has_cases_and_every_case_one_name() -> None:
    registry = [*cases.all_cases(), *steps.cases()]
    ids = [case.id for case in registry]
    assert len(ids) == len(set(ids))
    assert [Case.from_dict(case.to_dict()) for case in registry] == registry
    for target in targets.TARGETS:
        chosen = [
            case for case in registry
            if case.group in target.groups and target.mode in ("", case.mode) and target.keep(case)
        ]  # fmt: skip
        assert chosen, target.text
    wide = {(c.cell, c.N, c.H, c.mode) for c in registry if c.group == "wide"}
    assert len(wide) == 2 * 2 * 5 * 4
    assert {c.H for c in registry if c.group == "small"} <= set(range(193))
    assert {c.depth for c in registry if c.cell == "rhn"} == {5, 10}


@pytest.mark.parametrize(
    ("case", "backward", "name"),
    [
        (Case("lstm", "forward", 9, 16, 768, dtype="float16"), False, "PERSIST_STATIC"),
        (Case("lstm", "forward", 9, 16, 768, dtype="bfloat16"), False, "STANDARD"),
        (Case("lstm", "forward", 9, 12, 768, dtype="float16"), False, "STANDARD"),
        (Case("lstm", "forward", 9, 16, 1100, dtype="float16"), False, "STANDARD"),
        (Case("gru", "forward", 9, 16, 768, dtype="float16"), False, "STANDARD"),
        (Case("lstm", "forward", 9, 16, 192), False, "PERSIST_STATIC_SMALL_H"),
        (Case("lstm", "training", 9, 16, 192), True, "STANDARD"),
        (Case("rnn", "forward", 9, 16, 384), False, "PERSIST_STATIC_SMALL_H"),
        (Case("rnn", "forward", 9, 104, 896, dtype="float16"), False, "STANDARD"),
        (Case("lstm", "forward", 9, 16, 64, ragged="packed"), False, "STANDARD"),
        (Case("lstm", "forward", 9, 8, 256, bidirectional=True), False, "STANDARD"),
        (Case("lstm", "forward", 9, 16, 64, dtype="float64"), False, "STANDARD"),
        (Case("rhn", "forward", 9, 16, 64), False, ""),
    ],
)  # fmt: skip
def test_what_torch_asks_cudnn_for(case: Case, backward: bool, name: str) -> None:
    assert cudnn.algorithm(case, backward) == name


def test_a_smaller_gpu_and_both_passes() -> None:
    case = Case("lstm", "forward", 9, 16, 768, dtype="float16")
    assert cudnn.algorithm(case, False, sms=97) == "STANDARD"
    both = cudnn.describe(Case("gru", "training", 9, 16, 160))
    assert both == "PERSIST_STATIC_SMALL_H, backward STANDARD"


def test_targets_take_the_worst_and_miss_what_has_no_number() -> None:
    wide = [timed(case, fastrnn=1.0, torch=4.0) for case in cases.GRIDS["grid-16bit"]()]

    def outcome(records: list[Record], start: str) -> Any:
        return next(o for o in targets.evaluate(records) if o.text.startswith(start))

    assert outcome(wide, "the same, every case").status == "pass"
    assert outcome(wide, "bf16 LSTM and GRU").value == pytest.approx(4.0)
    wide[2].checks["fastrnn"]["ok"] = False
    assert outcome(wide, "the same, every case").status == "MISS"
    assert outcome(wide, "the same, every case").where == wide[2].case.id
    assert outcome(wide, "bf16 LSTM and GRU").status == "MISS"
    assert outcome(wide, "fp32").status == "not measured"
    rows = [
        timed(c, fastrnn=2.0, fastrnn_triton=1.0, torch=0.9) for c in cases.GRIDS["grid-triton"]()
    ]
    assert outcome(rows, "Triton").value == pytest.approx(1 / 0.9)
    loops = [
        timed(c, fastrnn_triton=1.0, loop=30.0, loop_compiled=7.0)
        for c in cases.GRIDS["grid-loops"]()
    ]
    assert outcome(loops, "RHN and BN-LSTM, every case: against the eager").value == 30
    assert outcome(loops, "RHN and BN-LSTM, every case: against the loop").status == "MISS"
    case = next(c for c in steps.cases() if not c.option)
    step = timed(case, fastrnn=1.0)
    step.details = {"us_per_step": {"fastrnn": 3.0}, "model_us_per_step": 1.5}
    assert outcome([step], "time of a step").value == 2.0


# ---- clocks, floors ------------------------------------------------------------------------------


def test_time_of_a_step_from_two_lengths() -> None:
    # A call that costs 50 us once and 1.25 us a step.
    long, short = (50e-6 + 1.25e-6 * steps for steps in (1024, 256))
    assert per_step(long, short, 1024, 256) == pytest.approx(1.25e-6)
    with pytest.raises(ValueError, match="two lengths"):
        per_step(long, short, 256, 256)


@pytest.mark.parametrize(("once", "inner", "count"), [(1e-4, 4, 6), (0.02, 1, 2), (0.5, 1, 1)])
def test_turns_fit_the_length_of_a_call(once: float, inner: int, count: int) -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += once

    runner = TimedRunner(call, clock=HostClock(lambda: now[0]))
    turn = runner.turn()
    assert turn.samples == pytest.approx([once] * count)
    assert not turn.disturbed
    before = calls[0]
    runner.turn()
    assert calls[0] - before == inner * count + (count > 1)


def test_floors_of_a_case() -> None:
    case = Case("lstm", "forward", 100, 4, 8, I=16, dtype="bfloat16")
    at = roofline.Ceilings({"bfloat16": 1e6}, 1e5, 2e-6)
    floors = at.floors(case)
    assert floors["products"] == pytest.approx(2 * 100 * 4 * 4 * 8 * (16 + 8) / 1e6)
    assert floors["traffic"] == pytest.approx(100 * 4 * 2 * (16 + 2 * 32 + 8) / 1e5)
    assert floors["chain"] == pytest.approx(100 * 2e-6)
    assert at.bound_seconds(case) == max(floors.values())
    training = at.floors(replace(case, mode="training"))
    assert training["chain"] == 2 * floors["chain"]
    row = 2 * (16 + 64 + 8) + (2 * 32 + 32) + (2 * (64 + 8) + 32) + 2 * (64 + 32 + 8)
    assert training["traffic"] == pytest.approx(100 * 4 * row / 1e5)
    assert roofline.Ceilings().bound_seconds(case) is None
    deep = at.floors(Case("rhn", "forward", 100, 4, 8, depth=5))
    assert deep["chain"] == pytest.approx(5 * 100 * 2e-6)


def test_ceilings_on_a_host_clock() -> None:
    found = probes.ceilings(HostClock(), "cpu", scale=256)
    assert found["copy_bytes"] > 0
    assert set(found["matmul_flops"]) == {"bfloat16", "float16", "float32"}
