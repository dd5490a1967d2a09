"""What a run prints: a table per cell and mode, geometric means, slower cases, targets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.arguments import read
from benchmarks.cases import CELLS, MODES, Case
from benchmarks.schema import Record, Results
from benchmarks.targets import evaluate, geometric_mean, vs_best, vs_onnx, vs_torch

LABELS = {
    "fastrnn": "fastrnn",
    "torch": "torch.nn",
    "onnx": "ONNX RT",
    "torch-cell": "torch cell",
    "torch-bf16": "torch bf16",
    "fastrnn-bf16": "ours bf16",
    "fastrnn-recompute": "recompute",
    "fastrnn-plain": "ours plain",
    "loop": "eager loop",
    "loop-compiled": "compiled loop",
    "fastrnn@auto": "widest",
    "fastrnn@avx2": "AVX2",
}
TITLES = {
    "grid": "",
    "step": " - one module.step",
    "overhead": " - overhead of a call",
    "bf16": " - bfloat16 weights",
    "isa": " - instruction sets",
    "options": " - options",
    "loops": " - against loops",
    "regularised": " - with regularisers, beside the plain layer",
    "layer_norm": " - with layer norm, beside a loop and the plain layer",
}
MODE_TITLES = {"forward": "forward", "training": "forward + backward", "step": "step"}


def text(results: Results) -> str:
    """The whole report."""
    blocks = [header(results), *tables(results.records)]
    blocks += [memory_table(results.memory)] if results.memory else []
    blocks += [
        summary(results.records),
        slower(results.records),
        targets(results),
        red(results.records),
    ]
    return "\n\n".join(block for block in blocks if block)


def header(results: Results) -> str:
    at = results.environment
    lines = [
        f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads, {at['isa']}, {at['system']}",
        f"fastrnn {at['fastrnn']}, torch {at['torch']}, ONNX Runtime {at['onnxruntime']}, "
        f"Python {at['python']}, {at['date']}",
    ]
    lines += [f"left out: {why}" for why in results.settings.get("left_out", ())]
    if results.roofline:
        ceiling = results.roofline
        rates = "  ".join(
            f"{row['bytes_per_thread'] / 2**20:g} MiB {row['bytes_per_second'] / 1e9:.0f}"
            for row in ceiling["bandwidth"]
            if row["bytes_per_thread"] & (row["bytes_per_thread"] - 1) == 0
        )
        lines.append(
            f"peak {ceiling['peak_flops'] / 1e9:.0f} GFLOP/s "
            f"(torch.mm {ceiling['matmul_flops'] / 1e9:.0f}); "
            f"GB/s by working set per thread: {rates}"
        )
        lines.append(f"(measured in this run: {ceiling['source']})")
    return "\n".join(lines)


def tables(records: Iterable[Record]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.ok and record.timings:
            groups.setdefault((record.case.group, record.case.cell, record.case.mode), []).append(
                record
            )
    for (group, cell, mode), rows in groups.items():
        yield _table(f"{cell.upper()} {MODE_TITLES[mode]}{TITLES.get(group, f' - {group}')}", rows)


def _table(title: str, records: list[Record]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record.timings))
    names.sort(key=lambda name: name != "fastrnn")  # which a record may lack, on a GPU
    peers = [name for name in names if name != names[0]]
    head = [
        "case",
        *(f"{LABELS.get(name, name)} ms" for name in names),
        *(f"x {LABELS.get(name, name)}" for name in peers),
        "GF/s",
        "roofline",
        "",
    ]
    body = []
    for record in records:
        ours = record.timings.get(names[0])
        share = record.share()
        body.append(
            [
                _short(record.case),
                *(
                    _ms(record.timings[name].median) if name in record.timings else "-"
                    for name in names
                ),
                *(_ratio(record.speedup(name, ours=names[0])) for name in peers),
                f"{record.case.flops / ours.median / 1e9:.1f}" if ours else "-",
                f"{share:.0%}" if share else "-",
                _marks(record),
            ]
        )
    return f"{title}\n{_align([head, *body])}"


def memory_table(memory: list[tuple[Case, dict[str, int]]]) -> str:
    body = []
    for case, peaks in memory:
        ratio = peaks["fastrnn"] / max(1, peaks["torch"])
        sizes = [
            f"{peaks[name] / 2**20:.1f}" if name in peaks else "-"
            for name in ("fastrnn", "fastrnn-recompute", "torch")
        ]
        body.append([f"{case.cell} {_short(case)}", *sizes, f"{ratio:.2f}"])
    return "Peak memory of one training step\n" + _align(
        [["case", "fastrnn MiB", "recompute MiB", "torch.nn MiB", "of torch.nn"], *body]
    )


def summary(records: list[Record]) -> str:
    body = []
    for cell in CELLS:
        for mode in MODES[:2]:
            rows = [
                each
                for each in records
                if (each.case.group, each.case.cell, each.case.mode) == ("grid", cell, mode)
            ]
            columns = [
                [ratio for each in rows if (ratio := metric(each)) is not None]
                for metric in (vs_torch, vs_onnx, vs_best)
            ]
            if columns[0]:
                means = [f"{geometric_mean(column):.2f}" if column else "-" for column in columns]
                body.append(
                    [
                        cell.upper(),
                        MODE_TITLES[mode],
                        str(len(rows)),
                        *means,
                        f"{min(columns[0]):.2f}",
                    ]
                )
    if not body:
        return ""
    head = [
        "cell",
        "mode",
        "cases",
        "x torch.nn",
        "x ONNX RT",
        "x faster of both",
        "lowest x torch.nn",
    ]
    return "Geometric means over the grid\n" + _align([head, *body])


def slower(records: list[Record]) -> str:
    """The cases in which a peer was faster: they stay in sight."""
    rows = [
        [record.case.id, f"{ratio:.2f}", _marks(record)]
        for record in records
        if record.case.group in ("grid", "options")
        and (ratio := vs_best(record)) is not None
        and ratio < 1.0
    ]
    if not rows:
        return ""
    return f"Slower than the faster peer in {len(rows)} cases\n" + _align(
        [["case", "x peer", ""], *sorted(rows, key=lambda row: row[1])]
    )


def ahead(results: Results) -> str:
    """The cases in which a peer was faster by more than 5%, as a table for docs/not-faster.md."""
    rows = []
    for record in results.records:
        ratio = vs_best(record)
        if ratio is not None and ratio < 0.95:
            peer = min(("torch", "onnx"), key=lambda name: record.speedup(name) or float("inf"))
            marks = [mark for mark in _marks(record).split(", ") if mark != "slower"]
            rows.append((ratio, record.case.id, LABELS[peer], ", ".join(marks)))
    head = ["| case | faster peer | our speed in its | |", "|---|---|---|---|"]
    body = [
        f"| `{case}` | {peer} | {ratio:.2f} | {marks} |".replace("|  |", "| |")
        for ratio, case, peer, marks in sorted(rows)
    ]
    return "\n".join([*head, *body])


def targets(results: Results) -> str:
    outcomes = evaluate(results)
    if results.settings.get("verify_only") or all(outcome.value is None for outcome in outcomes):
        return ""
    body = []
    for outcome in (each for each in outcomes if each.value is not None):
        sign = "<=" if outcome.at_most else ">="
        value = "-" if outcome.value is None else f"{outcome.value:.2f}"
        where = "; ".join(each for each in (outcome.where, outcome.note) if each)
        body.append([outcome.status, outcome.text, f"{sign} {outcome.goal:.2f}", value, where])
    met = sum(outcome.status == "pass" for outcome in outcomes)
    measured = sum(outcome.value is not None for outcome in outcomes)
    title = f"Targets: {met} of {measured} met" + (
        f", {len(outcomes) - measured} not measured" if measured < len(outcomes) else ""
    )
    return f"{title} (the case named is the worst one)\n" + _align(
        [["", "target", "goal", "value", "where"], *body], left=2
    )


def red(records: list[Record]) -> str:
    lines = []
    for record in records:
        if not record.ok:
            messages = (
                [record.error]
                if record.error
                else [each["message"] for each in record.checks.values() if not each["ok"]]
            )
            lines += [f"  {record.case.id}: {message}" for message in messages]
    return "RED (no speedup is given for these)\n" + "\n".join(lines) if lines else ""


def _marks(record: Record) -> str:
    marks = ["torch's kernel"] if record.handed_over else []
    marks += ["disturbed"] if record.disturbed else []
    marks += ["roofline disturbed"] if record.share_disturbed and not record.disturbed else []
    marks += ["bits differ"] if record.bits_equal is False else []
    ratio = vs_best(record)
    return ", ".join([*marks, *(["slower"] if ratio is not None and ratio < 1.0 else [])])


def _short(case: Case) -> str:
    return (
        case.id.split("/", 2)[2].replace(f"/{case.group}", "").replace("-", " ").replace("/", " ")
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}" if seconds < 1e-2 else f"{seconds * 1e3:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _align(rows: list[list[str]], left: int = 1) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        last = len(row) - 1
        cells = [
            text.ljust(width) if column < left or column == last else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    it = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    it.add_argument(
        "json", nargs="?", type=Path, help="result file (default: the committed full.json)"
    )
    it.add_argument("--ahead", action="store_true", help="only the table of docs/not-faster.md")
    options = it.parse_args(arguments)
    results = read(it, options.json)
    print(ahead(results) if options.ahead else text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
