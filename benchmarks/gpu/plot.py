"""Figures from a campaign's committed grid.json: speedup over cuDNN, us/step beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.plot import COLOURS, MODES, save
from benchmarks.schema import Record, Results


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Writes gpu_speedup.svg and gpu_steps.svg, those for which there are numbers.

    Raises ValueError if there are none at all.
    """
    matplotlib.rcParams["svg.hashsalt"] = "fastrnn"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    wide = [each for each in results.records if each.case.group == "wide" and each.timings]
    steps = [
        each
        for each in results.records
        if each.case.group == "steps" and each.ok and each.details.get("us_per_step")
    ]
    if wide:
        drawn.append(save(_speedups(wide, results), folder / "gpu_speedup.svg"))
    if steps:
        drawn.append(save(_steps(steps, results), folder / "gpu_steps.svg"))
    if not drawn:
        raise ValueError("results hold neither a timed case of the wide grid nor a timed step")
    return drawn


def caption(results: Results) -> str:
    at = results.environment
    return (
        f"{at['device']}, driver {at['driver']}, cuDNN {at['cudnn']}, torch {at['torch']}, "
        f"fastrnn {at['fastrnn']}, {at['date']}"
    )


def _speedups(records: list[Record], results: Results) -> Any:
    """Forward and training; shapes along the axis, slower cases included."""
    shapes = sorted({(each.case.H, each.case.N) for each in records})
    places = {shape: index for index, shape in enumerate(shapes)}
    figure, panels = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True, layout="constrained")
    for panel, (mode, title) in zip(panels, MODES.items(), strict=True):
        for offset, cell in ((-0.15, "lstm"), (0.15, "gru")):
            points = [
                (places[each.case.H, each.case.N] + offset, ratio)
                for each in records
                if (each.case.cell, each.case.mode) == (cell, mode)
                and (ratio := each.speedup("torch")) is not None
            ]
            if points:
                at, ratios = zip(*points, strict=True)
                panel.vlines(at, 1.0, ratios, color=COLOURS[cell], linewidth=1.5, alpha=0.5)
                panel.plot(at, ratios, "o", color=COLOURS[cell], markersize=4.5, label=cell.upper())
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.set_title(f"bfloat16, T=1024, {title}", fontsize=10, loc="left")
        panel.set_ylabel("speedup over torch.nn (cuDNN), log scale", fontsize=8)
        panel.grid(axis="y", linewidth=0.3)
    panels[0].legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
    names = [f"H{hidden} N{rows}" for hidden, rows in shapes]
    panels[1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    figure.suptitle(caption(results), fontsize=8)
    return figure


def _steps(records: list[Record], results: Results) -> Any:
    """Measured against modelled us/step of single kernels; the line is agreement."""
    figure, panel = plt.subplots(figsize=(6, 6), layout="constrained")
    measured = [each.details["us_per_step"]["fastrnn"] for each in records]
    expected = [each.details["model_us_per_step"] for each in records]
    for cell, colour in COLOURS.items():
        chosen = [i for i, each in enumerate(records) if each.case.cell == cell]
        if chosen:
            panel.plot(
                [expected[i] for i in chosen], [measured[i] for i in chosen], "o",
                color=colour, markersize=4.5, label=cell.upper(),
            )  # fmt: skip
    ends = [min(*measured, *expected), max(*measured, *expected)]
    panel.plot(ends, ends, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("us/step, cost model", fontsize=8)
    panel.set_ylabel("us/step, measured", fontsize=8)
    panel.legend(fontsize=8, frameon=False)
    figure.suptitle(caption(results), fontsize=8)
    return figure
