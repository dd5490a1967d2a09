"""The Recurrent Highway ops on the CPU against the float64 reference: outputs and gradients."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastrnn
from fastrnn import ops
from tests.drawn import drawn
from tests.rhn_problems import (
    Case,
    Problem,
    assert_equal_results,
    backward,
    check,
    forward,
    forward_train,
    on_threads,
    solve_ops,
    verify,
)
from tests.tolerances import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MASKS = ("", "tied", "untied")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "batch_first": {"layout": "batch"},
    "packed": {"layout": "packed"},
    "lengths": {"lengths": True},
    "reset": {"reset": True},
    "lengths_reset": {"layout": "batch", "lengths": True, "reset": True},
}


def grid() -> list[Case]:
    """Every dtype x carry x layout x directions; all else drawn, from a fixed seed, per point."""
    choose = random.Random(2017)
    cases = []
    for dtype, gates, layout, directions in itertools.product(DTYPES, (2, 3), LAYOUTS, (1, 2)):
        for _ in range(2):
            case = Case(
                dtype,
                T=choose.choice((1, 2, 5, 12)),
                N=choose.choice((1, 2, 3, 7, 13)),
                I=choose.choice((1, 3, 16, 40)),
                H=choose.choice((1, 5, 16, 17, 33, 64, 100)),
                depth=choose.choice((1, 2, 3, 5)),
                gates=gates,
                directions=directions,
                x_mask=choose.choice(MASKS),
                s_mask=choose.choice(MASKS),
                bias=choose.random() < 0.7,
                recompute=choose.random() < 0.4,
                seed=len(cases),
            )
            cases.append(dataclasses.replace(case, **LAYOUTS[layout]))
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: Case) -> None:
    verify(Problem(case))


LARGE = [  # several chunks of rows, several panels of units, odd all
    {"T": 45, "N": 13, "I": 40, "H": 130, "depth": 2},
    {"T": 7, "N": 131, "I": 24, "H": 48, "depth": 3},
    {"T": 3, "N": 2, "I": 700, "H": 40, "depth": 1},
    {"T": 6, "N": 1, "I": 30, "H": 340, "depth": 4},
    {"T": 3, "N": 9, "I": 30, "H": 340, "depth": 4},  # weights beyond L2: prefetched
    {"T": 300, "N": 3, "I": 2, "H": 17, "depth": 2},
    {"T": 35, "N": 20, "I": 24, "H": 600, "depth": 2},  # one chunk, its rows met in two pieces
    {"T": 2, "N": 600, "I": 2, "H": 17, "depth": 2},  # one step is more than a chunk
]


@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "recompute"])
@pytest.mark.parametrize("gates", [2, 3])
@pytest.mark.parametrize("sizes", LARGE, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_large(sizes: dict[str, int], gates: int, recompute: bool) -> None:
    mask = MASKS[(sizes["N"] + gates) % 3]
    directions = 1 + sizes["N"] % 2
    case = Case(**sizes, gates=gates, directions=directions, x_mask=mask, recompute=recompute)
    verify(Problem(dataclasses.replace(case, s_mask="" if mask == "tied" else "tied")))


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize("masks", list(itertools.product(MASKS, MASKS)), ids=str)
@pytest.mark.parametrize("gates", [2, 3])
def test_linear_activations(gates: int, masks: tuple[str, str], options: str) -> None:
    """Without saturation an error anywhere reaches the output at full size."""
    for dtype, directions in ((torch.float32, 1), (torch.float64, 2)):
        case = Case(
            dtype, T=4, N=7, I=9, H=18, depth=3, gates=gates, directions=directions,
            x_mask=masks[0], s_mask=masks[1], recompute=options == "reset", plan="linear",
        )  # fmt: skip
        verify(Problem(dataclasses.replace(case, **LAYOUTS[options])))


SHAPES = [
    {"T": 5, "N": 1, "I": 7, "H": 33, "depth": 3},
    {"T": 4, "N": 2, "I": 16, "H": 100, "directions": 2},
    {"T": 6, "N": 5, "I": 3, "H": 17, "layout": "batch", "lengths": True, "reset": True},
    {"T": 7, "N": 23, "I": 40, "H": 64, "layout": "packed", "directions": 2, "depth": 1},
    {"T": 3, "N": 64, "I": 9, "H": 48, "recompute": True, "depth": 4},
    {"T": 3, "N": 21, "I": 150, "H": 150, "depth": 3},
]
BITS = [
    Case(dtype, **shape, gates=gates, x_mask=masks[0], s_mask=masks[1])
    for dtype in DTYPES[:2]
    for gates, masks in ((2, ("", "")), (3, ("tied", "untied")), (2, ("untied", "tied")))
    for shape in SHAPES
]


@pytest.mark.parametrize("case", BITS, ids=str)
def test_bits(case: Case) -> None:
    """Results depend on neither the number of threads nor on how they share the work."""
    p = Problem(case)
    expected = on_threads(1, lambda: solve_ops(p))
    for count in (2, 3, 4):
        for plan in ("", "partition=rows", "partition=units"):
            q = Problem(dataclasses.replace(case, plan=plan))
            got = on_threads(count, lambda q=q: solve_ops(q))
            assert_equal_results(case, got, expected, f"{count} threads, {plan}")
            inference = on_threads(count, lambda q=q: forward(q))
            assert_equal_results(case, inference, {k: expected[k] for k in inference}, plan)


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on one instruction set; skipped where machine or build has not got it."""
    from fastrnn import _cpu

    if request.param not in _cpu.isas():
        pytest.skip(f"no {request.param} here")
    before = _cpu.isa()
    _cpu.select_isa(request.param)
    yield request.param
    _cpu.select_isa(before)


