"""The ops on the CPU against the float64 reference: outputs, states and every gradient."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from torch import Tensor

from fastrnn import ops
from tests.problems import (
    CELLS,
    NORMED,
    PLAIN,
    UPSTREAM,
    Case,
    Problem,
    backward,
    check,
    forward,
    forward_train,
    solve_ops,
)
from tests.tolerances import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = {  # name -> layout, lengths, reset
    "dense": ("time", False, False),
    "batch_first": ("batch", False, False),
    "packed": ("packed", False, False),
    "lengths": ("time", True, False),
    "reset": ("time", False, True),
    "lengths_reset": ("batch", True, True),
}


def drawn_sizes(choose: random.Random, cell: str) -> dict[str, int]:
    """Unit and odd sizes, vector widths and one beside them, register-tile tails."""
    hidden = choose.choice((1, 5, 16, 17, 33, 64, 100))
    if cell in NORMED:  # the spread of two values can be nothing, and rounding is divided by it
        hidden = max(hidden, 5)
    proj = choose.choice((0, 0, 1, 3, hidden - 1)) if cell.startswith("lstm") else 0
    return {
        "H": hidden,
        "I": choose.choice((1, 3, 16, 40)),
        "N": choose.choice((1, 2, 3, 7, 13)),
        "T": choose.choice((1, 2, 5, 19)),
        "proj": proj if proj < hidden else 0,
    }


def grid() -> list[Case]:
    """Every cell x dtype x layout x directions; all else drawn, from a fixed seed, per point."""
    choose = random.Random(1997)
    cases = []
    for cell, dtype, layout, directions in itertools.product(CELLS, DTYPES, LAYOUTS, (1, 2)):
        for _ in range(1 if dtype is torch.float64 else 2):
            name, lengths, reset = LAYOUTS[layout]
            case = Case(
                cell,
                dtype,
                **drawn_sizes(choose, cell),
                directions=directions,
                layout=name,
                lengths=lengths,
                reset=reset,
                bias=choose.random() < 0.7,
                recompute=choose.random() < 0.4,
                seed=len(cases),
            )
            cases.append(case)
    return cases


LARGE = [  # more rows than a chunk of the input product, more columns than a block of K, most odd
    {"T": 45, "N": 13, "I": 40, "H": 130},
    {"T": 7, "N": 131, "I": 24, "H": 48},
    {"T": 3, "N": 2, "I": 700, "H": 40},
    {"T": 6, "N": 1, "I": 30, "H": 520},
    {"T": 300, "N": 3, "I": 2, "H": 17},
    {"T": 20, "N": 5, "I": 64, "H": 128},  # packed weights lie where their gradients will be
    # One step of so many rows packs weight_ih as it goes: with 16 registers, with 32.
    {"T": 1, "N": 37, "I": 140, "H": 72},
    {"T": 1, "N": 139, "I": 600, "H": 40},
]


def recorded(p: Problem, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results with zeros for what nobody writes of a tape: steps past a row's end."""
    gates, lengths = results.get("gates"), p.lengths
    if gates is None or lengths is None or p.batch_sizes is not None or not gates.numel():
        return results
    past = torch.arange(p.case.T)[:, None] >= lengths
    return results | {"gates": gates.masked_fill(past.flatten()[:, None], 0)}


def verify(p: Problem, linear: bool = False) -> None:
    """Both forwards and the backward by the rule; the same call twice; inputs left alone."""
    before = [t.clone() for t in p.inputs()]
    check(p, forward(p), linear, "inference ")
    short = forward(p, return_cells=False)
    assert short["cells"].numel() == 0
    check(p, {k: v for k, v in short.items() if k != "cells"}, linear, "inference ")

    tape = forward_train(p)
    gates = tape["gates"].clone()
    grads = backward(p, tape)
    check(p, {k: v for k, v in tape.items() if k != "gates"} | grads, linear)
    assert_same_bits("gates after backward", tape["gates"], gates)

    again, first = recorded(p, forward_train(p)), recorded(p, tape)
    for name, value in (again | backward(p, tape)).items():
        assert_same_bits(f"second run: {name} of {p.case}", value, (first | grads)[name])
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: Case) -> None:
    verify(Problem(case))


