"""Draws the README's figures from a committed result file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.arguments import read
from benchmarks.cases import CELLS
from benchmarks.schema import Record, Results

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "img"
MODES = {"forward": "forward (inference)", "training": "forward + backward"}
COLOURS = {"lstm": "#1f77b4", "gru": "#d95f02", "rnn": "#7570b3"}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Writes speedup.svg and roofline.svg; raises ValueError without a timed grid case."""
    records = [
        record for record in results.records if record.case.group == "grid" and record.timings
    ]
    if not records:
        raise ValueError("results hold no timed grid case; run `python -m benchmarks --full` first")
    folder.mkdir(parents=True, exist_ok=True)
    # A fixed salt and no date: the same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "fastrnn"
    speedups = _figure(
        records,
        results,
        "speedup over torch.nn (log scale)",
        lambda record: record.speedup("torch"),
        lambda record: any(
            name in record.timings and record.timings[name].disturbed
            for name in ("fastrnn", "torch")
        ),
        log=True,
    )
    shares = _figure(
        records,
        results,
        "share of the roofline",
        Record.share,
        lambda record: record.share_disturbed,
        log=False,
    )
    return [save(speedups, folder / "speedup.svg"), save(shares, folder / "roofline.svg")]


def _figure(
    records: list[Record],
    results: Results,
    label: str,
    metric: Any,
    shaken: Callable[[Record], bool],
    *,
    log: bool,
) -> Any:
    """Two panels, forward and training: shapes along the axis (by work), one marker per cell,
    hollow where what it was made of was disturbed."""
    shapes = {
        (each.case.T, each.case.N, each.case.H): each.case.T * each.case.N * each.case.H**2
        for each in records
    }
    order = {
        shape: index
        for index, shape in enumerate(sorted(shapes, key=lambda shape: (shape[1], shapes[shape])))
    }
    figure, panels = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True, layout="constrained")
    for panel, (mode, title) in zip(panels, MODES.items(), strict=True):
        for offset, cell in zip((-0.2, 0.0, 0.2), CELLS, strict=True):
            points = [
                (
                    order[each.case.T, each.case.N, each.case.H] + offset,
                    value,
                    shaken(each),
                )
                for each in records
                if (each.case.cell, each.case.mode) == (cell, mode)
                and (value := metric(each)) is not None
            ]
            if points:
                places, values, disturbed = zip(*points, strict=True)
                panel.vlines(
                    places,
                    1.0 if log else 0.0,
                    values,
                    color=COLOURS[cell],
                    linewidth=1.5,
                    alpha=0.5,
                )
                fill = ["white" if each else COLOURS[cell] for each in disturbed]
                panel.scatter(
                    places,
                    values,
                    s=20,
                    color=fill,
                    edgecolors=COLOURS[cell],
                    linewidths=1.0,
                    zorder=3,
                )
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_ylabel(label, fontsize=8)
        panel.grid(axis="y", linewidth=0.3)
        if log:
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        else:
            panel.set_ylim(0, 1.1)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    keys: list[Any] = [
        Line2D(
            [],
            [],
            color=COLOURS[cell],
            marker="o",
            linestyle="",
            markersize=4.5,
            label=cell.upper(),
        )
        for cell in CELLS
    ]
    keys.append(
        Line2D(
            [], [], color="black", marker="o", linestyle="", markersize=4.5,
            markerfacecolor="white", label="disturbed: not to be quoted",
        )
    )  # fmt: skip
    panels[0].legend(handles=keys, loc="upper right", ncols=4, fontsize=8, frameon=False)
    names = [f"T{steps} N{batch} H{hidden}" for steps, batch, hidden in order]
    panels[1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    figure.suptitle(caption(results), fontsize=8)
    return figure


def caption(results: Results) -> str:
    """The hardware and versions, which every figure carries."""
    at = results.environment
    return (
        f"{at['cpu']}, {at['threads']} threads, {at['isa']}, float32, I = H; "
        f"fastrnn {at['fastrnn']}, torch {at['torch']}, {at['date']}"
    )


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    it = argparse.ArgumentParser("python -m benchmarks.plot", description=__doc__)
    it.add_argument(
        "json", nargs="?", type=Path, help="result file (default: the committed full.json)"
    )
    it.add_argument(
        "--out", type=Path, default=IMAGES, help="folder of the figures (default: docs/img)"
    )
    options = it.parse_args(arguments)
    results = read(it, options.json)
    try:
        drawn = draw_all(results, options.out)
    except (OSError, ValueError) as error:
        it.error(f"{options.json or 'the committed results'} to {options.out}: {error}")
    for path in drawn:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
