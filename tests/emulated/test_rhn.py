"""Recurrent Highway layers on emulated CUDA kernels against the float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

import fastrnn
from fastrnn.backends import cuda_native
from tests.formats import FORMATS, check_in_format, choose_format
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
from tests.tolerances import assert_close_by_rule, assert_same_bits


def verify(p: Problem, name: str) -> None:
    """Training and inference by the rule; the tape and the inputs are left alone."""
    choose_format(name)
    before = [t.clone() for t in p.inputs()]
    tape = forward_train(p)
    gates = tape.pop("gates")
    kept = gates.clone()
    check_in_format(p, tape | backward(p, tape | {"gates": gates}), name, check)
    assert_same_bits("gates after backward", gates, kept)
    assert_equal_results(p.case, forward(p), tape, "inference")
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def grid() -> list[tuple[Case, str]]:
    """Every layout x kind of carry x format; all else drawn, from a fixed seed, per point."""
    draw = random.Random(2017)
    cases = []
    for layout, gates, name in itertools.product(LAYOUTS.values(), (2, 3), FORMATS):
        kind, lengths, reset = layout
        case = Case(
            FORMATS[name],
            T=draw.choice((1, 2, 4)),
            N=draw.choice((1, 3, 9)),
            I=draw.choice((1, 3)),
            H=draw.choice((1, 5, 16, 37)),
            depth=draw.choice((1, 2, 3)),
            gates=gates,
            directions=draw.choice((1, 2)),
            layout=kind,
            x_mask=draw.choice(("", "tied", "untied")),
            s_mask=draw.choice(("", "tied", "untied")),
            lengths=lengths,
            reset=reset,
            bias=draw.random() < 0.7,
            recompute=draw.random() < 0.3,
            plan="cuda",
            seed=len(cases),
        )
        cases.append((case, name))
    # Each micro-step launched by itself.
    for layout, gates in itertools.product(LAYOUTS.values(), (2, 3)):
        kind, lengths, reset = layout
        name = draw.choice(list(FORMATS))
        case = Case(
            FORMATS[name],
            T=draw.choice((1, 2, 4)),
            N=draw.choice((1, 3, 9)),
            I=3,
            H=draw.choice((1, 8, 17, 37)),
            depth=draw.choice((1, 2, 5)),
            gates=gates,
            directions=draw.choice((1, 2)),
            layout=kind,
            x_mask=draw.choice(("", "tied", "untied")),
            s_mask=draw.choice(("", "tied", "untied")),
            lengths=lengths,
            reset=reset,
            bias=draw.random() < 0.7,
            recompute=draw.random() < 0.3,
            plan="cuda,steps",
            seed=len(cases),
        )
        cases.append((case, name))
    return cases


@pytest.mark.parametrize(("H", "depth"), [(65, 2), (48, 5)])
@pytest.mark.parametrize("gates", [2, 3])
def test_beyond_the_persistent_kernels(
    H: int, depth: int, gates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More units than a kernel holds, and more slabs than the shared memory of this device."""
    numbers = cuda_native._device(0)
    monkeypatch.setattr(cuda_native, "_device", lambda _: (numbers[0], 24 << 10, *numbers[2:]))
    monkeypatch.setattr(cuda_native, "_chosen", {})
    p = Problem(
        Case(
            T=2, N=5, H=H, depth=depth, gates=gates, directions=2, lengths=True, s_mask="tied",
            plan="cuda",
        )
    )  # fmt: skip
    verify(p, "bf16x3")
    assert {plan.exchange for plan in cuda_native._chosen.values()} == {"steps"}
    assert_equal_results(p.case, solve_ops(p), solve_ops(p), "second run")


def test_the_tape_belongs_to_no_kernel() -> None:
    """Forward by one family, backward by the other."""
    choose_format("bf16x3")
    case = Case(T=3, N=9, H=20, directions=2, lengths=True, reset=True, s_mask="tied", plan="cuda")
    for kinds in (("sentinel", "steps"), ("steps", "sentinel")):
        forwards, backwards = (
            Problem(dataclasses.replace(case, plan=f"cuda,{kind}")) for kind in kinds
        )
        tape = forward_train(forwards)
        found = backward(backwards, tape)
        del tape["gates"]
        check_in_format(forwards, tape | found, "bf16x3", check)


@pytest.mark.parametrize(("case", "name"), grid(), ids=str)
def test_layer(case: Case, name: str) -> None:
    verify(Problem(case), name)


def test_a_refused_grid_gets_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a driver answers that shares its device with others."""
    monkeypatch.setattr(cuda_native, "_too_large", set())
    monkeypatch.setattr(cuda_native, "_chosen", {})

    def refuse(*_: object) -> None:
        raise RuntimeError("fastrnn CUDA library: launching: " + cuda_native._REFUSED)

    monkeypatch.setattr(cuda_native._cuda, "rhn_forward", refuse)
    monkeypatch.setattr(cuda_native._cuda, "rhn_backward", refuse)
    verify(Problem(Case(T=3, N=3, H=17, s_mask="tied", plan="cuda")), "bf16x3")
    assert cuda_native._too_large
    assert {plan.exchange for plan in cuda_native._chosen.values()} == {"steps"}


@pytest.mark.parametrize("upstream", ["y", "h_n"])
def test_gradients_of_one_output(upstream: str) -> None:
    verify(Problem(Case(torch.float16, T=3, H=8, upstream=(upstream,), plan="cuda")), "fp16")


@pytest.mark.parametrize("need", range(3))
def test_gradients_not_asked_for(need: int) -> None:
    p = Problem(Case(torch.bfloat16, T=2, N=3, H=5, s_mask="tied", plan="cuda"))
    tape = forward_train(p)
    got, full = backward(p, tape, tuple(i == need for i in range(3))), backward(p, tape)
    wanted = (("dx",), ("dh0",), tuple(k for k in full if k.startswith("dw")))[need]
    for name in wanted:
        assert_same_bits(name, got[name], full[name])
    for name in got.keys() - set(wanted):
        assert got[name].numel() == 0, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_launches(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds one group of rows at a time, and the batch is three of them."""
    numbers = (4, *cuda_native._device(0)[1:])
    monkeypatch.setattr(cuda_native, "_device", lambda _: numbers)
    monkeypatch.setattr(cuda_native, "_chosen", {})
    kind, lengths, reset = LAYOUTS[layout]
    p = Problem(
        Case(
            torch.bfloat16, T=2, N=19, H=20, directions=2, layout=kind, lengths=lengths,
            reset=reset, s_mask="tied", plan="cuda,sentinel",
        )
    )  # fmt: skip
    verify(p, "bf16")
    assert {plan.launches for plan in cuda_native._chosen.values()} == {3}


