"""The batch-normalised LSTM's ops against the float64 reference; their bits; random cases."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn import ops
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
from tests.drawn import drawn
from tests.tolerances import assert_same_bits

LAYOUTS = {  # name -> layout, lengths, reset
    "dense": ("time", False, False),
    "batch_first": ("batch", False, False),
    "packed": ("packed", False, False),
    "lengths": ("time", True, False),
    "reset": ("time", False, True),
    "lengths_reset": ("batch", True, True),
}


def grid() -> list[BNCase]:
    """Every mode x statistics x dtype x layout x directions; all else from a fixed seed."""
    choose = random.Random(1603)
    cases = []
    for batch, sequence, dtype, layout, directions in itertools.product(
        (True, False), (False, True), (torch.float32, torch.float64), LAYOUTS, (1, 2)
    ):
        name, lengths, reset = LAYOUTS[layout]
        cases.append(
            BNCase(
                dtype, T=choose.choice((1, 2, 5, 9)), N=choose.choice((1, 2, 3, 7, 13)),
                I=choose.choice((1, 3, 16, 40)), H=choose.choice((1, 5, 16, 17, 33, 64, 100)),
                directions=directions, layout=name, lengths=lengths, reset=reset,
                bias=choose.random() < 0.7, batch_stats=batch, sequence=sequence,
                rows=choose.choice((1, 3, 12)), seed=len(cases),
            )
        )  # fmt: skip
    return cases


def verify(p: BNProblem) -> None:
    """Forward and backward by the rule; the same call twice; inputs left alone."""
    before = [t.clone() for t in p.inputs()]
    alone = forward(p)
    assert alone.pop("tape").numel() == 0
    if not p.case.batch_stats:
        for name in USED:
            assert alone.pop(name).numel() == 0
    check(p, alone, "inference ")
    tape = forward(p, record=True)
    for name, value in alone.items():
        assert_same_bits(f"inference {name} of {p.case}", value, tape[name])
    kept = tape["tape"].clone()
    grads = backward(p, tape)
    check(p, {k: v for k, v in tape.items() if k != "tape"} | grads)
    assert_same_bits("tape after backward", tape["tape"], kept)
    again = forward(p, record=True)
    for name, value in (again | backward(p, again)).items():
        if name != "tape":
            assert_same_bits(f"second run: {name} of {p.case}", value, (tape | grads)[name])
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: BNCase) -> None:
    verify(BNProblem(case))


@pytest.mark.parametrize("batch", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "sizes",
    [  # several chunks of steps, several blocks, odd all; more rows than a partial sum takes
        {"T": 45, "N": 13, "I": 40, "H": 130},
        {"T": 3, "N": 301, "I": 24, "H": 48, "sequence": True},
        {"T": 30, "N": 33, "I": 7, "H": 20, "sequence": True, "lengths": True},
        {"T": 300, "N": 3, "I": 2, "H": 17, "directions": 2},
        {"T": 3, "N": 2, "I": 700, "H": 40},
        {"T": 4, "N": 37, "I": 5, "H": 300, "eps": 1e-5},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_large(sizes: dict[str, int], batch: bool) -> None:
    verify(BNProblem(BNCase(**sizes, batch_stats=batch)))


@pytest.mark.parametrize("batch", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_activations(layout: str, batch: bool) -> None:
    """Without saturation an error anywhere reaches the output at full size."""
    name, lengths, reset = LAYOUTS[layout]
    case = BNCase(
        torch.float64, T=6, N=7, I=9, H=18, directions=2, layout=name, lengths=lengths, reset=reset,
        batch_stats=batch, plan="linear",
    )  # fmt: skip
    verify(BNProblem(case))
    verify(BNProblem(dataclasses.replace(case, sequence=True)))


@pytest.mark.parametrize("sequence", [False, True], ids=["step", "sequence"])
def test_absent_gradients(sequence: bool) -> None:
    """Every combination of gradients that are not there."""
    for count in range(1, 4):
        for upstream in itertools.combinations(UPSTREAM, count):
            p = BNProblem(BNCase(T=4, H=17, directions=2, upstream=upstream, sequence=sequence))
            check(p, solve_ops(p))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_needs(needs: tuple[bool, bool, bool]) -> None:
    """What is not asked for is empty; what is asked for does not depend on the rest."""
    for sequence in (False, True):
        p = BNProblem(BNCase(T=4, N=7, H=18, directions=2, sequence=sequence))
        tape = forward(p, record=True)
        full, part = backward(p, tape), backward(p, tape, needs)
        for name, want in {"dx": needs[0], "dh0": needs[1], "dc0": needs[1]}.items():
            if want:
                assert_same_bits(name, part[name], full[name])
            else:
                assert part[name].numel() == 0
        weights = {k: v for k, v in part.items() if k.startswith("d_")}
        assert len(weights) == (len(p.weights) if needs[2] else 0)
        for name, value in weights.items():
            assert_same_bits(name, value, full[name])


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batch", [True, False], ids=["train", "eval"])
def test_bits_do_not_depend_on_threads(set_threads, batch: bool, directions: int) -> None:
    for sequence in (False, True):
        case = BNCase(
            T=9, N=23, I=30, H=100, directions=directions, batch_stats=batch, sequence=sequence,
            lengths=True, reset=True,
        )  # fmt: skip
        results = []
        for count in (1, 2, 3, 4):
            set_threads(count)
            results.append(solve_ops(BNProblem(case)))
        for other in results[1:]:
            for name, value in results[0].items():
                assert_same_bits(f"{name} of {case}", other[name], value)


def test_lengths_out_of_range() -> None:
    """The operators do not look at lengths: they act as the nearest that there is."""
    p = BNProblem(BNCase(T=3, N=4, H=7, directions=2, reset=True))
    p.plain.lengths = torch.tensor([1, 3, 2, 3])
    expected = solve_ops(p)
    p.plain.lengths = torch.tensor([0, 4, 2, 1 << 40])
    for name, value in solve_ops(p).items():
        assert_same_bits(f"{name} of {p.case}", value, expected[name])


def test_strided_inputs() -> None:
    """Views of the same values give the same bits."""
    case = BNCase(T=5, N=4, I=7, H=17, directions=2, lengths=True)
    p, q = BNProblem(case), BNProblem(case)
    wide = torch.full((5, 8, 12), torch.nan)
    wide[:, ::2, 2:9] = p.x
    q.x = wide[:, ::2, 2:9]
    q.h0 = p.h0.transpose(0, 1).contiguous().transpose(0, 1)
    q.upstream = {k: v.transpose(0, 1).contiguous().transpose(0, 1) for k, v in p.upstream.items()}
    q.weights = [
        w.t().contiguous().t() if w.ndim == 2 else w.repeat_interleave(2)[::2] for w in p.weights
    ]
    q.running = [r.t().contiguous().t() for r in p.running]
    expected = solve_ops(p)
    for name, value in solve_ops(q).items():
        assert_same_bits(name, value, expected[name])


def test_packed_weights() -> None:
    """Weights packed beforehand give the bits of weights packed in the call."""
    for directions, hidden in ((1, 33), (2, 16)):
        p = BNProblem(BNCase(N=5, H=hidden, directions=directions, batch_stats=False))
        matrices = [w for w in p.weights if w.dim() == 2]
        packed = ops.pack_weights(matrices, "lstm", "")
        expected = forward(p)
        for name, value in forward(p, packed=packed).items():
            assert_same_bits(name, value, expected[name])


def test_empty_batch() -> None:
    p = BNProblem(BNCase(T=3, N=1, directions=2))
    p.x, p.h0, p.c0 = p.x[:, :0], p.h0[:, :0], p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (3, 0, 12)
    assert not any(v.any() for k, v in got.items() if k.startswith("d_"))


def test_saturated_gates() -> None:
    for size in (20.0, 1e4, 1e30):
        p = BNProblem(BNCase(T=3, N=3, I=1, H=18, upstream=("y",), batch_stats=False))
        p.x = p.x * size
        check(p, solve_ops(p))


def test_opcheck() -> None:
    for sequence, layout in itertools.product((False, True), ("time", "packed")):
        p = BNProblem(BNCase(layout=layout, sequence=sequence, directions=2))
        c, q = p.case, p.plain
        tail = (q.batch_sizes, q.op_lengths, q.reset, c.eps, True, sequence, False)
        for record in (False, True):
            args = (p.x, p.h0, p.c0, p.weights, p.running, None, *tail, True, record, "")
            torch.library.opcheck(ops.bnlstm_forward, args)
        tape = forward(p, record=True)
        upstream = [p.upstream[name] for name in UPSTREAM]
        used = [tape[name] for name in USED]
        args = (*upstream, p.x, tape["y"], p.h0, p.c0, tape["cells"], tape["tape"], used,
                p.weights, *tail, True, True, True, "")  # fmt: skip
        torch.library.opcheck(ops.bnlstm_backward, args)


@st.composite
def cases(draw: st.DrawFn) -> BNCase:
    """A valid case, small enough that two reference runs take milliseconds."""
    layout = draw(st.sampled_from(["time", "batch", "packed"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    return BNCase(
        dtype,
        T=draw(st.integers(1, 8)),
        N=draw(st.one_of(st.integers(1, 9), st.integers(1, 40))),
        I=draw(st.integers(1, 40)),
        H=draw(st.one_of(st.integers(1, 70), st.sampled_from([8, 15, 16, 17, 32, 48, 64, 65]))),
        directions=draw(st.sampled_from([1, 2])),
        layout=layout,
        lengths=layout != "packed" and draw(st.booleans()),
        reset=layout != "packed" and draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_stats=draw(st.booleans()),
        sequence=draw(st.booleans()),
        rows=draw(st.integers(1, 9)),
        upstream=tuple(draw(st.lists(st.sampled_from(UPSTREAM), min_size=1, unique=True))),
        plan=draw(st.sampled_from(["", "linear"])) if dtype == torch.float64 else "",
        seed=draw(st.integers(0, 2**20)),
    )


@drawn(125)
@given(case=cases())
def test_random_case(case: BNCase) -> None:
    p = BNProblem(case)
    check(p, solve_ops(p))
