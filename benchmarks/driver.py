"""Runs cases: verifies, times, measures memory; the result file is kept up to date meanwhile."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops, memory, roofline, verify
from benchmarks.cases import Case
from benchmarks.peers import Contestant, Problem, build, onnx_missing
from benchmarks.schema import Record, Results, environment
from benchmarks.timing import LocalRunner, Runner, Timing, measure
from benchmarks.worker import RemoteRunner, Worker

SAVE_EVERY = 10
ASSUMED_FLOPS = 6e10


@dataclass(frozen=True)
class Settings:
    """quick: the short list. threads: of every contestant. budget: timing seconds per case.
    patience: times the budget that a case waits for a quiet machine. limit: seconds for all."""

    quick: bool
    threads: int
    budget: float
    min_rounds: int
    limit: float
    patience: float = 3.0
    verify_only: bool = False

    @property
    def timing(self) -> dict[str, Any]:
        """The arguments of `measure`."""
        return {
            "budget": self.budget, "min_rounds": self.min_rounds, "patience": self.patience,
        }  # fmt: skip


def quick_settings(threads: int, verify_only: bool = False) -> Settings:
    return Settings(True, threads, budget=0.5, min_rounds=3, limit=110, verify_only=verify_only)


def full_settings(threads: int, verify_only: bool = False) -> Settings:
    return Settings(False, threads, budget=1.0, min_rounds=4, limit=1450, verify_only=verify_only)


class Workers:
    """Worker processes by contestant name ("fastrnn@avx2"), started when first needed."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._workers: dict[str, Worker] = {}

    def get(self, name: str) -> Worker:
        if name not in self._workers:
            isa = name.partition("@")[2]
            self._workers[name] = Worker(
                self._threads, {} if isa == "auto" else {"FASTRNN_ISA": isa}
            )
        return self._workers[name]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def expected_seconds(case: Case, settings: Settings) -> float:
    """A rough guess of a case's duration, for the progress bar's estimate only."""
    once = case.flops / ASSUMED_FLOPS
    if case.group == "memory":
        return len(case.contestants) * (0.3 + once)
    timing = max(settings.budget, 1.5 * settings.min_rounds * len(case.contestants) * once)
    return 5 * once + (0 if settings.verify_only else timing)


def paced(settings: Settings, elapsed: float, done: float, left: float) -> Settings:
    """The settings of the next case: less time and patience when the run is behind its limit.

    done and left are expected seconds, of the cases run in `elapsed` seconds and of the others.
    """
    if not done or elapsed * (1 + left / done) <= settings.limit:
        return settings
    share = max(0.0, settings.limit - elapsed) / (elapsed * left / done)
    return replace(settings, budget=max(0.2, share) * settings.budget, patience=1.0)


def run(
    cases: Sequence[Case],
    settings: Settings,
    out: Path | None,
    progress: Callable[[Case, float], None],
) -> Results:
    """Runs every case, calling `progress(case, expected seconds)` before each; saves as it goes."""
    torch.set_num_threads(settings.threads)
    results = Results(environment(settings.threads), {**vars(settings)})
    absent = onnx_missing()
    if absent:
        results.settings["left_out"] = [absent]
        cases = [without(case, "onnx") for case in cases]
    ceiling = roofline.measure(settings.threads)
    results.roofline = ceiling.to_dict()
    timed = [case for case in cases if case.group != "memory"]
    workers = Workers(settings.threads)
    begin, done = time.perf_counter(), 0.0
    left = sum(expected_seconds(case, settings) for case in cases)
    try:
        for index, case in enumerate(timed):
            expected = expected_seconds(case, settings)
            progress(case, expected)
            now = paced(settings, time.perf_counter() - begin, done, left)
            results.records.append(run_case(case, now, ceiling, workers))
            done, left = done + expected, left - expected
            if out is not None and index % SAVE_EVERY == SAVE_EVERY - 1:
                results.save(out)
    finally:
        workers.close()
    if out is not None:
        results.save(out)
    sized = [] if settings.verify_only else [case for case in cases if case.group == "memory"]
    _measure_memory(sized, settings, results, progress)
    results.roofline = ceiling.to_dict()
    if out is not None:
        results.save(out)
    return results


def without(case: Case, contestant: str) -> Case:
    return replace(case, contestants=tuple(n for n in case.contestants if n != contestant))


