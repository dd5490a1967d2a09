"""A made-up GPU and made-up times, for the tests of the GPU campaign."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.schema import Record
from benchmarks.timing import Timing

AT = {
    "device": "A GPU", "device_slug": "a-gpu", "cpu": "A GPU", "isa": "compute capability 9.0",
    "cores": 132, "threads": 1, "sms": 132, "driver": "1", "cuda": "13", "cudnn": 9,
    "fastrnn": "0", "torch": "2", "triton": "3", "onnxruntime": "none", "python": "3",
    "system": "Linux", "date": "2000-01-01 00:00 UTC",
}  # fmt: skip


def timed(case: Case, **seconds: float) -> Record:
    record = Record(case, {"fastrnn": {"ok": True, "message": ""}})
    names = {name.replace("_", "-"): value for name, value in seconds.items()}
    record.timings = {name: Timing(value, value, value, 20) for name, value in names.items()}
    return record
