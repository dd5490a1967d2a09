"""The CUDA kernels of LSTM, GRU and RNN on a GPU against the float64 reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.gpu.on_gpu import FORMATS, moved, multiplied_as, settle, solve, verify
from tests.problems import PLAIN, Case, Problem
from tests.test_kernels import LAYOUTS

EXCHANGES = ("local", "cluster", "sentinel", "flags")


def grid() -> list[tuple[Case, str]]:
    """Every cell x layout x format; all else drawn, from a fixed seed, per point."""
    draw = random.Random(4711)
    cases = []
    for cell, layout, name in itertools.product(PLAIN, LAYOUTS, FORMATS):
        kind, lengths, reset = LAYOUTS[layout]
        case = Case(
            cell,
            FORMATS[name],
            T=draw.choice((1, 2, 7, 12)),
            N=draw.choice((1, 3, 9, 20, 70)),
            I=draw.choice((1, 3, 16, 40)),
            H=draw.choice((1, 5, 8, 17, 64, 100, 128, 200, 256, 300)),
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


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cell", PLAIN)
def test_every_exchange(cell: str, exchange: str) -> None:
    """Rows that are whole vectors, and rows that need a mail of their own."""
    for hidden in {"local": (64, 37), "cluster": (128, 101)}.get(exchange, (256, 509)):
        case = Case(cell, torch.bfloat16, T=9, N=11, H=hidden, plan=f"cuda,{exchange}")
        try:
            with multiplied_as("bf16"):
                solve(moved(Problem(case)))
        except RuntimeError as error:
            if "kernel takes a hidden size" not in str(error):
                raise
            pytest.skip(str(error)[:200])
        verify(Problem(case), "bf16")


@pytest.mark.parametrize(("case", "name"), grid(), ids=lambda v: str(v))
def test_layer(case: Case, name: str) -> None:
    verify(Problem(case), name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_the_largest_tiles(cell: str, name: str) -> None:
    """Weights partly in shared memory: 128 CTAs with 16 bits, 64 with 32."""
    hidden = 2048 if FORMATS[name].itemsize == 2 else 1024
    verify(Problem(Case(cell, FORMATS[name], T=3, N=8, I=16, H=hidden, plan="cuda")), name)


@pytest.mark.parametrize("name", ["bf16", "tf32"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_several_launches(cell: str, name: str) -> None:
    """More rows than the device holds at once, in two directions."""
    case = Case(
        cell, FORMATS[name], T=3, N=300, I=8, H=500, directions=2, lengths=True, plan="cuda"
    )
    verify(Problem(case), name)


@pytest.mark.parametrize("cell", PLAIN)
def test_thousands_of_steps(cell: str) -> None:
    """A protocol that loses a word once in a million exchanges shows here."""
    verify(Problem(Case(cell, torch.bfloat16, T=2000, N=3, I=4, H=40, plan="cuda")), "bf16")


def test_nan_stays_in_its_row() -> None:
    p = moved(Problem(Case("lstm", torch.bfloat16, T=5, N=9, H=300, plan="cuda,sentinel")))
    clean = solve(p)
    p.x[2, 4, 0] = torch.nan
    got = solve(p)
    settle()
    others = torch.arange(9, device="cuda") != 4
    assert torch.equal(got["y"][:, others], clean["y"][:, others])
    assert torch.equal(got["y"][:2], clean["y"][:2])
    assert got["y"][2:, 4].isnan().all()