@pytest.mark.parametrize("case", BITS[:12], ids=str)
def test_instruction_sets(isa: str, case: Case) -> None:
    verify(Problem(case))


@pytest.mark.parametrize("masks", [("", ""), ("tied", "tied"), ("untied", "untied")], ids=str)
@pytest.mark.parametrize("gates", [2, 3])
def test_recompute_gives_the_same_bits(gates: int, masks: tuple[str, str]) -> None:
    case = Case(T=5, N=9, I=6, H=40, depth=3, gates=gates, directions=2)
    case = dataclasses.replace(case, x_mask=masks[0], s_mask=masks[1], lengths=True)
    kept = solve_ops(Problem(case))
    got = solve_ops(Problem(dataclasses.replace(case, recompute=True)))
    assert_equal_results(case, got, kept, "recompute")


def test_recompute_keeps_no_gates() -> None:
    assert forward_train(Problem(Case(recompute=True)))["gates"].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", [2, 3])
def test_packed_weights(gates: int, dtype: torch.dtype) -> None:
    """Weights packed beforehand give the bits of weights packed in the call."""
    for n, directions, bias in ((1, 1, True), (7, 2, True), (7, 2, False), (3, 1, False)):
        case = Case(dtype, N=n, I=9, H=33, depth=3, gates=gates, directions=directions, bias=bias)
        for mask in ("", "tied"):
            p = Problem(dataclasses.replace(case, x_mask=mask, s_mask=mask))
            packed = ops.pack_weights(p.weights, "rhn", "")
            assert_equal_results(p.case, forward(p, packed), forward(p), "packed")


@pytest.mark.parametrize("upstream", [("y",), ("h_n",)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "recompute"])
def test_absent_gradients(recompute: bool, upstream: tuple[str, ...]) -> None:
    for gates, directions in ((2, 1), (3, 2)):
        case = Case(
            T=4, H=17, gates=gates, directions=directions, recompute=recompute, upstream=upstream
        )
        p = Problem(case)
        check(p, solve_ops(p))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_needs(mask: str, needs: tuple[bool, bool, bool]) -> None:
    """What is not asked for is empty; what is asked for does not depend on the rest."""
    p = Problem(Case(T=4, N=7, H=18, directions=2, x_mask=mask, s_mask=mask))
    tape = forward_train(p)
    full, part = backward(p, tape), backward(p, tape, needs)
    for name, want in (("dx", needs[0]), ("dh0", needs[1])):
        if want:
            assert_same_bits(name, part[name], full[name])
        else:
            assert part[name].numel() == 0
    weights = {k: v for k, v in part.items() if k.startswith("dw")}
    assert len(weights) == (len(p.weights) if needs[2] else 0)
    for name, value in weights.items():
        assert_same_bits(name, value, full[name])


@pytest.mark.parametrize("layout", ["time", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype: torch.dtype, layout: str) -> None:
    """Views of the same values give the same bits, for every tensor that is given."""
    case = Case(
        dtype, T=5, N=4, I=7, H=17, directions=2, layout=layout, lengths=True, x_mask="untied",
        s_mask="tied",
    )  # fmt: skip
    p, q = Problem(case), Problem(case)

    def strided(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] * 2 + 3), torch.nan)
        wide[..., 1 : 1 + 2 * t.shape[-1] : 2] = t
        return wide[..., 1 : 1 + 2 * t.shape[-1] : 2]

    def sliced(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)
        wide[..., 2 : 2 + t.shape[-1]] = t
        return wide[..., 2 : 2 + t.shape[-1]]

    expected = solve_ops(p)
    for view in (strided, sliced):
        q.x, q.h0 = view(p.x), view(p.h0)
        q.x_mask, q.s_mask = view(p.x_mask), view(p.s_mask)
        q.weights = [view(w) for w in p.weights]
        q.upstream = {k: view(v) for k, v in p.upstream.items()}
        assert_equal_results(case, solve_ops(q), expected, view.__name__)


@pytest.mark.parametrize("how", ["all full", "all 1", "ascending", "one long"])
def test_lengths_of_every_kind(how: str) -> None:
    kinds = {
        "all full": [6] * 6,
        "all 1": [1] * 6,
        "ascending": [1, 2, 3, 4, 5, 6],
        "one long": [1, 1, 1, 6, 1, 1],
    }
    p = Problem(Case(T=6, N=6, I=3, H=17, directions=2, reset=True, s_mask="tied"))
    p.lengths = torch.tensor(kinds[how])
    verify(p)


