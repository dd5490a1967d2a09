"""The speed targets, checked against a run's results: what was promised, the number, pass or miss.

A target takes the worst case (or the geometric mean) over the records it selects. Records with a
red check have no number, so a target that selects one is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.cases import RECOMPUTE_SHAPE, Case
from benchmarks.memory import RESOLUTION
from benchmarks.schema import Record, Results

Metric = Callable[[Record], "float | None"]


@dataclass
class Outcome:
    """A checked target. value is None if the run did not measure it. note: what a reader of the
    value has to know."""

    text: str
    goal: float
    value: float | None
    where: str = ""
    at_most: bool = False
    note: str = ""

    @property
    def status(self) -> str:
        if self.value is None:
            return "not measured"
        return (
            "pass"
            if (self.value <= self.goal if self.at_most else self.value >= self.goal)
            else "MISS"
        )


def evaluate(results: Results) -> list[Outcome]:
    """All targets; those that the run did not measure have no value."""
    records = results.records
    grid = [record for record in records if record.case.group == "grid"]
    return [
        *_roofline(grid),
        *_lstm(grid),
        *_gru_and_rnn(grid),
        *_overhead(grid, records),
        *_bf16([record for record in records if record.case.group == "bf16"]),
        *_isa([record for record in records if record.case.group == "isa"]),
        _every_shape(grid),
        *_loops([record for record in records if record.case.group == "loops"]),
        *_regularised([record for record in records if record.case.group == "regularised"]),
        *_memory(results.memory),
    ]


def vs_torch(record: Record) -> float | None:
    return record.speedup("torch")


def vs_onnx(record: Record) -> float | None:
    return record.speedup("onnx")


def vs_best(record: Record) -> float | None:
    """Against the faster of torch.nn and (inference) ONNX Runtime."""
    found = [ratio for ratio in (vs_torch(record), vs_onnx(record)) if ratio is not None]
    return min(found) if found else None


def share(record: Record) -> float | None:
    return record.share()


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _of(
    records: list[Record],
    cell: str = "",
    mode: str = "",
    keep: Callable[[Case], bool] = lambda _: True,
) -> list[Record]:
    return [
        record
        for record in records
        if cell in ("", record.case.cell) and mode in ("", record.case.mode) and keep(record.case)
    ]


def _worst(text: str, goal: float, records: list[Record], metric: Metric) -> Outcome:
    """The lowest value; a record without a number (red check) counts as 0."""
    rated = [(metric(record) or 0.0, record.case.id) for record in records]
    value, where = min(rated, default=(None, ""))
    return Outcome(text, goal, value, where)


def _mean(text: str, goal: float, records: list[Record], metric: Metric) -> Outcome:
    values = [metric(record) or 1e-9 for record in records]
    return Outcome(text, goal, geometric_mean(values) if values else None, f"{len(values)} cases")


def _every_shape(grid: list[Record]) -> Outcome:
    """A shape that dispatch hands over runs torch.nn's own kernel: it counts as 1. What was
    measured of it, our call around that kernel included, is in the note."""

    def metric(record: Record) -> float | None:
        ratio = vs_torch(record)
        return ratio if ratio is None or not record.handed_over else 1.0

    found = _worst("every grid shape, against torch.nn", 0.95, grid, metric)
    handed = [
        (r, record.case.id) for record in grid if record.handed_over and (r := vs_torch(record))
    ]
    if handed:
        ratio, slowest = min(handed)
        found.note = (
            f"torch's kernel runs in {len(handed)} and counts as 1.00, "
            f"measured {ratio:.2f} at worst in {slowest}"
        )
    return found


def _roofline(grid: list[Record]) -> Iterator[Outcome]:
    for cell in ("lstm", "gru", "rnn"):
        wide = _of(grid, cell, keep=lambda case: case.N >= 8 and case.H >= 128)
        name = cell.upper()
        yield _worst(
            f"{name} forward, N>=8 H>=128: share of roofline",
            0.88,
            _of(wide, mode="forward"),
            share,
        )
        single = _of(grid, cell, "forward", lambda case: case.N == 1 and case.H >= 512)
        yield _worst(f"{name} forward, N=1 H>=512: share of bandwidth bound", 0.90, single, share)
        batched = _of(grid, cell, "training", lambda case: case.N >= 8)
        yield _worst(f"{name} training, N>=8: share of roofline", 0.78, batched, share)


def _lstm(grid: list[Record]) -> Iterator[Outcome]:
    forward, training = _of(grid, "lstm", "forward"), _of(grid, "lstm", "training")
    yield _worst("LSTM forward, N=1: against torch.nn", 1.5, _of(forward, keep=_single), vs_torch)
    yield _worst(
        "LSTM forward, N=1: against ONNX Runtime", 1.15, _of(forward, keep=_single), vs_onnx
    )
    yield _worst(
        "LSTM forward, N>=8: against the faster peer", 1.05, _of(forward, keep=_batched), vs_best
    )
    yield _worst("LSTM training, N=1: against torch.nn", 2.1, _of(training, keep=_single), vs_torch)
    yield _worst(
        "LSTM training, N>=8: against torch.nn", 1.12, _of(training, keep=_batched), vs_torch
    )
    long = _of(training, keep=lambda case: (case.T, case.N, case.H) == (784, 64, 128))
    yield _worst("LSTM training, T784 N64 H128: against torch.nn", 1.8, long, vs_torch)
    yield _mean("LSTM training, geometric mean: against torch.nn", 1.5, training, vs_torch)


def _gru_and_rnn(grid: list[Record]) -> Iterator[Outcome]:
    forward, training = _of(grid, "gru", "forward"), _of(grid, "gru", "training")
    yield _worst("GRU forward, every case: against torch.nn", 1.5, forward, vs_torch)
    yield _worst("GRU training, every case: against torch.nn", 1.4, training, vs_torch)
    yield _worst("GRU forward, N=1: against torch.nn", 3.0, _of(forward, keep=_single), vs_torch)
    yield _worst("GRU training, N=1: against torch.nn", 5.0, _of(training, keep=_single), vs_torch)
    yield _mean("GRU forward, geometric mean: against torch.nn", 2.4, forward, vs_torch)
    yield _mean("GRU training, geometric mean: against torch.nn", 2.8, training, vs_torch)
    yield _mean(
        "RNN forward, geometric mean: against torch.nn", 1.6, _of(grid, "rnn", "forward"), vs_torch
    )
    yield _mean(
        "RNN training, geometric mean: against torch.nn",
        1.8,
        _of(grid, "rnn", "training"),
        vs_torch,
    )


def _overhead(grid: list[Record], records: list[Record]) -> Iterator[Outcome]:
    for mode in ("forward", "training"):
        call = _of(grid, mode=mode, keep=lambda case: (case.T, case.N, case.H) == (1, 1, 128))
        yield _worst(f"one call, T=1 N=1 H=128, {mode}: against torch.nn", 2.0, call, vs_torch)
    for mode in ("forward", "training"):
        for option in ("", "compiled"):
            small = [
                record
                for record in _of(records, mode=mode)
                if (record.case.group, record.case.option) == ("overhead", option)
            ]
            text = f"one call, T=1 N=1 H=16, {mode}, {option or 'eager'}: against torch.nn"
            yield _worst(text, 1.0, small, vs_torch)
    steps = _of(records, mode="step")
    yield _worst(
        "module.step, N=1 H=256: against torch.nn's cell",
        2.0,
        steps,
        lambda record: record.speedup("torch-cell"),
    )


def _bf16(records: list[Record]) -> Iterator[Outcome]:
    few = _of(records, keep=lambda case: case.N <= 4 and case.H >= 512)
    many = _of(records, keep=lambda case: case.N >= 8)

    def gain(record: Record) -> float | None:
        return record.speedup("fastrnn", ours="fastrnn-bf16")

    yield _worst("bf16 weights, N<=4 H>=512: against own float32", 1.4, few, gain)
    yield _worst("bf16 weights, N>=8 (AVX512_BF16): against own float32", 1.4, many, gain)
    text = "bf16 weights: against torch's bfloat16 LSTM"
    yield _worst(
        text, 1.0, records, lambda record: record.speedup("torch-bf16", ours="fastrnn-bf16")
    )


def _isa(records: list[Record]) -> Iterator[Outcome]:
    text = "AVX2 against the widest instruction set: speed"
    yield _worst(
        text, 0.75, records, lambda record: record.speedup("fastrnn@auto", ours="fastrnn@avx2")
    )
    equal = [float(bool(record.bits_equal)) for record in records if record.ok]
    where = ", ".join(record.case.id for record in records if record.ok and not record.bits_equal)
    yield Outcome(
        "AVX2 against the widest instruction set: share of cases equal to the bit",
        1.0,
        sum(equal) / len(equal) if equal else None,
        where,
    )


def vs_loop(record: Record) -> float | None:
    """Against the faster of the eager and the compiled loop."""
    found = [record.speedup(name) for name in ("loop", "loop-compiled")]
    ratios = [ratio for ratio in found if ratio is not None]
    return min(ratios) if ratios else None


def _loops(records: list[Record]) -> Iterator[Outcome]:
    rhn = _of(records, "rhn", "training")
    yield _worst("RHN training, every case: against the fastest loop", 1.6, rhn, vs_loop)
    large = _of(rhn, keep=lambda case: case.H == 830)
    yield _worst(
        "RHN training, T35 N20 H830 depth 10: against the fastest loop", 2.8, large, vs_loop
    )
    single = _of(rhn, keep=_single)
    yield _worst("RHN training, T100 N1 H512 depth 5: against the fastest loop", 8, single, vs_loop)
    yield _worst("RHN training, N>=20 H=830: share of roofline", 0.75, large, share)
    bn = _of(records, "bnlstm", "training")
    middle = _of(bn, keep=lambda case: (case.T, case.N, case.H) == (100, 32, 256))
    yield _worst("BN-LSTM training, T100 N32 H256: against the fastest loop", 3.5, middle, vs_loop)
    yield _mean("BN-LSTM training, geometric mean: against the fastest loop", 4, bn, vs_loop)
    yield _most("BN-LSTM training: time of our plain LSTM of the same shape", 1.6, bn, vs_plain)


def _regularised(records: list[Record]) -> Iterator[Outcome]:
    for cell in ("lstm", "gru"):
        text = f"{cell.upper()} with a regulariser, training: time of our plain one"
        yield _most(text, 1.15, _of(records, cell), vs_plain)


def vs_plain(record: Record) -> float | None:
    """Our time over that of our plain layer."""
    ratio = record.speedup("fastrnn-plain")
    return None if ratio is None else 1 / ratio


def _most(text: str, goal: float, records: list[Record], metric: Metric) -> Outcome:
    """The highest value, which shall be at most the goal; no number counts as infinite."""
    rated = [(metric(record) or float("inf"), record.case.id) for record in records]
    value, where = max(rated, default=(None, ""))
    return Outcome(text, goal, value, where, at_most=True)


def _memory(memory: list[tuple[Case, dict[str, int]]]) -> Iterator[Outcome]:
    ratios = [
        (max(0.0, peaks["fastrnn"] - RESOLUTION) / max(1, peaks["torch"]), case.id)
        for case, peaks in memory
    ]
    value, where = max(ratios, default=(None, ""))
    yield Outcome(
        "peak training memory, every case (1 MiB resolution): of torch.nn's",
        1.0,
        value,
        where,
        at_most=True,
    )
    for case, peaks in memory:
        if "fastrnn-recompute" in peaks and case.cell == "lstm":
            ratio = peaks["fastrnn-recompute"] / max(1, peaks["torch"])
            steps, batch, hidden = RECOMPUTE_SHAPE
            text = f"LSTM recompute=True, T={steps} N={batch} H={hidden}: peak memory of torch.nn's"
            yield Outcome(text, 0.45, ratio, case.id, at_most=True)


def _single(case: Case) -> bool:
    return case.N == 1


def _batched(case: Case) -> bool:
    return case.N >= 8
