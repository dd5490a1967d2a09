"""Batch-normalised LSTM layers on emulated CUDA kernels against the float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
import random
from copy import deepcopy

import pytest
import torch

import fastrnn
from fastrnn.backends import cuda_native
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
from tests.formats import FORMATS, check_in_format, choose_format
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_close_by_rule, assert_same_bits


def verify(p: BNProblem, name: str) -> None:
    """Training and inference by the rule; the tape and the inputs are left alone."""
    choose_format(name)
    before = [t.clone() for t in p.inputs()]
    full = forward(p, record=True)
    tape = full.pop("tape")
    kept = tape.clone()
    check_in_format(p, full | backward(p, full | {"tape": tape}), name, check)
    assert_same_bits("tape after backward", tape, kept)
    short = forward(p)
    assert short["tape"].numel() == 0
    for key in (*UPSTREAM, *(USED if p.case.batch_stats else ())):
        assert_same_bits(f"inference: {key} of {p.case}", short[key], full[key])
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def grid() -> list[tuple[BNCase, str]]:
    """Every mode x statistics x layout, persistent and step by step; all else drawn, from a fixed
    seed, per point."""
    draw = random.Random(1603)
    cases = []
    for plan, layout, batch, sequence in itertools.product(
        ("cuda", "cuda,steps"), LAYOUTS, (True, False), (False, True)
    ):
        kind, lengths, reset = LAYOUTS[layout]
        name = tuple(FORMATS)[len(cases) % len(FORMATS)]
        case = BNCase(
            FORMATS[name],
            T=draw.choice((1, 2, 2, 3)),
            N=draw.choice((1, 2, 3, 11)),
            I=draw.choice((1, 3)),
            H=draw.choice((1, 5, 16, 37)),
            directions=draw.choice((1, 2)),
            layout=kind,
            lengths=lengths,
            reset=reset,
            bias=draw.random() < 0.7,
            batch_stats=batch,
            sequence=sequence,
            rows=draw.choice((1, 2, 4)),
            plan=plan,
            seed=len(cases),
        )
        cases.append((case, name))
    return cases


@pytest.mark.parametrize(("case", "name"), grid(), ids=str)
def test_layer(case: BNCase, name: str) -> None:
    verify(BNProblem(case), name)


@pytest.mark.parametrize("plan", ["cuda", "cuda,steps"])
def test_lengths_that_leave_one_row(plan: str) -> None:
    """A step of one live row takes the statistics that were given."""
    p = BNProblem(BNCase(T=3, N=3, H=5, directions=2, lengths=True, plan=plan))
    p.plain.lengths = torch.tensor([1, 3, 1])
    del p.plain.padding  # of the lengths before
    p.x = p.plain.to_layout(torch.randn(3, 3, 4), padding=torch.nan)
    verify(p, "bf16x3")
    used = forward(p)["used_hh"]
    mean, var = p.running[2:4]
    assert_same_bits("mean", used[0, 0, 1:], mean[1:3])
    assert_same_bits("variance", used[0, 1, 1:], var[1:3])


@pytest.mark.parametrize("plan", ["cuda", "cuda,steps"])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_gradients_of_one_output(upstream: str, plan: str) -> None:
    verify(BNProblem(BNCase(T=2, H=5, upstream=(upstream,), plan=plan)), "bf16x3")


@pytest.mark.parametrize("need", range(3))
def test_gradients_not_asked_for(need: int) -> None:
    p = BNProblem(BNCase(torch.bfloat16, T=2, N=3, H=5, plan="cuda"))
    tape = forward(p, record=True)
    got, full = backward(p, tape, tuple(i == need for i in range(3))), backward(p, tape)
    wanted = (("dx",), ("dh0", "dc0"), tuple(k for k in full if k.startswith("d_")))[need]
    for name in wanted:
        assert_same_bits(name, got[name], full[name])
    for name in got.keys() - set(wanted):
        assert got[name].numel() == 0, name


@pytest.mark.parametrize("plan", ["cuda", "cuda,steps"])
def test_same_bits_twice(plan: str) -> None:
    p = BNProblem(BNCase(torch.bfloat16, T=2, N=9, H=37, directions=2, lengths=True, plan=plan))
    expected = solve_ops(p)
    for name, value in solve_ops(p).items():
        assert_same_bits(f"second run: {name}", value, expected[name])


@pytest.mark.parametrize("hidden", [5, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stats", ["step", "sequence"])
def test_module(stats: str, dtype: torch.dtype, hidden: int) -> None:
    """Outputs, gradients and running statistics are those of the reference."""
    choose_format("bf16x3")
    rnn = fastrnn.BNLSTM(3, hidden, 2, max_length=2, input_stats=stats, bidirectional=True, eps=0.1)
    x = torch.randn(3, 4, 3).to(dtype)
    initial = deepcopy(rnn.to(dtype).state_dict())
    results = []
    # The reference computes 16-bit tensors in float32.
    for backend, at in (("cuda", dtype), ("reference", dtype), ("reference", torch.float64)):
        rnn.to(at).load_state_dict(initial)
        rnn.zero_grad()
        with fastrnn.use_backend(backend):
            assert fastrnn.explain(rnn, x.to(at)).backend == backend
            y, (h_n, c_n) = rnn(x.to(at))
            (y.sum() + h_n.square().sum() + c_n.sum()).backward()
            rnn.eval()
            with torch.no_grad():
                folded = rnn(x.to(at))[0]
            rnn.train()
        found = [y.detach(), h_n, c_n, folded, *(w.grad.clone() for w in rnn.parameters())]
        results.append(found + [v.clone() for v in rnn.state_dict().values()])
    name = "" if dtype == torch.bfloat16 else "bf16x3"
    for index, (got, same, exact) in enumerate(zip(*results, strict=True)):
        assert_close_by_rule(f"result {index}", got, exact.double(), same, dtype, name)


def test_either_family_reads_the_tape_of_the_other() -> None:
    """What runs follows from the size, forward and backward by themselves."""
    choose_format("bf16x3")
    p = BNProblem(BNCase(T=3, N=9, H=17, directions=2, lengths=True, reset=True, plan="cuda"))
    q = BNProblem(dataclasses.replace(p.case, plan="cuda,steps"))
    for here, there in ((p, q), (q, p)):
        full = forward(here, record=True)
        grads = backward(there, full)
        del full["tape"]
        check_in_format(here, full | grads, "bf16x3", check)


def refusals(need: cuda_native.Need, backward: bool) -> set[str]:
    """What became of the persistent kernels."""
    plans = cuda_native.candidates(need, backward, 0)
    return {p.refused for p in plans if p.exchange != "steps"}


@pytest.mark.parametrize("rows", [False, True])
def test_beyond_the_persistent_kernels(rows: bool) -> None:
    """The plan follows from the size: of more units than they have, or of more rows."""
    choose_format("bf16x3")
    case = BNCase(T=2, N=9, H=65, directions=2, lengths=True, plan="cuda")
    if rows:
        case = dataclasses.replace(case, N=900, H=5, directions=1)
    verify(BNProblem(case), "bf16x3")
    need = cuda_native.Need("bnlstm", torch.float32, case.N, case.H, case.directions)
    for back in (False, True):
        assert cuda_native.choose(need, back, 0).exchange == "steps"
        (why,) = refusals(need, back)
        assert ("statistics are over the whole batch, and with 900 rows" in why) == rows, why
        assert ("its warps reduce over up to" in why) != rows, why


def test_plans_are_explained() -> None:
    large = fastrnn.BNLSTM(3, 65, max_length=2, dtype=torch.bfloat16)
    small = fastrnn.BNLSTM(3, 5, max_length=2, dtype=torch.bfloat16)
    x = torch.randn(2, 2, 3).bfloat16()
    with fastrnn.use_backend("cuda"):
        plan = fastrnn.explain(small, x).plan
        assert plan.startswith("bf16; forward: sentinel, 8 units x")
        assert "; backward: sentinel" in plan
        plan = fastrnn.explain(large, x).plan
        assert plan.startswith("bf16; forward: steps, 2 launches a step")
        assert "; backward: steps" in plan
        assert "its warps reduce over up to 64 units" in plan


def test_gradient_of_a_gradient() -> None:
    choose_format("bf16x3")
    rnn = fastrnn.BNLSTM(3, 4, max_length=2, eps=0.1)
    x = torch.randn(2, 3, 3)
    found = []
    for backend in ("cuda", "reference"):
        given = x.clone().requires_grad_()
        with fastrnn.use_backend(backend):
            (dx,) = torch.autograd.grad(rnn(given)[0].square().sum(), given, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), rnn.parameters()))
    for index, (got, expected) in enumerate(zip(*found, strict=True)):
        name = f"gradient {index}"
        assert_close_by_rule(name, got, expected.double(), expected, number_format="bf16x3")


def test_empty_batch() -> None:
    p = BNProblem(BNCase(T=2, N=1, H=5, plan="cuda"))
    p.x, p.h0, p.c0 = p.x[:, :0], p.h0[:, :0], p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (2, 0, 5)
    assert not got["d_w_hh"].any()


def test_fakes_say_what_the_operators_return() -> None:
    for layout in ("time", "packed"):
        p = BNProblem(BNCase(torch.bfloat16, T=2, N=4, H=5, layout=layout, plan="cuda"))
        torch.library.opcheck(
            torch.ops.fastrnn.bnlstm_forward.default,
            (
                p.x, p.h0, p.c0, p.weights, p.running, None, p.plain.batch_sizes, None, None, 0.1,
                True, False, False, True, True, "cuda",
            ),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
