"""LSTM, GRU and RNN on Triton against the float64 reference: outputs, states and every gradient."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from tests.problems import PLAIN, Case, Problem, backward, check, forward, forward_train, solve_ops
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def verify(p: Problem) -> None:
    """Training and inference by the rule; the tape and the inputs are left alone."""
    before = [t.clone() for t in p.inputs()]
    tape = forward_train(p)
    gates = tape.pop("gates")
    kept = gates.clone()
    check(p, tape | backward(p, tape | {"gates": gates}))
    assert_same_bits("gates after backward", gates, kept)
    for name, value in forward(p, return_cells=p.case.is_lstm).items():
        assert_same_bits(f"inference: {name} of {p.case}", value, tape[name])
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def grid() -> list[Case]:
    """Every cell x layout, a cell in each dtype; all else drawn, from a fixed seed, per point."""
    choose = random.Random(2014)
    cases = []
    for cell, layout in itertools.product(PLAIN, LAYOUTS):
        name, lengths, reset = LAYOUTS[layout]
        hidden = choose.choice((1, 5, 16, 33))
        proj = choose.choice((0, 1, 3, 17)) if cell == "lstm" else 0
        cases.append(
            Case(
                cell,
                DTYPES[len(cases) % 3],
                T=choose.choice((1, 2, 3, 5)),
                N=choose.choice((1, 3, 17)),
                I=choose.choice((1, 3, 16)),
                H=hidden,
                proj=proj if proj < hidden else 0,
                directions=choose.choice((1, 2)),
                layout=name,
                lengths=lengths,
                reset=reset,
                bias=choose.random() < 0.7,
                recompute=choose.random() < 0.3,
                plan="triton",
                seed=len(cases),
            )
        )
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: Case) -> None:
    verify(Problem(case))


@pytest.mark.parametrize("cell", PLAIN)
def test_projection_or_two_tiles_of_rows(cell: str) -> None:
    proj = 5 if cell == "lstm" else 0
    case = Case(cell, T=2, N=17, H=17, proj=proj, directions=2, lengths=True, plan="triton")
    verify(Problem(case))


@pytest.mark.parametrize("cell", PLAIN)
def test_weights_read_in_each_step(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of layers whose weights do not stay on chip."""
    p = Problem(Case(cell, T=3, N=3, H=17, proj=3 if cell == "lstm" else 0, plan="triton"))
    expected = solve_ops(p)
    monkeypatch.setattr("fastrnn.backends.triton.plan.KEPT", 0)
    for name, value in solve_ops(p).items():
        assert_same_bits(name, value, expected[name])


def test_same_bits_twice() -> None:
    p = Problem(Case("lstm", T=3, N=17, H=5, directions=2, lengths=True, plan="triton"))
    expected = solve_ops(p)
    for name, value in solve_ops(p).items():
        assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("upstream", ["y", "h_n", "c_n", "cells"])
def test_gradients_of_one_output(upstream: str) -> None:
    case = Case("lstm", T=3, N=3, H=5, directions=2, upstream=(upstream,), plan="triton")
    verify(Problem(case))
    if upstream in ("y", "h_n"):
        verify(Problem(dataclasses.replace(case, cell="gru")))


@pytest.mark.parametrize("need", range(3))
def test_gradients_not_asked_for(need: int) -> None:
    p = Problem(Case("gru", T=2, N=3, H=5, plan="triton"))
    tape = forward_train(p)
    needs = tuple(i == need for i in range(3))
    got, full = backward(p, tape, needs), backward(p, tape)
    wanted = (("dx",), ("dh0",), tuple(k for k in full if k.startswith("dw")))[need]
    for name in wanted:
        assert_same_bits(name, got[name], full[name])
    for name in got.keys() - set(wanted):
        assert got[name].numel() == 0, name


@pytest.mark.parametrize("cell", PLAIN)
def test_saturated_gates(cell: str) -> None:
    """Pre-activations far beyond the range of exp: no infinity or NaN comes of it."""
    for size in (100.0, 1e30):
        if cell == "rnn_relu" and size > 1e4:
            continue
        p = Problem(Case(cell, T=2, N=3, I=1, H=18, upstream=("y",), plan="triton"))
        p.x = p.x * size
        check(p, solve_ops(p))


@pytest.mark.parametrize("cell", PLAIN)
def test_nan_stays_in_its_row(cell: str) -> None:
    p = Problem(Case(cell, T=3, N=4, H=5, plan="triton"))
    clean = forward(p)
    p.x[1, 2, 0] = torch.nan
    got = forward(p)
    others = torch.arange(4) != 2
    assert_same_bits("other rows", got["y"][:, others], clean["y"][:, others])
    assert_same_bits("earlier steps", got["y"][:1], clean["y"][:1])
    assert got["y"][1:, 2].isnan().all()
    assert got["h_n"][:, 2].isnan().all()


@pytest.mark.parametrize("cell", PLAIN)
def test_strided_and_empty(cell: str) -> None:
    p = Problem(Case(cell, T=3, N=3, I=4, H=5, plan="triton"))
    p.x = p.x.transpose(0, 2).contiguous().transpose(0, 2)
    p.weights = [w.t().contiguous().t() if w.ndim == 2 else w.repeat(2)[::2] for w in p.weights]
    strided = [torch.stack([b, b * torch.nan], 1)[:, 0] for b in Problem(p.case).weights[2:4]]
    p.weights[2:4] = strided
    p.upstream = {k: torch.stack([v, v * torch.nan], -1)[..., 0] for k, v in p.upstream.items()}
    check(p, solve_ops(p))  # torch's products of strided operands may add in another order

    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.c0 = None if p.c0 is None else p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (3, 0, 5)
    assert got["dx"].shape == (3, 0, 4)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros(w.shape))
