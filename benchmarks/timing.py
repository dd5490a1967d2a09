"""Interleaved timing of several contestants, with foreign CPU time watched.

Why it is done this way (docs/benchmarks.md has the numbers behind it):
- Contestants take turns, in rotating order, so that clock and machine drift reach all of them
  alike.
- Before a turn there is a quiet gap (OpenMP workers spin for about 5 ms after a region and would
  slow the next contestant) and one untimed call (parked workers wake up, caches and branch
  predictors are the contestant's own).
- A competing process makes any step barrier wait for a time slice. CPU time that was used on our
  cores but not by this process is foreign; a turn with more of it than the clock's grain is thrown
  away and taken again. When the machine never gets quiet the disturbed samples are used and the
  result is marked.
- The cores of a virtual machine may lie on one real core for seconds, which nobody accounts for:
  a turn that does not begin and end with the speed of all cores is thrown away as well.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

GAP_SECONDS = 0.006
TURN_SECONDS = 0.04
SAMPLE_SECONDS = 0.0002
LONG_CALL_SECONDS = 0.1
MAX_SAMPLES_PER_TURN = 40
STAT = Path("/proc/stat")


@dataclass
class Turn:
    """What one contestant did in one turn: seconds per call, and foreign CPU seconds meanwhile."""

    samples: list[float]
    foreign: float
    disturbed: bool


class Runner(Protocol):
    """Anything that can take a turn: a callable of this process, or a worker process."""

    def turn(self) -> Turn: ...


@dataclass
class Timing:
    """Seconds per call: median, 20th and 80th percentile over `samples` samples."""

    median: float
    p20: float
    p80: float
    samples: int
    discarded: int = 0
    disturbed: bool = False
    foreign: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Collected:
    clean: list[float] = field(default_factory=list)
    dirty: list[float] = field(default_factory=list)
    clean_turns: int = 0
    foreign: float = 0.0


def busy_seconds() -> float | None:
    """CPU seconds spent by anybody, steal included, on our cores; None without /proc/stat."""
    if not STAT.exists():
        return None
    ours = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *values = line.split()
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (
                int(value) for value in values[:8]
            )
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def foreign_limit(wall: float) -> float:
    """Foreign CPU seconds tolerated in a turn: a tick of counting noise per core, and 3%."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return 0.011 * cores + 0.03 * wall


class LocalRunner:
    """Times a callable of this process; `context` (no_grad, ...) is entered once per turn."""

    def __init__(
        self,
        call: Callable[[], object],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._call = call
        self._context = context
        self._inner = 0
        self._samples = 0
        self._warm = True

    def _calibrate(self) -> None:
        """Chooses calls per sample (so that the clock's cost vanishes) and samples per turn.

        A long call needs no warm one before it: waking a worker is nothing beside it.
        """
        once = math.inf
        for _ in range(2):
            start = time.perf_counter()
            self._call()
            once = min(once, max(time.perf_counter() - start, 1e-7))
        self._warm = once < LONG_CALL_SECONDS
        self._inner = max(1, math.ceil(SAMPLE_SECONDS / once))
        self._samples = min(
            MAX_SAMPLES_PER_TURN, max(1, round(TURN_SECONDS / (once * self._inner)))
        )

    def turn(self) -> Turn:
        with self._context():
            if not self._inner:
                self._calibrate()
            return watched(self._take)

    def _take(self) -> list[float]:
        call, clock = self._call, time.perf_counter
        if self._warm:
            call()
        samples = []
        for _ in range(self._samples):
            start = clock()
            for _ in range(self._inner):
                call()
            samples.append((clock() - start) / self._inner)
        return samples


def watched(take: Callable[[], list[float]]) -> Turn:
    """A turn of these samples, after the quiet gap, with the foreign CPU time of meanwhile."""
    time.sleep(GAP_SECONDS)
    busy, own, begin = busy_seconds(), time.process_time(), time.perf_counter()
    samples = take()
    wall = time.perf_counter() - begin
    after = busy_seconds()
    foreign = 0.0 if busy is None or after is None else after - busy - (time.process_time() - own)
    return Turn(samples, max(0.0, foreign), foreign > foreign_limit(wall))


def summarise(samples: list[float]) -> tuple[float, float, float]:
    """(median, p20, p80), linear interpolation. Raises ValueError on no samples."""
    if not samples:
        raise ValueError("samples is empty: expected at least one measured call")
    p20, median, p80 = np.percentile(np.asarray(samples), (20, 50, 80))
    return float(median), float(p20), float(p80)


def measure(
    runners: Mapping[str, Runner],
    *,
    budget: float,
    min_rounds: int = 3,
    patience: float = 3.0,
    steady: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Lets the contestants take turns for `budget` seconds and `min_rounds` undisturbed turns.

    `steady` says whether the machine is itself right now, and is asked before and after a turn.
    Gives up waiting for a quiet machine after `patience` times the budget (and at least
    twice `min_rounds` rounds) and then falls back on the disturbed samples, marked.
    """
    names = list(runners)
    collected = {name: _Collected() for name in names}
    start, rounds = clock(), 0
    while True:
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            before, turn = steady(), runners[name].turn()
            disturbed = turn.disturbed or not (before and steady())
            into = collected[name]
            (into.dirty if disturbed else into.clean).extend(turn.samples)
            into.clean_turns += not disturbed
            into.foreign += turn.foreign
        rounds += 1
        elapsed = clock() - start
        enough = min(each.clean_turns for each in collected.values()) >= min_rounds
        if elapsed >= budget and (
            enough or (rounds >= 2 * min_rounds and elapsed >= patience * budget)
        ):
            break
    return {name: _finish(each, min_rounds) for name, each in collected.items()}


def _finish(each: _Collected, min_rounds: int) -> Timing:
    disturbed = each.clean_turns < min_rounds
    used = each.clean + each.dirty if disturbed else each.clean
    median, p20, p80 = summarise(used)
    discarded = 0 if disturbed else len(each.dirty)
    return Timing(median, p20, p80, len(used), discarded, disturbed, round(each.foreign, 4))
