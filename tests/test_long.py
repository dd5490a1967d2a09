"""Sequences and tensors larger than usual: T = 70,000, offsets beyond 2^31 bytes and elements."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrnn
from tests.problems import CELLS, Case, Problem, backward, forward, forward_train
from tests.tolerances import assert_close_by_rule, assert_same_bits

STEPS = 70_000
PIECES = 7


def state_of(result: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return result["h_n"], result["c_n"] if result["c_n"].numel() else None


@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_long_sequence_equals_its_pieces(cell: str, recompute: bool) -> None:
    """70,000 steps at once, or 10,000 at a time with the state handed on: the same bits."""
    case = Case(cell, T=STEPS, N=2, I=3, H=7, recompute=recompute)
    whole = Problem(case)
    tape = forward_train(whole)
    grads = backward(whole, tape)

    size = STEPS // PIECES
    pieces, tapes = [], []
    state = (whole.h0, whole.c0)
    for k in range(PIECES):
        piece = Problem(dataclasses.replace(case, T=size))
        rows = slice(k * size, (k + 1) * size)
        piece.x, piece.weights, (piece.h0, piece.c0) = whole.x[rows], whole.weights, state
        piece.upstream = {n: g[rows] for n, g in whole.upstream.items() if n not in ("h_n", "c_n")}
        pieces.append(piece)
        tapes.append(forward_train(piece))
        state = state_of(tapes[-1])
    names = ("y", "cells") if cell.startswith("lstm") else ("y",)
    for name in names:
        assert_same_bits(name, tape[name], torch.cat([t[name] for t in tapes]))
    assert_same_bits("h_n", tape["h_n"], tapes[-1]["h_n"])
    assert_same_bits("c_n", tape["c_n"], tapes[-1]["c_n"])

    carry = {n: whole.upstream[n] for n in ("h_n", "c_n") if n in whole.upstream}
    back = []
    for piece, piece_tape in zip(reversed(pieces), reversed(tapes), strict=True):
        piece.upstream |= carry
        back.append(backward(piece, piece_tape))
        carry["h_n"] = back[-1]["dh0"]
        if cell.startswith("lstm"):
            carry["c_n"] = back[-1]["dc0"]
    assert_same_bits("dx", grads["dx"], torch.cat([b["dx"] for b in reversed(back)]))
    for name in ("dh0", "dc0"):
        assert_same_bits(name, grads[name], back[-1][name])
    for name in (n for n in grads if n.startswith("dw")):
        parts = torch.stack([b[name] for b in back])
        # The sum of the pieces is as good a float32 result as any: its error sets the measure.
        assert_close_by_rule(name, grads[name], parts.double().sum(0), parts.sum(0))


@pytest.mark.first
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_long_sequence_equals_torch(kind: str) -> None:
    """Through the modules, by the rule; gradients of the LSTM's first tenth only.

    The backward of torch's own GRU takes minutes at this length; pieces cover it above.
    """
    theirs = getattr(torch.nn, kind)(3, 8, batch_first=True)
    ours = getattr(fastrnn, kind)(3, 8, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, kind)(3, 8, batch_first=True, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x, pull = torch.randn(2, STEPS, 3), torch.randn(2, STEPS // 10, 8)

    results = []
    for module in (ours, exact, theirs):
        dtype = next(module.parameters()).dtype
        with torch.no_grad():
            output, state = module(x.to(dtype))
        results.append([output, *(state if isinstance(state, tuple) else (state,))])
        if kind == "LSTM":
            inputs = x[:, : STEPS // 10].to(dtype).requires_grad_()
            output, state = module(inputs)
            loss = (output * pull.to(dtype)).sum() + sum(s.sum() for s in state)
            results[-1] += torch.autograd.grad(loss, [inputs, *module.parameters()])
    for i, (got, ref64, same) in enumerate(zip(*results, strict=True)):
        assert_close_by_rule(f"{kind}, result {i}", got, ref64, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_strides_beyond_two_to_the_31(cell: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The last step lies more than 2^31 elements behind the first, in a file of holes."""
    stride = 2**30 + 24
    elements = 2 * stride + 1024
    storage = torch.from_file(str(tmp_path / "x"), shared=True, size=elements, dtype=dtype)
    near = Problem(Case(cell, dtype, T=3, N=2, I=5, H=9))
    far = Problem(near.case)
    far.x = storage.as_strided((3, 2, 5), (stride, 8, 1)).copy_(near.x)
    expected, tape = forward(near), forward_train(near)
    for name, value in forward(far).items():
        assert_same_bits(name, value, expected[name])
    grads = backward(near, tape)
    for name, value in backward(far, forward_train(far)).items():
        assert_same_bits(name, value, grads[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_outputs_beyond_two_to_the_31(cell: str, dtype: torch.dtype) -> None:
    """y of more than 2^31 bytes (float32) or elements (bfloat16): its last steps are right."""
    n = 64 if dtype is torch.float32 else 256
    p = Problem(Case(cell, dtype, T=2, N=n, I=1, H=128))
    p.x = torch.randn(STEPS, n, 1).to(dtype)
    whole = forward(p)
    assert whole["y"].nbytes > 2**31
    assert_same_bits("h_n", whole["h_n"][0], whole["y"][-1])
    for start in (STEPS // 2, STEPS - 3):
        p.h0, steps = whole["y"][start - 1 : start].clone(), slice(start, start + 3)
        tail = Problem(p.case)
        tail.x, tail.h0, tail.weights = p.x[steps], p.h0, p.weights
        assert_same_bits(f"y from {start}", forward(tail)["y"], whole["y"][steps])
