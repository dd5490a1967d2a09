"""Every case is verified before it is timed: a speedup is never printed on a red check.

The truth is torch.nn in float64 on the same weights and input: outputs, final states and, in
training, all gradients. What error is allowed is the tests' own rule (tests/tolerances.py): a
multiple of torch.nn's error at the same precision, plus a floor. One rule for every case; no case
has a number of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import Contestant, Outputs, Problem, build

RULE = Path(__file__).resolve().parent.parent / "tests" / "tolerances.py"


@dataclass
class Check:
    """worst: the largest error over its allowance (passes up to 1), in `tensor`."""

    ok: bool
    worst: float
    tensor: str
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def truth(case: Case, problem: Problem, dtype: torch.dtype = torch.float64) -> Outputs:
    """torch.nn in float64, or at the dtype that our error is measured against."""
    return _run(build(replace(case, option=""), "torch", problem, dtype=dtype))


def peer_outputs(case: Case, problem: Problem, name: str) -> Outputs:
    """torch.nn at the contestant's precision: what its error is measured against."""
    yardstick = "torch-bf16" if name.endswith("bf16") else "torch"
    return _run(build(replace(case, option=""), yardstick, problem))


def check(
    contestant: Contestant,
    expected: Outputs,
    peer: Outputs,
    dtype: torch.dtype | None = None,
    number_format: str = "",
) -> Check:
    """Compares one contestant with the truth. A missing tensor, a wrong shape or a NaN is red.

    Twice: a first call may take another way than those after it, which are what is timed.
    dtype: the one under test, where the contestant's name does not say it; number_format: as in
    tests/tolerances.py.
    """
    if dtype is None:
        dtype = torch.bfloat16 if contestant.name.endswith("bf16") else torch.float32
    first = _compare(contestant, expected, peer, dtype, number_format)
    again = _compare(contestant, expected, peer, dtype, number_format) if first.ok else first
    return max(first, again, key=lambda found: (not found.ok, found.worst))


def _compare(
    contestant: Contestant,
    expected: Outputs,
    peer: Outputs,
    dtype: torch.dtype,
    number_format: str,
) -> Check:
    got = _run(contestant)
    missing = sorted(set(expected) - set(got))
    if missing:
        return Check(False, float("inf"), missing[0], f"{contestant.name} gave no {missing[0]}")
    worst, where = 0.0, ""
    for name, reference in expected.items():
        if got[name] is None or got[name].shape != reference.shape:
            shape = None if got[name] is None else tuple(got[name].shape)
            message = (
                f"{contestant.name}: {name} has shape {shape}, expected {tuple(reference.shape)}"
            )
            return Check(False, float("inf"), name, message)
        allowed = rule().allowed_error(reference, peer[name], dtype, number_format)
        ratio = error(got[name], reference) / allowed
        if math.isnan(ratio):
            return Check(False, float("nan"), name, f"{contestant.name}: {name} is not finite")
        if ratio > worst:
            worst, where = ratio, name
    ok = worst <= 1.0
    message = (
        "" if ok else f"{contestant.name}: error of {where} is {worst:.3g} times its allowance"
    )
    return Check(ok, worst, where, message)


def error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).abs().max()) if reference.numel() else 0.0


@functools.cache
def rule() -> ModuleType:
    """tests/tolerances.py, loaded by path: `tests` is no package."""
    spec = importlib.util.spec_from_file_location("fastrnn_tolerances", RULE)
    if spec is None or spec.loader is None:
        raise ImportError(
            f"the tolerance rule {RULE} cannot be loaded; run from a whole source tree"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(contestant: Contestant) -> Outputs:
    with contestant.context():
        outputs = contestant.outputs()
    return {name: value.detach() for name, value in outputs.items() if value is not None}
