"""How fast could it be: peak FLOP/s and bandwidth of this run, and the bound they give a case.

The model, per direction, with G gates, H hidden units, I inputs, R recurrent inputs (R = H without
projection):

    input GEMM   2 T N G H I flops, all steps at once; streams its G H I weights at least once
    recurrence   2 N G H R flops per step; every step streams the G H R recurrent weights
                 (with a projection, its H R weights and their flops as well)
    (an RHN of depth L makes L such matmuls, one after the other, in every step)
    bound(phase) = max(flops / peak, bytes / bandwidth); each step of the recurrence is a phase
    forward  = input GEMM + T x recurrence
    training = forward + T x recurrence (dh = dgates W_hh) + input GEMM (dx)
               + weight gradients (2 T N G H (I + R) flops)

Bandwidth is the one measured for a working set of each thread's share of the weights, so it is L2,
L3 or DRAM as it falls. For N >= 8 the flops bind and the bound is flops / peak; for N = 1 it is the
weight stream. Activations, cell updates and the writing of gradients are left out, so 100% cannot
quite be reached. The products with the zero state before the first step, and with its gradient,
are counted, as all contestants multiply by that state: of T steps one, which at T = 1 is half.

A run begins with both ceilings, each the best of a few tries. A case has its own: the probes that
bind it take turns with the contestants, and their medians make its bound. A core whose other
thread belongs to somebody else has half its peak for seconds, which must not pass for our loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import GATES, Case
from benchmarks.timing import Runner, Timing, Turn, watched

FLOAT_BYTES = 4
TRIES = 3
PROBE_SECONDS = 0.01
STEADY_SECONDS, STEADY_SHARE = 0.0003, 0.7
TABLE_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)


@dataclass
class Roofline:
    """Measured ceilings at a thread count. Bandwidths are measured when first asked for.

    peak_flops comes from a loop that touches registers only; matmul_flops is the best torch.mm of
    2048 x 2048 x 2048 in the same minute: what a matmul gets of that peak on this machine.
    """

    threads: int
    peak_flops: float
    source: str
    bandwidths: dict[int, float] = field(default_factory=dict)
    matmul_flops: float = 0.0
    _measure: Callable[[int], float] | None = None

    def bandwidth(self, bytes_per_thread: int) -> float:
        """Bytes per second, all threads together, each streaming a working set of its own."""
        size = _grain(bytes_per_thread)
        if size not in self.bandwidths:
            if self._measure is None:
                nearest = min(self.bandwidths, key=lambda known: abs(known - size))
                return self.bandwidths[nearest]
            self.bandwidths[size] = self._measure(size)
        return self.bandwidths[size]

    def probes(self, case: Case) -> dict[str, Runner]:
        """What takes turns with a case's contestants: a probe of the peak, and of each bandwidth
        that binds the case; empty without the native probes."""
        native = _native()
        if native is None:
            return {}
        bound: set[int] = set()
        self._bind(case, bound)
        found: dict[str, Runner] = {PEAK: _Probe(native.measure_peak_flops, self.threads)}
        for size in bound:
            found[f"{BANDWIDTH}{size}"] = _Probe(native.measure_bandwidth, self.threads, size)
        return found

    def steady(self) -> bool:
        """Whether all threads compute at most of their speed right now, in one of a few tries: two
        virtual cores on one real core have half of it. True without the native probes."""
        native = _native()
        if native is None or self.threads == 1:
            return True
        return any(
            native.measure_peak_flops(self.threads, STEADY_SECONDS)
            >= STEADY_SHARE * self.peak_flops
            for _ in range(TRIES)
        )

    def meanwhile(self, timings: Mapping[str, Timing]) -> Roofline:
        """The ceilings as the probes among the timings found them; ours for the others."""
        peak, known = self.peak_flops, dict(self.bandwidths)
        for name, timing in timings.items():
            if name == PEAK:
                peak = 1 / timing.median
            elif name.startswith(BANDWIDTH):
                known[int(name.removeprefix(BANDWIDTH))] = 1 / timing.median
        return Roofline(self.threads, peak, self.source, known, self.matmul_flops, self._measure)

    def of(self, probes: Iterable[str]) -> dict[str, float]:
        """The ceilings that these probes stand for: FLOP/s, and bytes per second by working set."""
        return {
            name: self.peak_flops
            if name == PEAK
            else self.bandwidths[int(name.removeprefix(BANDWIDTH))]
            for name in probes
        }

    def bound_seconds(self, case: Case) -> float:
        """The time below which no float32 implementation of the case gets, by the model above."""
        return self._bind(case, set())

    def _bind(self, case: Case, bound: set[int]) -> float:
        """`bound_seconds`; to `bound` go the working sets whose bandwidth binds a phase."""
        gates, rows, output = GATES[case.cell] * case.H, case.T * case.N, case.output_size
        recurrent = gates * output + case.H * case.proj
        input_gemm = self._phase(
            2.0 * rows * gates * case.input_size, gates * case.input_size, bound
        )
        # The weights of all L micro-steps come by in every step: their sum is the working set.
        recurrent *= case.depth
        recurrence = case.T * self._phase(2.0 * case.N * recurrent, recurrent, bound)
        forward = input_gemm + recurrence
        if case.mode == "training":
            weight_gradients = 2.0 * rows * (gates * case.input_size + recurrent) / self.peak_flops
            return case.directions * (forward + recurrence + input_gemm + weight_gradients)
        return case.directions * forward

    def _phase(self, flops: float, weights: int, bound: set[int]) -> float:
        streamed = weights * FLOAT_BYTES
        own = streamed // self.threads
        computing, streaming = flops / self.peak_flops, streamed / self.bandwidth(own)
        if streaming > computing:
            bound.add(_grain(own))
        return max(computing, streaming)

    def to_dict(self) -> dict[str, Any]:
        table = [
            {"bytes_per_thread": size, "bytes_per_second": rate}
            for size, rate in sorted(self.bandwidths.items())
        ]
        return {
            "threads": self.threads,
            "peak_flops": self.peak_flops,
            "matmul_flops": self.matmul_flops,
            "source": self.source,
            "bandwidth": table,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Roofline:
        table = {row["bytes_per_thread"]: row["bytes_per_second"] for row in data["bandwidth"]}
        matmul = data.get("matmul_flops", 0.0)
        return cls(data["threads"], data["peak_flops"], data["source"], table, matmul)


PEAK, BANDWIDTH = "ceiling flops", "ceiling bandwidth "


class _Probe:
    """A contestant whose samples are seconds per flop, or per byte."""

    def __init__(self, rate: Callable[..., float], *arguments: int) -> None:
        self._rate, self._arguments = rate, arguments

    def turn(self) -> Turn:
        return watched(lambda: [1 / self._rate(*self._arguments, PROBE_SECONDS)])


def measure(threads: int, seconds: float = 0.15) -> Roofline:
    """Measures the ceilings with fastrnn's native probes; the best of a few tries each."""
    native = _native()
    if native is None:
        return _torch_roofline(threads, seconds)
    peak = max(float(native.measure_peak_flops(threads, seconds)) for _ in range(TRIES))

    def stream(size: int) -> float:
        return max(
            float(native.measure_bandwidth(threads, size, seconds / 3)) for _ in range(TRIES)
        )

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    matmul = 2.0 * 2048**3 / _best(lambda: torch.mm(a, b), 3 * seconds)
    roofline = Roofline(threads, peak, "fastrnn._cpu probes", matmul_flops=matmul, _measure=stream)
    for size in TABLE_BYTES:
        roofline.bandwidth(size)
    return roofline