def test_lengths_out_of_range() -> None:
    """The operators do not look at lengths: they act as the nearest that there is."""
    p = Problem(Case(T=3, N=4, H=7, directions=2, reset=True, s_mask="tied"))
    p.lengths = torch.tensor([1, 3, 2, 3])
    expected = solve_ops(p)
    p.lengths = torch.tensor([0, 4, 2, 1 << 40])
    assert_equal_results(p.case, solve_ops(p), expected, "lengths out of range")


@pytest.mark.parametrize("how", ["never", "always", "first", "last"])
@pytest.mark.parametrize("mask", MASKS)
def test_resets_of_every_kind(mask: str, how: str) -> None:
    case = Case(T=5, N=7, I=3, H=17, depth=3, directions=2, lengths=True, reset=True, s_mask=mask)
    p = Problem(case)
    p.reset = torch.full((5, 7), how == "always")
    if how in ("first", "last"):
        p.reset[0 if how == "first" else -1] = True
    verify(p)


def test_saturated_gates() -> None:
    """Pre-activations far beyond the range of exp: no infinity or NaN comes of it."""
    for gates, size in itertools.product((2, 3), (20.0, 100.0, 1e4, 1e30)):
        p = Problem(Case(T=3, N=3, I=1, H=18, gates=gates, upstream=("y",)))
        p.x = p.x * size
        check(p, solve_ops(p))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_input(value: float) -> None:
    """NaN and infinities act on their own row only."""
    p = Problem(Case(T=4, N=7, I=3, H=18))
    clean = forward(p)
    p.x[1, 2, 0] = value
    got = forward(p)
    rows = torch.arange(7) != 2
    assert_same_bits("other rows", got["y"][:, rows], clean["y"][:, rows])
    assert_same_bits("earlier steps", got["y"][:1], clean["y"][:1])
    assert got["y"][1:, 2].isnan().all() == (value != value)


def test_empty_batch() -> None:
    p = Problem(Case(T=3, N=1, directions=2, x_mask="tied", s_mask="untied"))
    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.x_mask, p.s_mask = p.x_mask[:, :, :0], p.s_mask[:, :, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (3, 0, 12)
    assert got["dx"].shape == (3, 0, 4)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros_like(w))


@pytest.mark.parametrize("recompute", [False, True])
def test_fakes_agree_with_the_kernels(recompute: bool) -> None:
    for layout in ("time", "batch", "packed"):
        p = Problem(Case(N=4, directions=2, layout=layout, recompute=recompute, s_mask="tied"))
        common = (p.batch_sizes, p.op_lengths, p.reset, layout == "batch")
        args = (p.x, p.h0, p.weights, p.x_mask, p.s_mask)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.rhn_forward, (*args, None, *common, ""), test_utils=tests)
        train = (*args, *common, recompute, "")
        torch.library.opcheck(ops.rhn_forward_train, train, test_utils=tests)
        y, _, gates = ops.rhn_forward_train(*train)
        back = (p.upstream["y"], None, p.x, y, p.h0, gates, *args[2:], *common, True, True, True)
        torch.library.opcheck(ops.rhn_backward, (*back, ""), test_utils=tests)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A valid case, small enough that two reference runs take milliseconds."""
    layout = draw(st.sampled_from(["time", "batch", "packed"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    plans = ["", "", "partition=rows", "partition=units"] + ["linear"] * (dtype.itemsize > 2)
    names = st.lists(st.sampled_from(["y", "h_n"]), min_size=1, unique=True)
    return Case(
        dtype,
        T=draw(st.integers(1, 7)),
        N=draw(st.one_of(st.integers(1, 9), st.integers(1, 40))),
        I=draw(st.one_of(st.integers(1, 20), st.integers(1, 90))),
        H=draw(st.one_of(st.integers(1, 70), st.sampled_from([8, 15, 16, 17, 31, 32, 33, 64]))),
        depth=draw(st.integers(1, 4)),
        gates=draw(st.sampled_from([2, 3])),
        directions=draw(st.sampled_from([1, 2])),
        layout=layout,
        x_mask=draw(st.sampled_from(MASKS)),
        s_mask=draw(st.sampled_from(MASKS)),
        lengths=layout != "packed" and draw(st.booleans()),
        reset=layout != "packed" and draw(st.booleans()),
        bias=draw(st.booleans()),
        recompute=draw(st.booleans()),
        upstream=tuple(draw(names)),
        plan=draw(st.sampled_from(plans)),
        seed=draw(st.integers(0, 2**20)),
    )


@drawn(250)
@given(case=cases())
def test_random_case(case: Case) -> None:
    # Fixtures run once, not per example: seeds are the case's own.
    p = Problem(case)
    got = solve_ops(p)
    check(p, got)
    assert_equal_results(case, forward(p), {k: got[k] for k in ("y", "h_n")}, "inference")


def test_depth_is_that_of_the_weights() -> None:
    module = fastrnn.RHN(2, 3, depth=4)
    with pytest.raises(AttributeError):
        module.depth = 2
    assert module.depth == module.weight_hh_l0.size(0) == 4
