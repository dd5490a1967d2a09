"""Batch-normalised LSTM layers on Triton against the float64 reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import fastrnn
from tests.bnlstm_problems import (
    UPSTREAM,
    USED,
    BNCase,
    BNProblem,
    backward,
    check,
    forward,
    solve_ops,
)
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_same_bits


def verify(p: BNProblem) -> None:
    """Training and inference by the rule; the tape and the inputs are left alone."""
    before = [t.clone() for t in p.inputs()]
    full = forward(p, record=True)
    tape = full.pop("tape")
    kept = tape.clone()
    check(p, full | backward(p, full | {"tape": tape}))
    assert_same_bits("tape after backward", tape, kept)
    short = forward(p)
    assert short["tape"].numel() == 0
    for name in (*UPSTREAM, *(USED if p.case.batch_stats else ())):
        assert_same_bits(f"inference: {name} of {p.case}", short[name], full[name])
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def grid() -> list[BNCase]:
    """Every mode x statistics x layout; all else drawn, from a fixed seed, per point."""
    choose = random.Random(1603)
    cases = []
    for layout, batch, sequence in itertools.product(LAYOUTS, (True, False), (False, True)):
        name, lengths, reset = LAYOUTS[layout]
        cases.append(
            BNCase(
                T=choose.choice((1, 2, 2, 3)),
                N=choose.choice((1, 2, 3)),
                I=choose.choice((1, 3)),
                H=choose.choice((1, 5, 17)),
                directions=choose.choice((1, 2)),
                layout=name,
                lengths=lengths,
                reset=reset,
                bias=choose.random() < 0.7,
                batch_stats=batch,
                sequence=sequence,
                rows=choose.choice((1, 2, 4)),
                plan="triton",
                seed=len(cases),
            )
        )
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: BNCase) -> None:
    verify(BNProblem(case))


def test_lengths_that_leave_one_row() -> None:
    """A step of one live row takes the statistics that were given."""
    p = BNProblem(BNCase(T=3, N=3, H=5, directions=2, lengths=True, plan="triton"))
    p.plain.lengths = torch.tensor([1, 3, 1])
    del p.plain.padding  # of the lengths before
    p.x = p.plain.to_layout(torch.randn(3, 3, 4), padding=torch.nan)
    verify(p)
    used = forward(p)["used_hh"]
    mean, var = p.running[2:4]
    assert_same_bits("mean", used[0, 0, 1:], mean[1:3])
    assert_same_bits("variance", used[0, 1, 1:], var[1:3])


def test_statistics_of_a_large_mean() -> None:
    """A mean 1000 times the deviation: a difference of squares would have no digit left."""
    p = BNProblem(BNCase(T=2, N=17, I=1, H=5, eps=1e-5, upstream=("y",), plan="triton"))
    p.x = p.x + 1000.0
    check(p, {k: v for k, v in solve_ops(p).items() if k in (*UPSTREAM, *USED)})


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_gradients_of_one_output(upstream: str) -> None:
    verify(BNProblem(BNCase(T=2, H=5, upstream=(upstream,), plan="triton")))


def test_same_bits_twice_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    p = BNProblem(BNCase(T=2, N=3, H=5, directions=2, lengths=True, plan="triton"))
    expected = solve_ops(p)
    for name, value in solve_ops(p).items():
        assert_same_bits(f"second run: {name}", value, expected[name])
    monkeypatch.setattr("fastrnn.backends.triton.plan.KEPT", 0)
    for name, value in solve_ops(p).items():
        assert_same_bits(f"weights read in each step: {name}", value, expected[name])


@pytest.mark.parametrize("stats", ["step", "sequence"])
def test_module(stats: str) -> None:
    """Outputs, gradients and running statistics are those of the reference."""
    rnn = fastrnn.BNLSTM(3, 5, 2, max_length=2, input_stats=stats, bidirectional=True, eps=0.1)
    initial = {k: v.clone() for k, v in rnn.state_dict().items()}
    x = torch.randn(3, 4, 3)
    results = []
    for backend in ("reference", "triton"):
        rnn.load_state_dict(initial)
        rnn.zero_grad()
        with fastrnn.use_backend(backend):
            assert fastrnn.explain(rnn, x).backend == backend
            y, (h_n, c_n) = rnn(x)
            (y.sum() + h_n.square().sum() + c_n.sum()).backward()
            rnn.eval()
            with torch.no_grad():
                folded = rnn(x)[0]
            rnn.train()
        found = [y.detach(), h_n, c_n, folded, *(w.grad for w in rnn.parameters())]
        results.append(found + [v.clone() for v in rnn.state_dict().values()])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sequence", [False, True])
def test_autocast_of_the_caller_changes_nothing(sequence: bool) -> None:
    """The module has chosen the dtypes; statistics of a 16-bit product would be others."""
    p = BNProblem(BNCase(T=3, N=3, I=3, H=5, sequence=sequence, plan="triton"))
    expected = solve_ops(p)
    with torch.autocast("cpu", torch.bfloat16):
        got = solve_ops(p)
    for name, value in expected.items():
        assert_same_bits(name, got[name], value)


def test_empty_batch() -> None:
    p = BNProblem(BNCase(T=2, N=1, H=5, plan="triton"))
    p.x, p.h0, p.c0 = p.x[:, :0], p.h0[:, :0], p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (2, 0, 5)
    assert not got["d_w_hh"].any()
