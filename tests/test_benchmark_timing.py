"""Turns, medians and what is thrown away (benchmarks/timing.py)."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from benchmarks import roofline, timing
from benchmarks.timing import LocalRunner, Turn


def test_summarise_takes_percentiles() -> None:
    assert timing.summarise([float(value) for value in range(11)]) == (5.0, 2.0, 8.0)
    with pytest.raises(ValueError, match="samples is empty"):
        timing.summarise([])


class Scripted:
    """A runner whose turns are written down; the last one repeats."""

    def __init__(self, *turns: Turn) -> None:
        self._turns = list(turns)

    def turn(self) -> Turn:
        return self._turns.pop(0) if len(self._turns) > 1 else self._turns[0]


def test_disturbed_turns_are_thrown_away() -> None:
    clean, dirty = Turn([1.0], 0.0, False), Turn([9.0], 1.0, True)
    runners = {"a": Scripted(dirty, clean), "b": Scripted(clean)}
    times = itertools.chain([0.0], itertools.repeat(1.0))
    found = timing.measure(runners, budget=0.5, clock=lambda: next(times))
    assert (found["a"].median, found["a"].discarded, found["a"].disturbed) == (1.0, 1, False)


def test_turns_of_an_unsteady_machine_are_thrown_away() -> None:
    """Asked before and after a turn: either answer is enough."""
    slow, clean = Turn([9.0], 0.0, False), Turn([1.0], 0.0, False)
    answers = itertools.chain([False, True, True, False], itertools.repeat(True))
    times = itertools.chain([0.0], itertools.repeat(1.0))
    found = timing.measure(
        {"a": Scripted(slow, slow, clean)},
        budget=0.5,
        steady=lambda: next(answers),
        clock=lambda: next(times),
    )
    assert (found["a"].median, found["a"].discarded, found["a"].disturbed) == (1.0, 2, False)
    found = timing.measure({"a": Scripted(clean)}, budget=0.0, steady=lambda: False)
    assert found["a"].disturbed


def test_a_machine_is_steady_at_most_of_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter((0.69e11, 0.69e11, 0.69e11, 0.69e11, 0.71e11))
    probe = SimpleNamespace(measure_peak_flops=lambda threads, seconds: next(rates))
    monkeypatch.setattr(roofline, "_native", lambda: probe)
    ceiling = roofline.Roofline(2, 1e11, "a test")
    assert not ceiling.steady()
    assert ceiling.steady()
    assert roofline.Roofline(1, 1e11, "a test").steady()  # one thread has nobody to share with
    monkeypatch.setattr(roofline, "_native", lambda: None)
    assert ceiling.steady()


def test_a_machine_that_is_never_quiet_is_marked() -> None:
    dirty = Turn([2.0], 1.0, True)
    found = timing.measure({"a": Scripted(dirty)}, budget=0.0)
    assert (found["a"].median, found["a"].disturbed, found["a"].samples) == (2.0, True, 6)


def test_a_long_case_has_twice_the_rounds_to_find_quiet_ones() -> None:
    clean, dirty = Turn([1.0], 0.0, False), Turn([9.0], 1.0, True)
    runner = Scripted(dirty, clean, dirty, clean, dirty, clean)
    found = timing.measure({"a": runner}, budget=0.0, min_rounds=3)
    assert (found["a"].median, found["a"].discarded, found["a"].disturbed) == (1.0, 3, False)


def test_local_runner_counts_calls() -> None:
    calls = []
    turn = LocalRunner(lambda: calls.append(1)).turn()
    assert turn.samples
    assert len(calls) > len(turn.samples)
    assert all(sample >= 0 for sample in turn.samples)


def test_disturbed_samples_do_not_move_the_median() -> None:
    clean, dirty = Turn([1.0], 0.0, False), Turn([9.0] * 50, 1.0, True)
    times = itertools.chain([0.0], itertools.repeat(1.0))
    found = timing.measure({"a": Scripted(dirty, clean)}, budget=0.5, clock=lambda: next(times))
    assert (found["a"].median, found["a"].samples) == (1.0, 3)


def test_local_runner_gives_seconds_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the call moves: short calls are timed many at once."""
    now = [0.0]
    clock = SimpleNamespace(
        perf_counter=lambda: now[0], process_time=lambda: now[0], sleep=lambda _: None
    )
    monkeypatch.setattr(timing, "time", clock)
    for seconds in (1e-5, 1e-3):
        turn = LocalRunner(lambda: now.__setitem__(0, now[0] + seconds)).turn()  # noqa: B023
        assert turn.samples == pytest.approx([seconds] * len(turn.samples))
        assert len(turn.samples) > 1