def large() -> list[Case]:
    """Every cell x LARGE. A norm is many of the reference's operations in each step, and long
    sequences of every cell are in test_long.py."""
    cases = [
        Case(cell, **sizes | {"T": min(sizes["T"], 60 if cell in NORMED else 300)},
             directions=1 + sizes["N"] % 2)
        for cell, sizes in itertools.product(CELLS, LARGE)
    ]  # fmt: skip
    # Several chunks of rows, between which a weight_ih so large does not stay packed.
    return cases + [Case(cell, T=2, N=258, I=520, H=170) for cell in ("gru", "lstm_layer_norm")]


@pytest.mark.parametrize("case", large(), ids=str)
def test_large(case: Case) -> None:
    verify(Problem(case))


# With one value as its state, a layer-normalised term is that value's size times a constant row.
PROJECTIONS = [("lstm", 1), *((c, p) for c in ("lstm", "lstm_layer_norm") for p in (33, 47))]


@pytest.mark.parametrize("cell, proj", PROJECTIONS)
def test_large_projection(cell: str, proj: int) -> None:
    for lengths in (False, True):
        verify(Problem(Case(cell, T=21, N=30, I=20, H=48, proj=proj, lengths=lengths)))


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_linear_activations(cell: str, directions: int, options: str) -> None:
    """Without saturation an error anywhere reaches the output at full size."""
    layout, lengths, reset = LAYOUTS[options]
    case = Case(
        cell,
        T=6,
        N=7,
        I=9,
        H=18,
        proj=5 if cell.startswith("lstm") and directions == 2 else 0,
        directions=directions,
        layout=layout,
        lengths=lengths,
        reset=reset,
        recompute=reset,
        plan="linear",
    )
    if cell not in NORMED:  # whose gradients grow by 1 / sqrt(eps) where a state was zeroed
        verify(Problem(case), linear=True)
    verify(Problem(dataclasses.replace(case, dtype=torch.float64)), linear=True)


@pytest.mark.parametrize("plan", ["partition=rows", "partition=units"])
@pytest.mark.parametrize("layout", ["packed", "batch"])
@pytest.mark.parametrize("cell", CELLS)
def test_partitions(cell: str, layout: str, plan: str) -> None:
    """Either way of sharing the work out is right, for few and for many rows."""
    for n, hidden in ((1, 65), (2, 33), (29, 20)):
        lengths = layout == "batch"
        case = Case(cell, T=4, N=n, I=6, H=hidden, layout=layout, lengths=lengths, plan=plan)
        verify(Problem(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", PLAIN)
def test_bf16_weights(cell: str, layout: str) -> None:
    """Plan "bf16": float32 tensors, weights rounded to bfloat16, float32 sums."""
    name, lengths, reset = LAYOUTS[layout]
    for directions, n in ((1, 2), (2, 9)):
        case = Case(cell, T=5, N=n, I=7, H=19, directions=directions, plan="bf16")
        verify(Problem(dataclasses.replace(case, layout=name, lengths=lengths, reset=reset)))


@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "recompute"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_absent_gradients(cell: str, directions: int, recompute: bool) -> None:
    """Every combination of gradients that are not there."""
    names = UPSTREAM if cell.startswith("lstm") else UPSTREAM[:2]
    for count in range(1, len(names)):
        for upstream in itertools.combinations(names, count):
            p = Problem(
                Case(cell, T=4, H=17, directions=directions, recompute=recompute, upstream=upstream)
            )
            check(p, solve_ops(p))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(cell, T=4, N=7, H=18, directions=2) for cell in CELLS),
        # In one step weight_hh serves the gradients of initial states alone.
        *(Case(cell, T=1, N=37, I=140, H=18) for cell in CELLS),
        *(Case(cell, T=1, N=3, I=40, H=18) for cell in CELLS),
    ],
    ids=str,
)
def test_needs(case: Case, needs: tuple[bool, bool, bool]) -> None:
    """What is not asked for is empty; what is asked for does not depend on the rest."""
    p = Problem(case)
    tape = forward_train(p)
    full, part = backward(p, tape), backward(p, tape, needs)
    wanted = {"dx": needs[0], "dh0": needs[1], "dc0": needs[1] and case.is_lstm}
    for name, want in wanted.items():
        if want:
            assert_same_bits(name, part[name], full[name])
        else:
            assert part[name].numel() == 0
    weights = {k: v for k, v in part.items() if k.startswith("dw")}
    assert len(weights) == (len(p.weights) if needs[2] else 0)
    for name, value in weights.items():
        assert_same_bits(name, value, full[name])


