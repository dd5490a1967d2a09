"""The one result schema: written as JSON, exported as CSV, read by the report and the plots.

{"schema": 1, "kind": "cases", "environment": {...}, "settings": {...}, "roofline": {...},
 "records": [{"case": {...}, "checks": {contestant: {...}}, "timings": {contestant: {...}}, ...}],
 "memory":  [{"case": {...}, "bytes": {contestant: int}}]}

Whole models have a file of another kind, "models": see benchmarks/models.py.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.timing import Timing

SCHEMA = 1
PLACE = (  # what a report says of the environment
    *("cpu", "cores", "threads", "isa", "system", "fastrnn", "torch", "onnxruntime", "python"),
    "date",
)
RESULTS = Path(__file__).parent / "results"
CSV_COLUMNS = (
    "case",
    "cell",
    "mode",
    "group",
    "T",
    "N",
    "H",
    "I",
    "contestant",
    "metric",
    "unit",
    "median",
    "p20",
    "p80",
    "samples",
    "discarded",
    "disturbed",
    "verified",
    "backend",
    "speedup_vs_torch",
    "gflops",
    "roofline_share",
    "cpu",
    "isa",
    "threads",
    "fastrnn",
    "torch",
    "onnxruntime",
    "date",
)


@dataclass
class Record:
    """One timed case. checks and timings by contestant; backends: what explain() said of ours;
    details: the ceilings of a bounded case, and what a campaign adds."""

    case: Case
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    bound_seconds: float | None = None
    bits_equal: bool | None = None
    error: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.error and all(each["ok"] for each in self.checks.values())

    @property
    def handed_over(self) -> bool:
        """Dispatch gave this shape to torch's own kernel."""
        return self.backends.get("fastrnn") == "torch"

    @property
    def disturbed(self) -> bool:
        return any(each.disturbed for each in self.timings.values())

    @property
    def share_disturbed(self) -> bool:
        """Our time, or the ceiling that the share is of."""
        ours = self.timings.get("fastrnn")
        return bool(self.details.get("ceiling_disturbed") or (ours and ours.disturbed))

    def speedup(self, peer: str, ours: str = "fastrnn") -> float | None:
        """Peer's median over ours; None without both, or on a red check."""
        if not self.ok or ours not in self.timings or peer not in self.timings:
            return None
        return self.timings[peer].median / self.timings[ours].median

    def share(self) -> float | None:
        """Share of the roofline: the bound over our median."""
        if not self.ok or self.bound_seconds is None or "fastrnn" not in self.timings:
            return None
        return self.bound_seconds / self.timings["fastrnn"].median

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.case.to_dict(),
            "checks": self.checks,
            "timings": {name: each.to_dict() for name, each in self.timings.items()},
            "backends": self.backends,
            "bound_seconds": self.bound_seconds,
            "bits_equal": self.bits_equal,
            "error": self.error,
            "speedup_vs_torch": self.speedup("torch"),
            "speedup_vs_onnx": self.speedup("onnx"),
            "roofline_share": self.share(),
            **({"details": self.details} if self.details else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        timings = {name: Timing(**each) for name, each in data["timings"].items()}
        return cls(
            Case.from_dict(data["case"]),
            data["checks"],
            timings,
            data["backends"],
            data["bound_seconds"],
            data["bits_equal"],
            data["error"],
            data.get("details", {}),
        )


@dataclass
class Results:
    """A run: where, how, and what came out."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    roofline: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list)
    memory: list[tuple[Case, dict[str, int]]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "cases",
            "environment": self.environment,
            "settings": self.settings,
            "roofline": self.roofline,
            "records": [record.to_dict() for record in self.records],
            "memory": [{"case": case.to_dict(), "bytes": peaks} for case, peaks in self.memory],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Results:
        if data.get("schema") != SCHEMA:
            came = data.get("schema")
            raise ValueError(f"results have schema {came!r}, expected {SCHEMA}: run again")
        kind = data.get("kind", "cases")  # which files of version 0.1 do not say
        if kind != "cases":
            raise ValueError(f"results are of kind {kind!r}, expected 'cases'")
        missing = [key for key in PLACE if key not in data["environment"]]
        if missing:
            raise ValueError(f"the environment has no {', '.join(missing)}")
        memory = [(Case.from_dict(row["case"]), row["bytes"]) for row in data["memory"]]
        records = [Record.from_dict(row) for row in data["records"]]
        return cls(data["environment"], data["settings"], data["roofline"], records, memory)

    def save(self, path: Path) -> None:
        """Writes JSON to `path`, atomically, and the CSV beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=True) + "\n")
        os.replace(partial, path)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls.from_dict(json.loads(path.read_text()))

    def rows(self) -> list[dict[str, Any]]:
        """The CSV: one line per case and contestant, times in ms, memory in MiB."""
        shared = {key: self.environment.get(key) for key in CSV_COLUMNS if key in self.environment}
        rows = []
        for record in self.records:
            for name, timing in record.timings.items():
                ours = name == "fastrnn"
                rows.append(
                    _case_columns(record.case)
                    | shared
                    | {
                        "contestant": name,
                        "metric": "time",
                        "unit": "ms",
                        "samples": timing.samples,
                        **{
                            key: round(getattr(timing, key) * 1e3, 6)
                            for key in ("median", "p20", "p80")
                        },
                        "discarded": timing.discarded,
                        "disturbed": timing.disturbed,
                        "verified": record.ok,
                        "backend": record.backends.get(name, ""),
                        "speedup_vs_torch": _round(record.speedup("torch")) if ours else None,
                        "gflops": round(record.case.flops / timing.median / 1e9, 2),
                        "roofline_share": _round(record.share()) if ours else None,
                    }
                )
        for case, peaks in self.memory:
            for name, size in peaks.items():
                columns = {
                    "contestant": name,
                    "metric": "peak_memory",
                    "unit": "MiB",
                    "median": round(size / 2**20, 3),
                }
                rows.append(_case_columns(case) | shared | columns)
        return rows


def newest() -> Path:
    """The committed full result of the latest date. Raises FileNotFoundError."""
    found = list(RESULTS.glob("*/full.json"))
    if not found:
        raise FileNotFoundError(
            f"no full.json below {RESULTS}; run `python -m benchmarks --full` first"
        )
    return max(found, key=lambda path: json.loads(path.read_text())["environment"]["date"])


def _case_columns(case: Case) -> dict[str, Any]:
    size = {"T": case.T, "N": case.N, "H": case.H, "I": case.input_size}
    return {"case": case.id, "cell": case.cell, "mode": case.mode, "group": case.group, **size}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def cpu_name() -> str:
    """The processor's name, with family and model where a hypervisor hides the name."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return (
        f"{name} (family {fields['cpu family']} model {fields['model']})"
        if "cpu family" in fields
        else name
    )


def slug(text: str) -> str:
    """A CPU's name as a directory name."""
    text = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*?GHz", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def version_of(package: str) -> str:
    """The installed version, "none" without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def environment(threads: int) -> dict[str, Any]:
    """Everything a reader needs to place the numbers."""
    import torch

    import fastrnn
    from benchmarks.worker import isa_name

    name = cpu_name()
    return {
        "cpu": name,
        "cpu_slug": slug(name),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads,
        "isa": isa_name(),
        "fastrnn": fastrnn.__version__,
        "torch": torch.__version__,
        "onnxruntime": version_of("onnxruntime"),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
