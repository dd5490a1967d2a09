"""LSTM, GRU and RNN on emulated CUDA kernels against the float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from tests.formats import FORMATS, check_in_format, choose_format
from tests.problems import PLAIN, Case, Problem, backward, forward, forward_train
from tests.problems import solve_ops as solve
from tests.test_kernels import LAYOUTS
from tests.tolerances import assert_same_bits


def verify(p: Problem, name: str) -> None:
    """Training and inference by the rule; the tape and the inputs are left alone."""
    choose_format(name)
    before = [t.clone() for t in p.inputs()]
    tape = forward_train(p)
    gates = tape.pop("gates")
    kept = gates.clone()
    check_in_format(p, tape | backward(p, tape | {"gates": gates}), name)
    assert_same_bits("gates after backward", gates, kept)
    for key, value in forward(p, return_cells=p.case.is_lstm).items():
        assert_same_bits(f"inference: {key} of {p.case}", value, tape[key])
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def grid() -> list[tuple[Case, str]]:
    """Every cell x layout x format; all else drawn, from a fixed seed, per point."""
    draw = random.Random(2024)
    cases = []
    for cell, layout, name in itertools.product(PLAIN, LAYOUTS, FORMATS):
        kind, lengths, reset = LAYOUTS[layout]
        case = Case(
            cell,
            FORMATS[name],
            T=draw.choice((1, 2, 3, 5)),
            N=draw.choice((1, 3, 9)),
            I=draw.choice((1, 3, 16)),
            H=draw.choice((1, 5, 8, 17, 40)),
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


@pytest.mark.parametrize("hidden", [24, 37])
@pytest.mark.parametrize("exchange", ["local", "cluster", "sentinel", "flags"])
@pytest.mark.parametrize("cell", PLAIN)
def test_every_exchange(cell: str, exchange: str, hidden: int) -> None:
    """Rows that are whole vectors, and rows that need a mail of their own."""
    plan = f"cuda,{exchange}"
    p = Problem(Case(cell, torch.bfloat16, T=3, N=5, H=hidden, directions=2, plan=plan))
    if exchange == "flags" and cell != "lstm":
        with pytest.raises(RuntimeError, match="none with exchange flags"):
            forward(p)
    else:
        verify(p, "bf16")


@pytest.mark.parametrize("name", ["bf16", "bf16x3"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", PLAIN)
def test_several_launches(
    cell: str, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that holds one group of rows at a time, and the batch is three of them."""
    from fastrnn.backends import cuda_native

    numbers = (4, *cuda_native._device(0)[1:])
    monkeypatch.setattr(cuda_native, "_device", lambda _: numbers)
    monkeypatch.setattr(cuda_native, "_chosen", {})
    kind, lengths, reset = LAYOUTS[layout]
    p = Problem(
        Case(
            cell, FORMATS[name], T=3, N=19, H=20, directions=2, layout=kind, lengths=lengths,
            reset=reset, plan="cuda,sentinel",
        )
    )  # fmt: skip
    verify(p, name)
    launches = {plan.launches for plan in cuda_native._chosen.values()}
    assert launches <= {2, 3}, launches
    assert len(cuda_native._chosen) == 2


@pytest.mark.parametrize("cell", PLAIN)
def test_float32_follows_the_switch(cell: str) -> None:
    """TF32 where cuDNN's recurrent layers may have it, and closer to the truth where not."""
    p = Problem(Case(cell, T=3, N=3, H=33, upstream=("y", "h_n"), plan="cuda"))
    errors = []
    exact = Problem(dataclasses.replace(p.case, dtype=torch.float64, plan=""))
    for name in ("x", "h0", "c0"):
        value = getattr(p, name)
        setattr(exact, name, None if value is None else value.double())
    exact.weights = [w.double() for w in p.weights]
    truth = forward(exact)["y"]
    for name in ("tf32", "bf16x3"):
        choose_format(name)
        errors.append(float((forward(p)["y"].double() - truth).abs().max()))
    assert 0 < errors[1] < errors[0] / 4, errors


@pytest.mark.parametrize("cell", PLAIN)
def test_same_bits_whatever_the_schedule(cell: str) -> None:
    """Each launch of the emulator has another schedule."""
    p = Problem(Case(cell, torch.bfloat16, T=3, N=9, H=37, directions=2, lengths=True, plan="cuda"))
    expected = solve(p)
    for name, value in solve(p).items():
        assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("cell", PLAIN)
def test_a_length_of_zero_reads_nothing_outside(cell: str) -> None:
    """The operators do not look at lengths: a row of none has one step, in both directions."""
    p = Problem(
        Case(cell, T=3, N=2, H=5, directions=2, lengths=True, reset=True, plan="cuda,steps")
    )
    assert p.lengths is not None
    p.lengths[:] = torch.tensor([1, 3])
    p.x = p.x.nan_to_num()
    expected = solve(p)
    p.lengths[0] = 0
    for name, value in solve(p).items():
        assert value.isfinite().all(), name
        assert_same_bits(name, value, expected[name])


@pytest.mark.parametrize("upstream", ["y", "h_n", "c_n", "cells"])
def test_gradients_of_one_output(upstream: str) -> None:
    case = Case("lstm", torch.float16, H=8, directions=2, upstream=(upstream,), plan="cuda")
    verify(Problem(case), "fp16")
    if upstream in ("y", "h_n"):
        verify(Problem(dataclasses.replace(case, cell="gru")), "fp16")


@pytest.mark.parametrize("need", range(3))
def test_gradients_not_asked_for(need: int) -> None:
    p = Problem(Case("gru", torch.bfloat16, T=2, N=3, H=5, plan="cuda"))
    tape = forward_train(p)
    needs = tuple(i == need for i in range(3))
    got, full = backward(p, tape, needs), backward(p, tape)
    wanted = (("dx",), ("dh0",), tuple(k for k in full if k.startswith("dw")))[need]
    for name in wanted:
        assert_same_bits(name, got[name], full[name])
    for name in got.keys() - set(wanted):
        assert got[name].numel() == 0, name


@pytest.mark.parametrize("cell", PLAIN)
def test_nan_stays_in_its_row(cell: str) -> None:
    p = Problem(Case(cell, torch.bfloat16, T=3, N=4, H=20, plan="cuda,sentinel"))
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
    p = Problem(Case(cell, torch.bfloat16, T=3, N=3, I=4, H=5, plan="cuda"))
    expected = solve(p)
    p.x = p.x.transpose(0, 2).contiguous().transpose(0, 2)
    p.weights = [w.t().contiguous().t() if w.ndim == 2 else w for w in p.weights]
    p.weights[2:4] = [torch.stack([b, b * torch.nan], 1)[:, 0] for b in p.weights[2:4]]
    p.upstream = {k: torch.stack([v, v * torch.nan], -1)[..., 0] for k, v in p.upstream.items()}
    for name, value in solve(p).items():
        assert_same_bits(name, value, expected[name])

    p.x, p.h0 = p.x[:, :0], p.h0[:, :0]
    p.c0 = None if p.c0 is None else p.c0[:, :0]
    p.upstream = {k: v[:, :0] for k, v in p.upstream.items()}
    got = solve(p)
    assert got["y"].shape == (3, 0, 5)
    assert got["dx"].shape == (3, 0, 4)
    for i, w in enumerate(p.weights):
        assert_same_bits(f"dw{i}", got[f"dw{i}"], torch.zeros(w.shape, dtype=w.dtype))
