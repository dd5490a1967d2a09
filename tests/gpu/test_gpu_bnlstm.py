"""The CUDA kernels of batch-normalised LSTM layers on a GPU against the float64 reference: for a
whole sequence, and step by step."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from tests.bnlstm_problems import USED, BNCase, BNProblem, check, forward, solve_ops
from tests.formats import check_in_format
from tests.gpu.on_gpu import FORMATS, moved, multiplied_as, on_host, same_bits, settle
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_same_bits


def on_device(p: BNProblem, where: str = "cuda") -> BNProblem:
    """The same problem with its tensors there."""
    there = copy.copy(p)
    there.plain = moved(p.plain, where)
    there.x, there.h0, there.c0 = (t.to(where) for t in (p.x, p.h0, p.c0))
    there.weights, there.running = ([t.to(where) for t in ts] for ts in (p.weights, p.running))
    there.upstream = {key: value.to(where) for key, value in p.upstream.items()}
    return there


def verify(p: BNProblem, name: str, where: str = "cuda") -> None:
    """Training by the rule, inference and a second run with the same bits; inputs left alone."""
    with multiplied_as(name):
        there = on_device(p, where)
        before = [t.clone() for t in there.inputs()]
        got, again = solve_ops(there), solve_ops(there)
        inferred = forward(there)
        settle(where)
    check_in_format(p, on_host(got), name, check)
    same_bits(again, got)
    without = ("tape", *(() if p.case.batch_stats else USED))
    same_bits({k: v for k, v in inferred.items() if k not in without}, got)
    for tensor, kept in zip(there.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, kept)


def grid() -> list[tuple[BNCase, str]]:
    """Both families x layout x statistics; all else drawn, from a fixed seed, per point."""
    draw = random.Random(1604)
    cases = []
    plans = ("cuda,sentinel", "cuda,steps")
    for plan, layout, batch in itertools.product(plans, LAYOUTS.values(), (True, False)):
        kind, lengths, reset = layout
        name = draw.choice(list(FORMATS))
        case = BNCase(
            FORMATS[name],
            T=draw.choice((1, 7, 30)),
            N=draw.choice((1, 2, 20, 64)),
            I=draw.choice((3, 16)),
            H=draw.choice((5, 64, 100, 256)),
            directions=draw.choice((1, 2)),
            layout=kind,
            lengths=lengths,
            reset=reset,
            bias=draw.random() < 0.7,
            batch_stats=batch,
            sequence=draw.random() < 0.3,
            rows=draw.choice((1, 8)),
            plan=plan,
            seed=len(cases),
        )
        cases.append((case, name))
    return cases


@pytest.mark.parametrize(("case", "name"), grid(), ids=str)
def test_layer(case: BNCase, name: str) -> None:
    verify(BNProblem(case), name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("N", "H"), [(300, 100), (64, 1024), (1000, 513)])
def test_beyond_the_persistent_kernels(N: int, H: int, name: str) -> None:
    """More rows than shared memory holds, more units, and columns beyond L1."""
    verify(BNProblem(BNCase(FORMATS[name], T=5, N=N, I=16, H=H, lengths=True, plan="cuda")), name)


def test_graphs_are_replayed() -> None:
    """Two graphs and some steps are left over; the second run finds the graph built."""
    case = BNCase(torch.bfloat16, T=150, N=20, I=8, H=72, lengths=True, plan="cuda,steps")
    verify(BNProblem(case), "bf16")
