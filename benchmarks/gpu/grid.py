"""Stages `grid-*`: verify, then time, case by case; what is done stays done.

Contestants take turns. A case gives medians at its T and, where T is long enough, microseconds per
step from a second length. A red contestant has no number; the others keep theirs.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.gpu import cudnn
from benchmarks.gpu.clock import Clock, CudaClock, TimedRunner, per_step
from benchmarks.gpu.contestants import Field
from benchmarks.gpu.roofline import Ceilings
from benchmarks.gpu.stage import MARK, STICKY, Stop, load, say
from benchmarks.schema import Record, Results
from benchmarks.timing import Runner, measure

FILE = "grid.json"
SHORTER = 4
LEAST_STEPS = 200


@dataclass
class Setting:
    """How cases are run; the defaults are the GPU's, tests have others."""

    where: str = "cuda"
    clock: Clock = field(default_factory=CudaClock)
    backends: dict[str, str] | None = None
    budget: float = 0.15  # seconds of timing, at least
    min_rounds: int = 4
    ceilings: Ceilings = field(default_factory=Ceilings)
    sms: int = 132


class Broken(RuntimeError):
    """The device answers with an error that stays: this process can do no more."""


def run_case(case: Case, setting: Setting) -> Record:
    """Verifies and times one case."""
    return guarded(case, lambda record: _run(record, setting))


def guarded(case: Case, body: Callable[[Record], None]) -> Record:
    """The record that `body` fills. What a library raises is the record's error.

    Raises:
        Broken: with the record as its argument, where the process is of no use any more.
    """
    record = Record(case)
    try:
        body(record)
    except Exception as error:
        record.error = "".join(traceback.format_exception_only(error)).strip()[:500]
        if any(sign in record.error for sign in STICKY):
            raise Broken(record) from error
    return record


def _run(record: Record, setting: Setting) -> None:
    case = record.case
    here = Field(case, setting.where, setting.backends)
    record.backends = {n: c.backend for n, c in here.contestants.items() if c.backend}
    record.details = {"refused": here.refused, "cudnn": cudnn.describe(case, setting.sms)}
    checks = here.check()
    record.details["red"] = {n: c["message"] for n, c in checks.items() if not c["ok"]}
    record.checks = {n: c for n, c in checks.items() if c["ok"] or n == "fastrnn"}
    running = {n: c for n, c in here.contestants.items() if n not in record.details["red"]}
    if not running:
        return
    record.timings = _time(running, setting)
    # Not for loops: their compilation would be paid again for a number that says little.
    if case.T >= LEAST_STEPS and not here.looped:
        del here
        fewer = replace(case, T=case.T // SHORTER)
        there = Field(fewer, setting.where, setting.backends)
        some = {n: c for n, c in there.contestants.items() if n in running}
        short = _time(some, setting)
        record.details["us_per_step"] = {
            n: 1e6 * per_step(record.timings[n].median, short[n].median, case.T, fewer.T)
            for n in short
        }
    record.bound_seconds = setting.ceilings.bound_seconds(case)
    raise_if_failed(setting.where)


def _time(contestants: dict[str, Any], setting: Setting) -> dict[str, Any]:
    runners: dict[str, Runner] = {
        name: TimedRunner(each.call, each.context, setting.clock)
        for name, each in contestants.items()
    }
    return measure(runners, budget=setting.budget, min_rounds=setting.min_rounds)


def raise_if_failed(where: str) -> None:
    """The kernels' error word, after the device is done."""
    if where == "cuda":
        from fastrnn.backends import cuda_native

        torch.cuda.synchronize()
        cuda_native.raise_if_failed(torch.cuda.current_device())


def run(
    cases: Sequence[Case],
    results: Path,
    stop: Stop,
    environment: dict[str, Any],
    setting: Setting,
    runner: Callable[[Case, Setting], Record] = run_case,
) -> bool:
    """Runs what grid.json does not hold yet; True when nothing is left.

    A case that a process did not survive (its mark is found at the start) is recorded as an error.
    """
    path, mark = results / FILE, results / MARK
    held = Results.from_dict(load(path)) if path.exists() else Results(environment, {})
    held.settings = {"verify_only": False, "budget": setting.budget, "rounds": setting.min_rounds}
    held.roofline = held.roofline or None
    done = {record.case.id for record in held.records}
    by_id = {case.id: case for case in cases}
    if mark.exists():
        lost = mark.read_text().strip()
        if lost in by_id and lost not in done:
            held.records.append(Record(by_id[lost], error="the process did not survive this case"))
            done.add(lost)
            held.save(path)
        mark.unlink()
    left = [case for case in cases if case.id not in done]
    for number, case in enumerate(left, len(cases) - len(left) + 1):
        if stop:
            return False
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(case.id)
        try:
            record = runner(case, setting)
        except Broken as broken:
            record = broken.args[0]
            held.records.append(record)
            held.save(path)
            mark.unlink()
            raise
        held.records.append(record)
        held.save(path)
        mark.unlink()
        say(f"[{number}/{len(cases)}, {stop.left():.0f} s left] {line(record)}")
    return True


def line(record: Record) -> str:
    """One case in one line: times, speedups, what was refused or red."""
    words = [record.case.id]
    for name, timing in record.timings.items():
        ratio = record.speedup(name)
        versus = f" x{ratio:.2f}" if ratio is not None and name != "fastrnn" else ""
        words.append(f"{name} {timing.median * 1e3:.3f} ms{versus}")
    words += [f"{name} RED: {why}" for name, why in record.details.get("red", {}).items()]
    words += [f"{name} refused" for name in record.details.get("refused", {})]
    return "  ".join([*words, *([f"ERROR {record.error}"] if record.error else [])])
