"""Stage `steps`: microseconds of one time step of each kernel alone, by exchange, beside the model.

The operators are called themselves: no weight gradients, eight input features, so that all but the
recurrence is small. The input product's own slope, timed apart, is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from itertools import product
from typing import Any

import torch

from benchmarks import verify
from benchmarks.cases import Case
from benchmarks.gpu.clock import TimedRunner, per_step
from benchmarks.gpu.contestants import dtype_of, number_format
from benchmarks.gpu.grid import SHORTER, Setting, guarded, raise_if_failed
from benchmarks.gpu.model import EXCHANGES, CostModel, Step
from benchmarks.peers import Contestant, Problem
from benchmarks.schema import Record
from benchmarks.timing import measure
from fastrnn.backends import cuda_native

KINDS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}
SHAPES = ((768, 16), (1024, 16), (256, 16), (512, 64), (1024, 64), (256, 64), (512, 1), (2048, 16))


def cases(steps: int = 1024) -> list[Case]:
    """The exchanges at one shape first, then every format and cell."""
    return list(dict.fromkeys(_cases(steps)))


def _cases(steps: int) -> Iterator[Case]:
    def one(cell: str, mode: str, H: int, N: int, dtype: str, exchange: str = "") -> Case:
        return Case(
            cell, mode, steps, N, H, "steps", I=8, dtype=dtype, option=exchange,
            contestants=("fastrnn",),
        )  # fmt: skip

    both = ("forward", "training")
    for exchange, mode in product(EXCHANGES, both):
        hidden = {"local": 64, "cluster": 128}.get(exchange, 512)
        yield one("lstm", mode, hidden, 8, "bfloat16", exchange)
        if exchange in ("local", "cluster"):
            yield one("lstm", mode, hidden, 8, "bfloat16", "sentinel")
    for (H, N), mode in product(SHAPES, both):
        yield one("lstm", mode, H, N, "bfloat16")
    for (H, N), cell, mode in product(SHAPES[:5], ("gru", "rnn"), both):
        yield one(cell, mode, H, N, "bfloat16")
    for (H, N), mode in product(SHAPES[:7], both):
        if H <= 1024:
            yield one("lstm", mode, H, N, "")


class _Call:
    """The operators of one case on its own tensors."""

    def __init__(self, case: Case, where: str) -> None:
        self.case = case
        self.problem = Problem(case, where)
        dtype = dtype_of(case)
        self.x, self.dy = self.problem.x.to(dtype), self.problem.dy.to(dtype)
        self.weights = [value.to(dtype) for value in self.problem.weights.values()]
        self.h0 = self.x.new_zeros((1, case.N, case.H))
        self.c0 = self.h0.clone() if case.cell == "lstm" else None
        self.plan = "cuda" + (f",{case.option}" if case.option else "")
        self.tape = self.train() if case.mode == "training" else None

    def forward(self) -> tuple[Any, ...]:
        return torch.ops.fastrnn.layer_forward(
            self.x, self.h0, self.c0, self.weights, None, None, None, None,
            KINDS[self.case.cell], False, False, self.plan,
        )  # fmt: skip

    def train(self) -> tuple[Any, ...]:
        return torch.ops.fastrnn.layer_forward_train(
            self.x, self.h0, self.c0, self.weights, None, None, None,
            KINDS[self.case.cell], False, False, self.plan,
        )  # fmt: skip

    def backward(self, dx: bool = False) -> tuple[Any, ...]:
        assert self.tape is not None
        y, _, _, cells, gates = self.tape
        return torch.ops.fastrnn.layer_backward(
            self.dy, None, None, None, self.x, y, self.h0, self.c0, cells, gates, self.weights,
            None, None, None, KINDS[self.case.cell], False, dx, True, False, self.plan,
        )  # fmt: skip

    def input_product(self) -> torch.Tensor:
        return torch.mm(self.x.flatten(0, 1), self.weights[0].t())

    def outputs(self) -> dict[str, torch.Tensor]:
        """What torch.nn says too: y, and in training dx (dh_n is not sent)."""
        if self.case.mode == "training":
            return {"dx": self.backward(dx=True)[0]}
        return {"y": self.forward()[0]}


def run_case(case: Case, setting: Setting, model: CostModel) -> Record:
    """Verifies one kernel, times it at two lengths, and asks the model."""
    return guarded(case, lambda record: _run(record, setting, model))


def _run(record: Record, setting: Setting, model: CostModel) -> None:
    case, backward = record.case, record.case.mode == "training"
    try:
        call = _Call(case, setting.where)
        plan = _launched(call.backward if backward else call.forward, backward)
    except RuntimeError as error:
        if "kernel takes" not in str(error):
            raise
        record.details["refused"] = {"fastrnn": str(error)}
        return
    if plan.exchange == "steps":  # launches of each step have a model of their own
        record.details["refused"] = {"fastrnn": "no persistent kernel was chosen"}
        return
    # What names a kernel: cell, format, flags, exchange, tile.
    cell, number, *rest = (field for field in plan.kernel if not isinstance(field, bool))
    step = Step(
        cell, number, int(backward), case.N, case.H, 1, 1, *rest[:7],
        plan.groups, plan.ctas, plan.launches,
    )  # fmt: skip
    record.backends["fastrnn"] = plan.text
    record.details["step"] = list(astuple(step))
    _verify(record, call)
    if not record.ok:
        return
    runs = {
        case.T: call,
        case.T // SHORTER: _Call(replace(case, T=case.T // SHORTER), setting.where),
    }
    medians, products = {}, {}
    for steps, each in runs.items():
        timed: dict[str, Callable[[], Any]] = {
            "fastrnn": each.backward if backward else each.forward
        }
        if not backward:
            timed["product"] = each.input_product
        found = measure(
            {name: TimedRunner(f, torch.no_grad, setting.clock) for name, f in timed.items()},
            budget=setting.budget, min_rounds=setting.min_rounds,
        )  # fmt: skip
        medians[steps] = found["fastrnn"]
        products[steps] = found["product"].median if "product" in found else 0.0
    record.timings["fastrnn"] = medians[case.T]
    lengths = (case.T, case.T // SHORTER)
    slope = per_step(*(medians[t].median for t in lengths), *lengths)
    slope -= per_step(*(products[t] for t in lengths), *lengths)
    record.details["us_per_step"] = {"fastrnn": 1e6 * slope}
    record.details["model_us_per_step"] = model.microseconds([step])[0]
    raise_if_failed(setting.where)


def _launched(call: Callable[[], Any], backward: bool) -> cuda_native.Plan:
    """The plan that a call was given."""
    cuda_native._chosen.clear()
    call()
    return [plan for plan in cuda_native._chosen.values() if plan.kernel[2] == backward][-1]


def _verify(record: Record, call: _Call) -> None:
    """y or dx against torch.nn in float64. dh_n is not sent: the truth leaves it out too."""
    case, problem = record.case, call.problem
    problem.dh.zero_()
    dtype = dtype_of(case)
    wanted = {"training": "dx"}.get(case.mode, "y")
    expected = {wanted: verify.truth(case, problem)[wanted]}
    peer = verify.truth(case, problem, dtype)
    contestant = Contestant("fastrnn", call.forward, call.outputs, torch.no_grad)
    found = verify.check(contestant, expected, peer, dtype, number_format(case))
    record.checks["fastrnn"] = found.to_dict()