def strided_views(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x (A, B, K) with strides of every kind."""
    a, b, k = x.shape
    wide = x.new_full((a, b, k + 5), torch.nan)
    wide[..., 2 : 2 + k] = x
    spread = x.new_full((2 * a, 3 * b, k), torch.nan)
    spread[::2, ::3] = x
    every_other = x.new_full((a, b, 2 * k), torch.nan)
    every_other[..., ::2] = x
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "feature slice": wide[..., 2 : 2 + k],
        "step and row slice": spread[::2, ::3],
        "last stride 2": every_other[..., ::2],
        "time fastest": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "offset": torch.cat([x.new_full((1,), torch.nan), x.reshape(-1)])[1:].view(a, b, k),
    }


@pytest.mark.parametrize("layout", ["time", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_strides(cell: str, dtype: torch.dtype, layout: str) -> None:
    """Views of the same values give the same bits, for x, states and upstream gradients."""
    case = Case(cell, dtype, T=5, N=4, I=7, H=17, directions=2, layout=layout, lengths=True)
    p = Problem(case)
    expected = solve_ops(p) | {f"inference {k}": v for k, v in forward(p).items()}
    views = {
        "x": strided_views(p.x),
        "h0": strided_views(p.h0),
        **{k: strided_views(v) for k, v in p.upstream.items()},
    }
    for kind in views["x"]:
        q = Problem(case)
        q.x, q.h0 = views["x"][kind], views["h0"][kind]
        q.upstream = {k: views[k][kind] for k in p.upstream}
        got = solve_ops(q) | {f"inference {k}": v for k, v in forward(q).items()}
        for name, value in got.items():
            assert_same_bits(f"{name}, inputs {kind}", value, expected[name])


@pytest.mark.parametrize("cell", CELLS)
def test_expanded_inputs(cell: str) -> None:
    """Stride 0: one row for the whole batch, zero states, gradients of a sum."""
    p = Problem(Case(cell, T=4, N=5, I=7, H=17))
    p.x = p.x[:, :1].expand(4, 5, 7)
    p.h0 = torch.zeros(1, 1, 1).expand_as(p.h0)
    p.upstream = {k: torch.ones(()).expand_as(v) for k, v in p.upstream.items()}
    q = Problem(p.case)
    q.x, q.h0 = p.x.contiguous(), p.h0.contiguous()
    q.upstream = {k: v.contiguous() for k, v in p.upstream.items()}
    expected = solve_ops(q)
    for name, value in solve_ops(p).items():
        assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("cell", CELLS)
def test_strided_weights(cell: str) -> None:
    p = Problem(Case(cell, T=4, N=5, I=7, H=17, proj=4 if cell.startswith("lstm") else 0))
    expected = solve_ops(p) | {f"inference {k}": v for k, v in forward(p).items()}
    p.weights = [
        w.t().contiguous().t() if w.ndim == 2 else torch.stack([w, w * torch.nan], 1)[:, 0]
        for w in p.weights
    ]
    got = solve_ops(p) | {f"inference {k}": v for k, v in forward(p).items()}
    for name, value in got.items():
        assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_packed_weights(cell: str, dtype: torch.dtype) -> None:
    """Weights packed beforehand give the bits of weights packed in the call."""
    for directions, proj, hidden in ((1, 0, 33), (2, 0, 16), (2, 5, 40)):
        if proj and not cell.startswith("lstm"):
            continue
        for n in (1, 7):
            case = Case(cell, dtype, N=n, I=9, H=hidden, proj=proj, directions=directions)
            p = Problem(case)
            packed = ops.pack_weights(p.weights, cell, "")
            expected = forward(p)
            for name, value in forward(p, packed=packed).items():
                assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("how", ["all full", "all 1", "ascending", "one long"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_of_every_kind(cell: str, how: str) -> None:
    case = Case(cell, T=6, N=6, I=3, H=17, directions=2, lengths=True, reset=True)
    kinds = {
        "all full": [6] * 6,
        "all 1": [1] * 6,
        "ascending": [1, 2, 3, 4, 5, 6],
        "one long": [1, 1, 1, 6, 1, 1],
    }
    p = Problem(dataclasses.replace(case, lengths=False))
    p.lengths = torch.tensor(kinds[how])
    verify(p)


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_out_of_range(cell: str) -> None:
    """The operators do not look at lengths, which compiled code hands over unseen: they act as the
    nearest that there is, and nothing outside is touched."""
    p = Problem(Case(cell, T=3, N=4, H=7, directions=2, reset=True))
    p.lengths = torch.tensor([1, 3, 2, 3])
    expected = solve_ops(p) | {f"inference {k}": v for k, v in forward(p).items()}
    p.lengths = torch.tensor([0, 4, 2, 1 << 40])
    got = solve_ops(p) | {f"inference {k}": v for k, v in forward(p).items()}
    for name, value in got.items():
        assert_same_bits(f"{name} of {p.case}", value, expected[name])


@pytest.mark.parametrize("how", ["never", "always", "first", "last"])
@pytest.mark.parametrize("cell", CELLS)
def test_resets_of_every_kind(cell: str, how: str) -> None:
    p = Problem(Case(cell, T=5, N=7, I=3, H=17, directions=2, lengths=True, reset=True))
    p.reset = torch.full((5, 7), how == "always")
    if how in ("first", "last"):
        p.reset[0 if how == "first" else -1] = True
    verify(p)


@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(cell: str) -> None:
    """Pre-activations far beyond the range of exp: no infinity or NaN comes of it.

    One input feature, so that large terms do not cancel to something that rounding decides.
    """
    for size in (20.0, 100.0, 1e4, 1e30):
        p = Problem(Case(cell, T=3, N=3, I=1, H=18, upstream=("y",)))
        p.x = p.x * size
        if cell in ("rnn_relu", *NORMED) and size > 1e4:  # squares overflow in a layer norm
            continue
        check(p, forward(p) | solve_ops(p))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_not_finite_input(cell: str, value: float) -> None:
    """NaN and infinities act as in the reference, on their own row only."""
    p = Problem(Case(cell, T=4, N=7, I=3, H=18))
    clean = forward(p)
    p.x[1, 2, 0] = value
    got = forward(p)
    rows = torch.arange(7) != 2
    assert_same_bits("other rows", got["y"][:, rows], clean["y"][:, rows])
    assert_same_bits("earlier steps", got["y"][:1], clean["y"][:1])
    if value != value or cell in NORMED:  # whose mean is not finite
        assert got["y"][1:, 2].isnan().all()
        assert got["h_n"][:, 2].isnan().all()
    elif cell != "rnn_relu":
        assert got["y"].isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str) -> None:
    p = Problem(Case(cell, T=3, N=1, I=4, H=6, directions=2))
    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.c0 = None if p.c0 is None else p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve_ops(p)
    assert got["y"].shape == (3, 0, 12)
    assert got["h_n"].shape == (2, 0, 6)
    assert got["dx"].shape == (3, 0, 4)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros_like(w))


def test_allocations_are_poisoned() -> None:
    """The fixture every other test here relies on."""
    x = torch.zeros(3)
    for made in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty(3).bfloat16()):
        assert made.isnan().all()
