"""Times calls by CUDA events, in turns like benchmarks.timing; a host clock stands in on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from benchmarks.timing import Turn

SAMPLE_SECONDS = 0.0004  # several calls to a sample where they are shorter
TURN_SECONDS = 0.03
SAMPLES_OF_A_TURN = 6


class Clock(Protocol):
    def samples(self, call: Callable[[], object], inner: int, count: int) -> list[float]:
        """Seconds per call of `count` samples of `inner` calls each."""
        ...


class CudaClock:
    """Events around the calls on the current stream; the host waits once, at the end."""

    def samples(self, call: Callable[[], object], inner: int, count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(inner):
                call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 / inner for begin, end in pairs]


class HostClock:
    """For calls that run on the host; `now` may be a test's own."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def samples(self, call: Callable[[], object], inner: int, count: int) -> list[float]:
        found = []
        for _ in range(count):
            begin = self._now()
            for _ in range(inner):
                call()
            found.append((self._now() - begin) / inner)
        return found


class TimedRunner:
    """A benchmarks.timing.Runner: one untimed call, then samples, as many as fit into a turn."""

    def __init__(
        self,
        call: Callable[[], object],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        clock: Clock | None = None,
    ) -> None:
        self._call, self._context = call, context
        self._clock = clock or CudaClock()
        self._inner = self._count = 0

    def turn(self) -> Turn:
        with self._context():
            if not self._inner:
                once = min(self._clock.samples(self._call, 1, 3)[1:])
                self._inner = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
                fitting = round(TURN_SECONDS / max(once * self._inner, 1e-9))
                self._count = min(SAMPLES_OF_A_TURN, max(1, fitting))
            elif self._count > 1:
                self._call()
            return Turn(self._clock.samples(self._call, self._inner, self._count), 0.0, False)


def per_step(long: float, short: float, steps: int, fewer: int) -> float:
    """Seconds of one time step, free of what a call costs once: from calls of two lengths."""
    if steps <= fewer:
        raise ValueError(f"two lengths are needed, the longer one first; got {steps} and {fewer}")
    return (long - short) / (steps - fewer)
