"""Recurrent Highway layers on Triton against the float64 reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import fastrnn
from tests.rhn_problems import (
    Case,
    Problem,
    assert_equal_results,
    backward,
    check,
    forward,
    forward_train,
    solve_ops,
)
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
    assert_equal_results(p.case, forward(p), tape, "inference")
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def grid() -> list[Case]:
    """Every layout x kind of carry x masks; all else drawn, from a fixed seed, per point."""
    choose = random.Random(2017)
    cases = []
    masks = ("", "tied", "untied")
    for layout, gates, mask in itertools.product(LAYOUTS.values(), (2, 3), masks):
        name, lengths, reset = layout
        cases.append(
            Case(
                DTYPES[(len(cases) // 2) % 3],
                T=choose.choice((1, 2, 3)),
                N=choose.choice((1, 3)),
                I=choose.choice((1, 3)),
                H=choose.choice((1, 5, 17)),
                depth=choose.choice((1, 2)),
                gates=gates,
                directions=choose.choice((1, 2)),
                layout=name,
                x_mask=mask,
                s_mask=masks[len(cases) % 3],
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


@pytest.mark.parametrize("upstream", ["y", "h_n"])
def test_gradients_of_one_output(upstream: str) -> None:
    verify(Problem(Case(T=3, H=5, upstream=(upstream,), plan="triton")))


def test_same_bits_twice() -> None:
    p = Problem(Case(T=3, N=17, H=5, directions=2, lengths=True, s_mask="tied", plan="triton"))
    assert_equal_results(p.case, solve_ops(p), solve_ops(p), "second run")


def test_empty_batch() -> None:
    p = Problem(Case(T=3, N=1, H=5, directions=2, plan="triton"))
    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (3, 0, 10)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros_like(w))


@pytest.mark.parametrize("tied", [True, False])
def test_module(tied: bool) -> None:
    """The same masks as on every other backend, and the same gradients."""
    options = {"variational_input": 0.3, "variational_state": 0.3, "tie_gate_masks": tied}
    rnn = fastrnn.RHN(3, 5, num_layers=2, depth=2, bidirectional=True, dropout=0.2, **options)
    x = torch.randn(3, 2, 3)
    results = []
    for backend in ("reference", "triton"):
        rnn.zero_grad()
        torch.manual_seed(11)
        with fastrnn.use_backend(backend):
            assert fastrnn.explain(rnn, x).backend == backend
            y, h_n = rnn(x)
            (y.sum() + h_n.square().sum()).backward()
        results.append([y.detach(), h_n, *(w.grad for w in rnn.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
