"""Fits the cost model's constants to what was measured.

Two sources. The probes measure some constants alone (hops, rates, the clock); the steps measured
of whole kernels hold all of them, summed. The fit is least squares of log(measured / model) over
the logarithms of the constants, by Levenberg and Marquardt's method, with each constant drawn
towards its probe (within some percent) or, if none measures it, weakly towards its old value: what
the data do not determine stays where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.gpu.model import CostModel, Step
from benchmarks.schema import Record

PROBED_SPREAD = 0.1  # a probe's constant is trusted to this factor, less 1
FREE_SPREAD = 3.0
NOISE = 0.03  # of a measured step
ROUNDS = 40


@dataclass
class Fit:
    """constants: all of them. rows: (step, measured us, model us before, model us after)."""

    constants: dict[str, float]
    rows: list[tuple[Step, float, float, float]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest factor between model and measurement, either way."""
        return max((max(m / a, a / m) for _, m, _, a in self.rows), default=float("nan"))

    @property
    def typical(self) -> float:
        """The root mean square of log(measured / model), as a factor."""
        logs = [math.log(m / a) ** 2 for _, m, _, a in self.rows]
        return math.exp(math.sqrt(sum(logs) / len(logs))) if logs else float("nan")


def fit(
    model: CostModel,
    measured: Sequence[tuple[Step, float]],
    start: Mapping[str, float],
    probed: Mapping[str, float] | None = None,
) -> Fit:
    """Constants for the measured steps (Step, microseconds).

    Args:
        start: all constants as they were. probed: those that a probe measured alone.

    Raises:
        ValueError: nothing was measured, or a time is not positive.
    """
    probed = dict(probed or {})
    if not measured:
        raise ValueError("measured is empty: run the stage `steps` first")
    if any(not us > 0 for _, us in measured):
        raise ValueError("measured: a step that took no time")
    names = list(start)
    steps = [step for step, _ in measured]
    logs = np.log([us for _, us in measured])
    centre = np.log([probed.get(name, start[name]) for name in names])
    spread = np.log1p([PROBED_SPREAD if name in probed else FREE_SPREAD for name in names])

    def residuals(x: np.ndarray) -> np.ndarray:
        model.set({name: math.exp(value) for name, value in zip(names, x, strict=True)})
        of_steps = (np.log(model.microseconds(steps)) - logs) / NOISE
        return np.concatenate([of_steps, (x - centre) / spread])

    model.set(start)
    before = model.microseconds(steps)
    x, damping = centre.copy(), 1e-2
    r = residuals(x)
    for _ in range(ROUNDS):
        jacobian = np.empty((len(r), len(x)))
        for i in range(len(x)):
            moved = x.copy()
            moved[i] += 1e-4
            jacobian[:, i] = (residuals(moved) - r) / 1e-4
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ r
        gained = False
        while damping < 1e8:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            tried = residuals(x + step)
            if tried @ tried < r @ r:
                gained = bool(r @ r - tried @ tried > 1e-9 * (r @ r))
                x, r, damping = x + step, tried, damping / 4
                break
            damping *= 4
        if not gained:
            break
    constants = {name: math.exp(value) for name, value in zip(names, x, strict=True)}
    model.set(constants)
    after = model.microseconds(steps)
    rows = [(s, us, b, a) for (s, us), b, a in zip(measured, before, after, strict=True)]
    return Fit(constants, rows)


def probed_constants(probes: Mapping[str, Any]) -> dict[str, float]:
    """Constants of the cost model that a line of probes.json measures alone.

    Of several lines about one constant the one nearest to a layer's use counts: all SMs, the
    exchange of one word for a hop, reads of 128 KiB.
    """
    found: dict[str, float] = {}
    lines = [line for line in probes.get("probes", ()) if line.get("ok")]
    sms = next((line["sms"] for line in lines if line["probe"] == "device"), 0)
    clocks = [line["mhz"] for line in lines if line.get("mhz")]
    if clocks:
        found["mhz"] = float(np.median(clocks))
    pushes = {}
    for line in lines:
        probe = line["probe"]
        if probe in ("hop_sentinel", "hop_flags") and (line["ctas"], line["words"]) == (sms, 1):
            found[probe] = line["cycles"]
        elif probe == "hop_cluster" and line["ctas"] == 8:
            pushes[line["words"]] = line["cycles"]
        elif probe == "read_same" and line["kib"] == 128:
            if line["ctas"] == 1:
                found["l2_of_sm"] = line["bytes_per_cycle"]
            elif line["rotated"]:
                found["l2_total"] = line["bytes_per_cycle"] * sms
        elif probe == "multiply_bf16":
            found["flops_16bit"] = line["flops_per_cycle"]
        elif probe == "multiply_tf32":
            found["flops_tf32"] = line["flops_per_cycle"]
    if 1 in pushes:
        found["hop_cluster"] = pushes[1]
        most = max(pushes)
        if pushes[most] > pushes[1]:
            received = 4 * 8 * (most - 1)  # bytes into a CTA, more than with one
            found["dsmem"] = received / (pushes[most] - pushes[1])
    return {name: value for name, value in found.items() if value > 0}


def measured_steps(records: Sequence[Record]) -> list[tuple[Step, float]]:
    """What the stage `steps` found, of verified cases."""
    return [
        (Step(*record.details["step"]), record.details["us_per_step"]["fastrnn"])
        for record in records
        if record.case.group == "steps"
        and record.ok
        and record.details.get("us_per_step", {}).get("fastrnn", 0.0) > 0
    ]


def text(found: Fit) -> str:
    """Model and measurement of every kernel, the worst first."""
    lines = [
        f"cost model: within a factor of {found.typical:.2f} (root mean square), "
        f"at worst {found.worst:.2f}, over {len(found.rows)} kernels",
        f"{'kernel':44}  measured us  model before  model after",
    ]
    for step, us, before, after in sorted(
        found.rows, key=lambda row: -abs(math.log(row[1] / row[3]))
    ):
        name = (
            f"cell {step.cell} format {step.format} {'backward' if step.backward else 'forward'} "
            f"N{step.N} H{step.H} exchange {step.exchange}"
        )
        lines.append(f"{name:44}  {us:11.3f}  {before:12.3f}  {after:11.3f}")
    return "\n".join(lines)