def _native() -> Any:
    try:
        from fastrnn import _cpu
    except ImportError:
        return None
    return (
        _cpu if hasattr(_cpu, "measure_peak_flops") and hasattr(_cpu, "measure_bandwidth") else None
    )


def _torch_roofline(threads: int, seconds: float) -> Roofline:
    """Without the native probes: torch.mm and a sum, lower than the real ceilings."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    peak = 2.0 * 1024**3 / _best(lambda: torch.mm(a, b), seconds)

    def stream(size: int) -> float:
        block = torch.ones(max(1024, size * threads // FLOAT_BYTES))
        return block.numel() * FLOAT_BYTES / _best(lambda: block.sum(), seconds / 3)

    roofline = Roofline(threads, peak, "torch.mm and torch.sum (no native probes)", _measure=stream)
    for size in TABLE_BYTES:
        roofline.bandwidth(size)
    return roofline


def _best(call: Callable[[], object], seconds: float) -> float:
    best, begin = float("inf"), time.perf_counter()
    call()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best if best < float("inf") else time.perf_counter() - begin


def _grain(size: int) -> int:
    """Rounds up to two significant bits, so that neighbouring sizes share one measurement."""
    size = max(size, 4 << 10)
    step = 1 << (size.bit_length() - 2)
    return -(-size // step) * step