def run_case(
    case: Case, settings: Settings, ceiling: roofline.Roofline, workers: Workers
) -> Record:
    """Verifies, then times one case. What a library raises is the record's error: a red line."""
    record = Record(case)
    bounded = case.group in ("grid", "options", "loops") and not case.ragged
    try:
        probes = ceiling.probes(case) if bounded and not settings.verify_only else {}
        if case.group == "isa":
            _run_isa(record, settings, workers, ceiling)
        elif case.group in ("loops", "regularised", "layer_norm"):
            _run_loop(record, settings, probes, ceiling)
        else:
            _run_local(record, settings, probes, ceiling)
        if bounded:
            ceiling = ceiling.meanwhile(record.timings)
            shaken = any(t.disturbed for n, t in record.timings.items() if n in probes)
            record.bound_seconds = ceiling.bound_seconds(case)
            record.timings = {n: t for n, t in record.timings.items() if n not in probes}
            if probes and record.timings:
                record.details["ceiling"] = ceiling.of(probes)
                record.details["ceiling_disturbed"] = shaken
    except Exception as error:
        record.error = "".join(traceback.format_exception_only(error)).strip()
    return record


def _run_local(
    record: Record,
    settings: Settings,
    probes: Mapping[str, Runner],
    ceiling: roofline.Roofline,
) -> None:
    case = record.case
    problem = Problem(case)
    contestants = [build(case, name, problem) for name in case.contestants]
    record.backends = {each.name: each.backend for each in contestants if each.backend}
    _verify(record, problem, contestants)
    if record.ok and not settings.verify_only:
        record.timings = _time(contestants, settings, probes, ceiling)


def _run_loop(
    record: Record,
    settings: Settings,
    probes: Mapping[str, Runner],
    ceiling: roofline.Roofline,
) -> None:
    """RHN, BN-LSTM, regularised and layer-normalised layers beside loops and plain layers."""
    case = record.case
    problem = loops.LoopProblem(case)
    contestants = [loops.build(case, name, problem) for name in case.contestants]
    record.backends = {each.name: each.backend for each in contestants if each.backend}
    for name, found in loops.check(case, problem, contestants).items():
        record.checks[name] = found.to_dict()
    if record.ok and not settings.verify_only:
        record.timings = _time(contestants, settings, probes, ceiling)


def _time(
    contestants: Sequence[Contestant],
    settings: Settings,
    probes: Mapping[str, Runner],
    ceiling: roofline.Roofline,
) -> dict[str, Timing]:
    """All take turns, the probes of the ceilings (benchmarks/roofline.py) among them."""
    runners: dict[str, Runner] = {
        each.name: LocalRunner(each.call, each.context) for each in contestants
    }
    return measure({**runners, **probes}, **settings.timing, steady=ceiling.steady)


def _verify(record: Record, problem: Problem, contestants: Sequence[Contestant]) -> None:
    expected = verify.truth(record.case, problem)
    peers = {}
    for contestant in contestants:
        if contestant.name.startswith("torch"):
            continue
        precision = "bf16" if contestant.name.endswith("bf16") else "fp32"
        if precision not in peers:
            peers[precision] = verify.peer_outputs(record.case, problem, contestant.name)
        record.checks[contestant.name] = verify.check(
            contestant, expected, peers[precision]
        ).to_dict()


def _run_isa(
    record: Record, settings: Settings, workers: Workers, ceiling: roofline.Roofline
) -> None:
    """Both instruction sets, each verified and timed in its own worker."""
    case = record.case
    record.checks = {name: workers.get(name).ask(case, "check") for name in case.contestants}
    digests = [workers.get(name).ask(case, "digest") for name in case.contestants]
    record.bits_equal = all(each == digests[0] for each in digests)
    record.backends = {name: workers.get(name).ask(case, "isa") for name in case.contestants}
    if record.ok and not settings.verify_only:
        runners: dict[str, Runner] = {
            name: RemoteRunner(workers.get(name), case) for name in case.contestants
        }
        record.timings = measure(runners, **settings.timing, steady=ceiling.steady)


def _measure_memory(
    cases: Sequence[Case],
    settings: Settings,
    results: Results,
    progress: Callable[[Case, float], None],
) -> None:
    measured = memory.measure(cases, settings.threads) if cases else iter(())
    for case in cases:
        progress(case, expected_seconds(case, settings))
        _, peaks = next(measured, (case, {"error": "not reached"}))
        if "error" in peaks:
            results.records.append(Record(case, error=f"peak memory: {peaks['error']}"))
        else:
            results.memory.append((case, peaks))
