"""Random shapes and options, drawn by hypothesis, against the float64 reference with gradients.

FASTRNN_HYPOTHESIS_CASES sets the number of cases (2,000); any other number than the default also
draws anew at each run, where the default always draws the same.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.problems import CELLS, NORMED, UPSTREAM, Case, Problem, check, forward, solve_ops
from tests.tolerances import assert_same_bits

DEFAULT = 2000
COUNT = int(os.environ.get("FASTRNN_HYPOTHESIS_CASES", DEFAULT))

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
    if cell in NORMED and dtype == torch.float32:
        # A norm divides by the spread of what it is given. Where that is small by chance it makes
        # more of what float32 left of tanh than K allows for; float64 has all of the same code.
        dtype = torch.float64
    # The linear mode exists in the types that compute in their own precision.
    plans = ["", "", "partition=rows", "partition=units"] + ["linear"] * (dtype.itemsize > 2)
    names = UPSTREAM if cell.startswith("lstm") else UPSTREAM[:2]
    projected = cell.startswith("lstm") and hidden > 1 and draw(st.booleans())
    return Case(
        cell,
        dtype,
        T=draw(st.integers(1, 8)),
        N=draw(st.one_of(st.integers(1, 9), st.integers(1, 40))),
        I=draw(st.one_of(st.integers(1, 20), st.integers(1, 90))),
        H=hidden,
        proj=draw(st.integers(1, hidden - 1)) if projected else 0,
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


@settings(
    max_examples=COUNT,
    derandomize=COUNT == DEFAULT,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_random_case(case: Case) -> None:
    # Fixtures run once, not per example: seeds are the case's own.
    p = Problem(case)
    got = solve_ops(p)
    check(p, got, linear=case.plan == "linear")
    for name, value in forward(p).items():
        assert_same_bits(f"inference {name} of {case}", value, got[name])
