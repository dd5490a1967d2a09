"""LSTM with projection, and layer norm, on emulated CUDA kernels against the float64 reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.emulated.test_layer import verify
from tests.formats import FORMATS
from tests.problems import NORMED, Case, Problem
from tests.problems import solve_ops as solve
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_same_bits

OPTIONS = ("lstm", *NORMED)  # the first with a projection


def grid() -> list[tuple[Case, str]]:
    """Every option x layout x format; all else drawn, from a fixed seed, per point."""
    draw = random.Random(77)
    cases = []
    for cell, layout, name in itertools.product(OPTIONS, LAYOUTS, FORMATS):
        kind, lengths, reset = LAYOUTS[layout]
        hidden = draw.choice((5, 8, 17, 40))  # of fewer values a norm leaves little but roundings
        case = Case(
            cell,
            FORMATS[name],
            T=draw.choice((1, 2, 4)),
            N=draw.choice((1, 3, 9)),
            I=draw.choice((3, 16)),
            H=hidden,
            proj=draw.choice((1, hidden // 2, hidden - 1)) if cell == "lstm" else 0,
            directions=draw.choice((1, 2)),
            layout=kind,
            lengths=lengths,
            reset=reset,
            bias=draw.random() < 0.7,
            recompute=draw.random() < 0.3,
            plan="cuda",
            seed=len(cases),
        )
        cases.append((case, name))
    return cases


@pytest.mark.parametrize(("case", "name"), grid(), ids=lambda v: str(v))
def test_layer(case: Case, name: str) -> None:
    verify(Problem(case), name)


@pytest.mark.parametrize("cell", OPTIONS)
def test_several_launches(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds one group of rows at a time, and the batch is three of them."""
    from fastrnn.backends import cuda_native

    numbers = (4, *cuda_native._device(0)[1:])
    monkeypatch.setattr(cuda_native, "_device", lambda _: numbers)
    monkeypatch.setattr(cuda_native, "_chosen", {})
    case = Case(
        cell, torch.bfloat16, T=3, N=19, H=20, proj=8 * (cell == "lstm"), directions=2,
        layout="packed", plan="cuda,sentinel",
    )  # fmt: skip
    verify(Problem(case), "bf16")
    # Which family takes the layer was asked for one row.
    whole = {key[0].size: plan.launches for key, plan in cuda_native._chosen.items()}
    assert whole == {1: 1, 19: 3}


@pytest.mark.parametrize("hidden", [16, 37])
@pytest.mark.parametrize("cell", NORMED)
def test_norms_of_one_cta(cell: str, hidden: int) -> None:
    """Row statistics that stay in its shared memory."""
    case = Case(cell, T=3, N=9, H=hidden, directions=2, lengths=True, plan="cuda,local")
    verify(Problem(case), "bf16x3")


@pytest.mark.parametrize("cell", OPTIONS)
def test_same_bits_whatever_the_schedule(cell: str) -> None:
    """Each launch of the emulator has another schedule."""
    case = Case(
        cell, torch.bfloat16, T=3, N=9, H=37, proj=20 * (cell == "lstm"), directions=2,
        lengths=True, plan="cuda",
    )  # fmt: skip
    p = Problem(case)
    expected = solve(p)
    for name, value in solve(p).items():
        assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("cell", OPTIONS)
def test_empty(cell: str) -> None:
    p = Problem(Case(cell, torch.bfloat16, T=3, N=3, H=5, proj=2 * (cell == "lstm"), plan="cuda"))
    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.c0 = None if p.c0 is None else p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve(p)
    assert got["y"].shape == (3, 0, p.case.out)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros(w.shape, dtype=w.dtype))
