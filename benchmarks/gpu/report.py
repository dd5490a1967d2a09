"""What the campaign found, as text: stages, probes, tables, red cases, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import report as tables
from benchmarks.gpu import targets
from benchmarks.gpu.stage import load
from benchmarks.schema import Record, Results


def text(folder: Path) -> str:
    """The whole report of a results folder; parts that were not run are left out."""
    state = load(folder / "state.json")
    blocks = [header(state.get("environment", {})), stages(state)]
    blocks.append(probes(load(folder / "probes.json")))
    blocks.append(tests(load(folder / "tests.json")))
    if (folder / "grid.json").exists():
        records = Results.load(folder / "grid.json").records
        blocks += [*tables.tables(records), steps(records), red(records), goals(records)]
    return "\n\n".join(block for block in blocks if block)


def header(at: dict[str, Any]) -> str:
    if not at:
        return ""
    return (
        f"{at['device']}, {at['sms']} SMs, driver {at['driver']}, CUDA {at['cuda']}, "
        f"cuDNN {at['cudnn']}\nfastrnn {at['fastrnn']}, torch {at['torch']}, "
        f"Triton {at['triton']}, Python {at['python']}, {at['date']}"
    )


def stages(state: dict[str, Any]) -> str:
    lines = [
        f"  {name:14} {each['status']:16} {each['seconds']:6.0f} s"
        for name, each in state.get("stages", {}).items()
    ]
    return "\n".join(["Stages", *lines]) if lines else ""


def probes(found: dict[str, Any]) -> str:
    lines = []
    for each in found.get("probes", ()):
        rest = {k: v for k, v in each.items() if k not in ("probe", "ok", "message")}
        words = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rest.items()
        )
        lines.append(
            f"  {each['probe']:26} {'ok ' if each['ok'] else 'RED'} {each['message']}{words}"
        )
    return "\n".join(["Probes", *lines]) if lines else ""


def tests(found: dict[str, Any]) -> str:
    outcomes = found.get("tests", {})
    if not outcomes:
        return ""
    kinds = [each["outcome"] for each in outcomes.values()]
    lines = ["Tests: " + ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds)))]
    lines += [f"  FAILED {name}" for name, each in outcomes.items() if each["outcome"] == "failed"]
    reasons = {each["message"] for each in outcomes.values() if each["outcome"] == "skipped"}
    return "\n".join([*lines, *(f"  skipped: {why}" for why in sorted(reasons))])


def steps(records: list[Record]) -> str:
    """Kernels alone: measured us/step beside the model's."""
    lines = []
    for record in records:
        if record.case.group == "steps" and record.ok and record.timings:
            measured = record.details["us_per_step"]["fastrnn"]
            model = record.details["model_us_per_step"]
            numbers = f"{measured:7.3f}  {model:7.3f}  {measured / model:5.2f}"
            lines.append(f"  {record.case.id:52} {numbers}  {record.backends['fastrnn']}")
    head = f"  {'kernel':52} us/step    model  ratio  plan"
    return "\n".join(["Time steps, kernels alone", head, *lines]) if lines else ""


def red(records: list[Record]) -> str:
    lines = [
        f"  {record.case.id}: {name}: {why}"
        for record in records
        for name, why in record.details.get("red", {}).items()
    ]
    lines += [f"  {record.case.id}: {record.error}" for record in records if record.error]
    return "\n".join(["RED (no number is given for these)", *lines]) if lines else ""


def goals(records: list[Record]) -> str:
    lines = []
    for outcome in targets.evaluate(records):
        value = "-" if outcome.value is None else f"{outcome.value:.2f}"
        sign = "<=" if outcome.at_most else ">="
        goal = f"{sign} {outcome.goal:g}"
        lines.append(f"  {outcome.status:12} {outcome.text}  {goal}  {value}  {outcome.where}")
    return "\n".join(["Targets (the case named is the worst one)", *lines])
