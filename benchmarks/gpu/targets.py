"""What the GPU kernels are to reach, as data, checked against a campaign's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.schema import Record
from benchmarks.targets import Metric, Outcome, geometric_mean

Keep = Callable[[Case], bool]


def against(*peers: str) -> Metric:
    """The fastest of the peers over the faster of ours (CUDA, Triton)."""

    def metric(record: Record) -> float | None:
        ratios = [
            [ratio for peer in peers if (ratio := record.speedup(peer, ours=ours)) is not None]
            for ours in ("fastrnn", "fastrnn-triton")
        ]
        return max((min(each) for each in ratios if each), default=None)

    return metric


def cuda_alone(record: Record) -> float | None:
    return record.speedup("torch")


def triton_behind(record: Record) -> float | None:
    """Triton's time over the faster of CUDA's and cuDNN's."""
    found = [record.speedup(ours, ours="fastrnn-triton") for ours in ("fastrnn", "torch")]
    ratios = [ratio for ratio in found if ratio is not None]
    return 1 / min(ratios) if ratios else None


def model_ratio(record: Record) -> float | None:
    """Measured us/step over the cost model's."""
    measured, expected = (record.details.get(k) for k in ("us_per_step", "model_us_per_step"))
    if not record.ok or not measured or not expected:
        return None
    return measured["fastrnn"] / expected


@dataclass(frozen=True)
class Target:
    """kind: "worst" and "mean" (geometric) are at least the goal, "most" is at most it."""

    text: str
    goal: float
    groups: tuple[str, ...]
    metric: Metric
    kind: str = "worst"
    mode: str = ""
    keep: Keep = lambda case: True

    def check(self, records: list[Record]) -> Outcome:
        chosen = [
            record
            for record in records
            if record.case.group in self.groups
            and self.mode in ("", record.case.mode)
            and self.keep(record.case)
        ]
        if not chosen:
            return Outcome(self.text, self.goal, None, at_most=self.kind == "most")
        worst = float("inf") if self.kind == "most" else 0.0
        rated = []
        for record in chosen:
            value = self.metric(record)
            rated.append((worst if value is None else value, record.case.id))
        if self.kind == "mean":
            mean = geometric_mean([max(value, 1e-9) for value, _ in rated])
            return Outcome(self.text, self.goal, mean, f"{len(rated)} cases")
        value, where = (max if self.kind == "most" else min)(rated)
        return Outcome(self.text, self.goal, value, where, at_most=self.kind == "most")


def _fp16(case: Case) -> bool:
    return case.dtype == "float16"


def _up_to_192(case: Case) -> bool:
    return case.H <= 192


TARGETS = (
    Target("fp16 LSTM T1024 N16 H768, forward: against cuDNN", 1.5, ("headline",), cuda_alone,
           mode="forward", keep=_fp16),
    Target("fp16 LSTM T1024 N16 H768, forward + backward: against cuDNN", 1.4, ("headline",),
           cuda_alone, mode="training", keep=_fp16),
    Target("bf16 LSTM and GRU, H 256..1024, N 1..64, forward, geometric mean: against cuDNN", 3.0,
           ("wide",), cuda_alone, "mean", "forward"),
    Target("the same, forward + backward", 2.5, ("wide",), cuda_alone, "mean", "training"),
    Target("the same, every case", 1.0, ("wide",), cuda_alone),
    Target("fp32 (TF32), the same shapes, geometric mean: against cuDNN", 2.5, ("wide32",),
           cuda_alone, "mean"),
    Target("two directions, geometric mean: against cuDNN", 4.0, ("options",), cuda_alone, "mean",
           keep=lambda case: case.bidirectional),
    Target("packed batches, geometric mean: against cuDNN", 4.0, ("options",), cuda_alone, "mean",
           keep=lambda case: case.ragged == "packed"),
    Target("H up to 192, every case: the faster of ours against cuDNN", 1.0, ("small",),
           against("torch"), keep=_up_to_192),
    Target("RHN and BN-LSTM, every case: against the eager loop", 20.0, ("loops",),
           against("loop")),
    Target("RHN and BN-LSTM, every case: against the loop under torch.compile", 8.0, ("loops",),
           against("loop-compiled")),
    Target("time of a step over the cost model's, every kernel", 1.5, ("steps",), model_ratio,
           "most"),
    Target("Triton at H up to 128 and N from 512: time over the faster of CUDA and cuDNN", 1.2,
           ("many_rows",), triton_behind, "most"),
)  # fmt: skip


def evaluate(records: list[Record]) -> list[Outcome]:
    """All targets; a record without a number (red, refused) counts as the worst there is."""
    return [target.check(records) for target in TARGETS]
