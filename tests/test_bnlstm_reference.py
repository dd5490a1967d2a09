"""The reference of the batch-normalised LSTM against loops in NumPy, written from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrnn.reference import bnlstm_layer
from tests.tolerances import assert_close_by_rule

Array = NDArray[np.float64]
T, N, I, H, L, EPS = 5, 4, 3, 2, 3, 1e-2
LENGTHS = torch.tensor([3, 5, 1, 4])


def moments(values: list[Array]) -> tuple[Array, Array]:
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / len(values)


def oracle(
    x: Array,
    h0: Array,
    c0: Array,
    w: list[Array],
    running: list[Array],
    ends: list[int],
    clears: Array,
    backwards: bool,
    batch: bool,
    sequence: bool,
) -> tuple[Array, Array, Array, Array, dict[str, tuple[Array, Array]]]:
    """Each sequence is a list of its own steps in the order they are processed."""
    w_ih, w_hh, bias, gamma_x, gamma_h, gamma_c, beta_c = w
    order = [list(range(e))[:: -1 if backwards else 1] for e in ends]
    h, c = [v.copy() for v in h0], [v.copy() for v in c0]
    y, cells = np.zeros((T, N, H)), np.zeros((T, N, H))
    used: dict[str, tuple[Array, Array]] = {}
    b_all = [[w_ih @ x[t, n] for t in order[n]] for n in range(N)]
    if sequence:
        shared = running[0][0], running[1][0]
        if batch and N >= 2:
            shared = moments([b for row in b_all for b in row])
        used["ih"] = shared
    for s in range(max(ends)):
        rows = [n for n in range(N) if s < ends[n]]
        given = min(s, L - 1)

        def normal(
            term: str, i: int, values: dict[int, Array], s: int = s, given: int = given
        ) -> dict[int, Array]:
            mean, var = running[2 * i][given], running[2 * i + 1][given]
            if batch and len(values) >= 2:
                mean, var = moments(list(values.values()))
            used[f"{term}{s}"] = mean, var
            return {n: (v - mean) / np.sqrt(var + EPS) for n, v in values.items()}

        for n in rows:
            if clears[order[n][s], n]:
                h[n], c[n] = np.zeros(H), np.zeros(H)
        a = normal("hh", 1, {n: w_hh @ h[n] for n in rows})
        if sequence:
            mean, var = used["ih"]
            b = {n: (b_all[n][s] - mean) / np.sqrt(var + EPS) for n in rows}
        else:
            b = normal("ih", 0, {n: b_all[n][s] for n in rows})
        out = {}
        for n in rows:
            z = gamma_h * a[n] + gamma_x * b[n] + bias
            logistic = [1 / (1 + math.exp(-v)) for v in z]
            for j in range(H):
                c[n][j] *= logistic[H + j]
                c[n][j] += logistic[j] * math.tanh(z[2 * H + j])
            out[n] = np.array(logistic[3 * H :])
        normed = normal("c", 2, {n: c[n].copy() for n in rows})
        for n in rows:
            h[n] = out[n] * np.tanh(gamma_c * normed[n] + beta_c)
            y[order[n][s], n], cells[order[n][s], n] = h[n], c[n]
    return y, np.array(h), np.array(c), cells, used


def draw() -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x, h0, c0 = some(T, N, I), some(N, H), some(N, H)
    weights = [some(4 * H, I), some(4 * H, H), *(some(4 * H) for _ in range(3)), some(H), some(H)]
    running = []
    for width in (4 * H, 4 * H, H):
        running += [some(L, width), some(L, width).square() + 0.1]
    return x, h0, c0, weights, running


def assert_equal(name: str, got: Tensor, expected: Array) -> None:
    truth = torch.from_numpy(np.asarray(expected))
    assert_close_by_rule(name, got, truth, truth)


@pytest.mark.parametrize("sequence", [False, True], ids=["step", "sequence"])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "lengths_reset"])
def test_equals_the_formulas(ragged: bool, backwards: bool, batch: bool, sequence: bool) -> None:
    x, h0, c0, weights, running = draw()
    if sequence:
        running[:2] = [r[:1] for r in running[:2]]
    ends = LENGTHS.tolist() if ragged else [T] * N
    reset = torch.rand(T, N) < 0.3 if ragged else torch.zeros(T, N, dtype=torch.bool)
    if ragged:
        x[T - 1, 0] = torch.nan  # past an end: must not be looked at
    y, h, c, cells, *used = bnlstm_layer(
        x, h0, c0, weights, running, batch_stats=batch, eps=EPS, sequence=sequence,
        reverse=backwards, lengths=LENGTHS if ragged else None, reset=reset if ragged else None,
    )  # fmt: skip
    arrays = [t.numpy().copy() for t in (x, h0, c0)]
    want = oracle(
        *arrays, [w.numpy() for w in weights], [r.numpy() for r in running], ends, reset.numpy(),
        backwards, batch, sequence,
    )  # fmt: skip
    for name, got, expected in zip(("y", "h", "c", "cells"), (y, h, c, cells), want, strict=False):
        assert_equal(name, got, expected)
    for term, got in zip(("ih", "hh", "c"), used, strict=True):
        for s in range(got.size(1)):
            expected = want[4]["ih" if sequence and term == "ih" else f"{term}{s}"]
            assert_equal(f"mean {term} {s}", got[0, s], expected[0])
            assert_equal(f"var {term} {s}", got[1, s], expected[1])


def test_one_sequence_takes_the_running_statistics() -> None:
    x, h0, c0, weights, running = draw()
    one = [t.narrow(-2, 0, 1) for t in (x, h0, c0)]
    options = {"eps": EPS, "sequence": False}
    got = bnlstm_layer(*one, weights, running, batch_stats=True, **options)
    expected = bnlstm_layer(*one, weights, running, batch_stats=False, **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_gradcheck() -> None:
    x, h0, c0, weights, running = draw()
    leaves = [t.requires_grad_() for t in (x, h0, c0, *weights)]

    def run(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return bnlstm_layer(
            x, h0, c0, weights, running, batch_stats=True, eps=EPS, lengths=LENGTHS, reverse=True
        )[:4]

    assert torch.autograd.gradcheck(run, leaves)
