"""Random shapes and options, drawn by hypothesis, against the float64 reference with gradients.

How many, and that they are the same ones each time: tests/drawn.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.drawn import drawn
from tests.problems import CELLS, NORMED, UPSTREAM, Case, Problem, check, forward, solve_ops
from tests.test_regularisers_kernels import noises
from tests.tolerances import assert_same_bits

DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])
# Widths of a vector and their neighbours come up as often as any number.
HIDDEN = st.one_of(st.integers(1, 70), st.sampled_from([1, 8, 15, 16, 17, 32, 48, 63, 64, 65]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A valid case, small enough that two reference runs take milliseconds."""
    cell = draw(st.sampled_from(CELLS))
    hidden = draw(HIDDEN)
    layout = draw(st.sampled_from(["time", "batch", "packed"]))
    dtype = draw(DTYPES)
    least = 1
    if cell in NORMED:
        # A norm divides by the spread of what it is given, and with it what rounding left. Where
        # few values make that spread small by chance, float32 errs by more than K allows for.
        least = 8
        hidden = max(hidden, 2 * least)
        dtype = torch.float64 if dtype == torch.float32 else dtype
    # The linear mode exists in the types that compute in their own precision; with weights up to
    # 1/sqrt(H) and few units its products of states grow beyond any bound.
    linear = dtype.itemsize > 2 and hidden >= 8
    plans = ["", "", "partition=rows", "partition=units"] + ["linear"] * linear
    names = UPSTREAM if cell.startswith("lstm") else UPSTREAM[:2]
    projected = cell.startswith("lstm") and hidden > 1 and draw(st.booleans())
    # In bfloat16 rounding would decide branches of relu that the expectation of zoneout hides.
    plain = cell == "rnn_relu" and dtype == torch.bfloat16
    kinds = [n for n in noises(cell).values() if not (plain and n.mixes)]
    return Case(
        cell,
        dtype,
        noise=draw(st.sampled_from([None, *kinds])),
        T=draw(st.integers(1, 8)),
        N=draw(st.one_of(st.integers(1, 9), st.integers(1, 40))),
        I=draw(st.one_of(st.integers(1, 20), st.integers(1, 90))),
        H=hidden,
        proj=draw(st.integers(least, hidden - 1)) if projected else 0,
        directions=draw(st.sampled_from([1, 2])),
        layout=layout,
        lengths=layout != "packed" and draw(st.booleans()),
        reset=layout != "packed" and draw(st.booleans()),
        bias=draw(st.booleans()),
        recompute=draw(st.booleans()),
        upstream=tuple(draw(st.lists(st.sampled_from(names), min_size=1, unique=True))),
        plan=draw(st.sampled_from(plans)),
        seed=draw(st.integers(0, 2**20)),
    )


@pytest.mark.first
@drawn()
@given(case=cases())
def test_random_case(case: Case) -> None:
    # Fixtures run once, not per example: seeds are the case's own.
    p = Problem(case)
    got = solve_ops(p)
    check(p, got, linear=case.plan == "linear")
    for name, value in forward(p).items():
        assert_same_bits(f"inference {name} of {case}", value, got[name])
