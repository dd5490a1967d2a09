"""The CUDA kernels of highway layers on a GPU against the float64 reference: for a whole sequence,
and each micro-step launched by itself."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.formats import check_in_format
from tests.gpu.on_gpu import FORMATS, moved, multiplied_as, on_host, same_bits, settle
from tests.rhn_problems import Case, Problem, check, forward, solve_ops
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_same_bits


def verify(p: Problem, name: str, where: str = "cuda") -> None:
    """Training by the rule, inference and a second run with the same bits; inputs left alone."""
    with multiplied_as(name):
        there = moved(p, where)
        before = [t.clone() for t in there.inputs()]
        got = solve_ops(there)
        again, inferred = solve_ops(there), forward(there)
        settle(where)
    check_in_format(p, on_host(got), name, check)
    same_bits(again, got)
    same_bits(inferred, got)
    for tensor, kept in zip(there.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, kept)


def grid() -> list[tuple[Case, str]]:
    """Both families x layout x kind of carry; all else drawn, from a fixed seed, per point."""
    draw = random.Random(2017)
    cases = []
    plans = ("cuda,sentinel", "cuda,steps")
    for plan, layout, gates in itertools.product(plans, LAYOUTS.values(), (2, 3)):
        kind, lengths, reset = layout
        name = draw.choice(list(FORMATS))
        masks = ("", "tied") if plan == "cuda,sentinel" else ("", "tied", "untied")
        case = Case(
            FORMATS[name],
            T=draw.choice((1, 7, 30)),
            N=draw.choice((1, 3, 20, 70)),
            I=draw.choice((3, 16)),
            H=draw.choice((5, 64, 100, 256)),
            depth=draw.choice((1, 2, 3)),
            gates=gates,
            directions=draw.choice((1, 2)),
            layout=kind,
            x_mask=draw.choice(("", "tied", "untied")),
            s_mask=draw.choice(masks),
            lengths=lengths,
            reset=reset,
            bias=draw.random() < 0.7,
            recompute=draw.random() < 0.3,
            plan=plan,
            seed=len(cases),
        )
        cases.append((case, name))
    return cases


@pytest.mark.parametrize(("case", "name"), grid(), ids=str)
def test_layer(case: Case, name: str) -> None:
    verify(Problem(case), name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("depth", "H"), [(10, 830), (5, 1024)])
def test_beyond_the_persistent_kernels(depth: int, H: int, name: str) -> None:
    """Graphs are replayed and some micro-steps are left; a second run finds its graphs built."""
    case = Case(FORMATS[name], T=14, N=20, I=16, H=H, depth=depth, s_mask="tied", plan="cuda")
    verify(Problem(case), name)