def test_same_bits_twice() -> None:
    p = Problem(
        Case(torch.bfloat16, T=3, N=9, H=37, directions=2, lengths=True, s_mask="tied", plan="cuda")
    )
    assert_equal_results(p.case, solve_ops(p), solve_ops(p), "second run")


def test_empty_batch() -> None:
    p = Problem(Case(T=3, N=1, H=5, directions=2, plan="cuda"))
    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (3, 0, 10)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros_like(w))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("coupled", [True, False])
def test_module(coupled: bool, tied: bool) -> None:
    """The same masks as on every other backend, and gradients by the rule."""
    choose_format("bf16x3")
    options = {"variational_input": 0.3, "variational_state": 0.3, "couple_carry": coupled}
    options["tie_gate_masks"] = tied
    rnn = fastrnn.RHN(3, 5, num_layers=2, depth=2, bidirectional=True, dropout=0.2, **options)
    x = torch.randn(3, 2, 3)
    results = []
    for backend in ("reference", "cuda"):
        rnn.zero_grad()
        torch.manual_seed(11)
        with fastrnn.use_backend(backend):
            assert fastrnn.explain(rnn, x).backend == backend
            y, h_n = rnn(x)
            (y.sum() + h_n.square().sum()).backward()
        results.append([y.detach(), h_n, *(w.grad for w in rnn.parameters())])
    for index, (expected, got) in enumerate(zip(*results, strict=True)):
        name = f"result {index}"
        assert_close_by_rule(name, got, expected.double(), expected, number_format="bf16x3")


def test_masks_for_each_gate() -> None:
    """Of the input they are left to torch, of the state micro-steps are launched one by one."""
    choose_format("bf16x3")
    x = torch.randn(3, 2, 3)
    of_state = fastrnn.RHN(3, 5, depth=2, variational_state=0.3, tie_gate_masks=False)
    of_input = fastrnn.RHN(3, 5, depth=2, variational_input=0.3, tie_gate_masks=False)
    with fastrnn.use_backend("cuda"):
        assert "forward: steps, 4 launches a step" in fastrnn.explain(of_state, x).plan
        assert "forward: sentinel, " in fastrnn.explain(of_state.eval(), x).plan
        assert "forward: sentinel, " in fastrnn.explain(of_input, x).plan
    p = Problem(Case(T=2, H=5, s_mask="untied", plan="cuda,sentinel"))
    with pytest.raises(RuntimeError, match="it has one mask of the state for all gates"):
        forward(p)
    assert p.s_mask is not None
    p.s_mask = p.s_mask.repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match="s_mask: got 4 masks a direction, expected one"):
        forward(p)


def test_explain_and_too_deep() -> None:
    choose_format("tf32")
    x = torch.randn(3, 2, 3)
    with fastrnn.use_backend("cuda"):
        plan = fastrnn.explain(fastrnn.RHN(3, 5, depth=3), x).plan
        assert plan.startswith(
            "tf32; forward: sentinel, 16 units x 8 rows a CTA, 1 groups x 1 CTAs"
        )
        assert "; backward: sentinel" in plan
        deep = fastrnn.explain(fastrnn.RHN(3, 64, depth=40), x).plan
        assert deep.startswith("tf32; forward: steps, 80 launches a step in CUDA graphs")
    with pytest.raises(RuntimeError, match="hidden size of 64, depth 40"):
        forward(Problem(Case(T=2, H=64, depth=40, plan="cuda,sentinel")))


def test_gradient_of_a_gradient() -> None:
    choose_format("bf16x3")
    rnn = fastrnn.RHN(3, 4, depth=2)
    x = torch.randn(2, 2, 3)
    found = []
    for backend in ("cuda", "reference"):
        given = x.clone().requires_grad_()
        with fastrnn.use_backend(backend):
            (dx,) = torch.autograd.grad(rnn(given)[0].square().sum(), given, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), rnn.parameters()))
    for index, (got, expected) in enumerate(zip(*found, strict=True)):
        name = f"gradient {index}"
        assert_close_by_rule(name, got, expected.double(), expected, number_format="bf16x3")


def test_fakes_say_what_the_operators_return() -> None:
    for layout in ("time", "packed"):
        p = Problem(Case(torch.bfloat16, T=2, N=4, H=5, layout=layout, plan="cuda"))
        torch.library.opcheck(
            torch.ops.fastrnn.rhn_forward_train.default,
            (p.x, p.h0, p.weights, None, None, p.batch_sizes, None, None, False, False, "cuda"),
            test_utils=("test_schema", "test_faketensor"),
        )
