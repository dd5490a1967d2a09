"""fastrnn.reference.rhn_layer against scalar loops written from the formulas alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrnn.reference import rhn_layer
from tests.oracles import Array, central_difference
from tests.tolerances import assert_close_by_rule, assert_half_the_digits


def oracle(
    x: Array,
    h0: Array,
    weights: dict[str, Array],
    clears: list[bool],
    backwards: bool,
    coupled: bool,
) -> tuple[Array, Array]:
    """One sequence x (T, I) -> y (T, H), h. weights: W_h (H, I), R_h (L, H, H), b_h (L, H), and so
    on for t and c; masks x_h, s_h (I,) and (H,) are what gate h sees of x and s."""
    steps, size = x.shape[0], h0.shape[0]
    depth = weights["R_h"].shape[0]
    s = [float(v) for v in h0]
    y = np.zeros((steps, size))

    def before_activation(gate: str, t: int, level: int, j: int) -> float:
        total = float(weights[f"b_{gate}"][level, j])
        for k in range(size):
            seen = weights[f"s_{gate}"][k] * s[k]
            total += float(weights[f"R_{gate}"][level, j, k]) * seen
        if level == 0:
            for k in range(x.shape[1]):
                total += float(weights[f"W_{gate}"][j, k]) * weights[f"x_{gate}"][k] * x[t, k]
        return total

    for t in sorted(range(steps), reverse=backwards):
        if clears[t]:
            s = [0.0] * size
        for level in range(depth):
            new = []
            for j in range(size):
                h = math.tanh(before_activation("h", t, level, j))
                transform = 1 / (1 + math.exp(-before_activation("t", t, level, j)))
                carry = 1 - transform
                if not coupled:
                    carry = 1 / (1 + math.exp(-before_activation("c", t, level, j)))
                new.append(h * transform + s[j] * carry)
            s = new
        y[t] = s
    return y, np.array(s)


def split(w: list[Array], masks: tuple[Array, Array], n: int, gates: int) -> dict[str, Array]:
    """The arrays of the oracle from packed weights and the masks of sequence n."""
    out: dict[str, Array] = {}
    size = w[1].shape[2]
    for g, name in enumerate("htc"[:gates]):
        rows = slice(g * size, (g + 1) * size)
        out[f"W_{name}"], out[f"R_{name}"] = w[0][rows], w[1][:, rows]
        out[f"b_{name}"] = w[2][:, rows]
        for kind, mask in zip("xs", masks, strict=True):
            out[f"{kind}_{name}"] = mask[g % mask.shape[0], n]
    return out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", ["none", "tied", "untied"])
@pytest.mark.parametrize("gates", [2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_forward(depth: int, gates: int, groups: str, reverse: bool) -> None:
    T, N, I, H = 4, 3, 2, 3
    draw = torch.Generator().manual_seed(depth * 10 + gates)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x, h0 = normal(T, N, I), normal(N, H)
    weights = [normal(gates * H, I), normal(depth, gates * H, H), normal(depth, gates * H)]
    count = {"none": 1, "tied": 1, "untied": gates}[groups]
    x_mask, s_mask = normal(count, N, I), normal(count, N, H)
    if groups == "none":
        x_mask, s_mask = torch.ones_like(x_mask), torch.ones_like(s_mask)
    lengths = torch.tensor([2, 4, 3])
    reset = torch.rand(T, N, generator=draw) < 0.3
    y, h = rhn_layer(
        x, h0, weights,
        x_mask=None if groups == "none" else x_mask, s_mask=None if groups == "none" else s_mask,
        reverse=reverse, lengths=lengths, reset=reset,
    )  # fmt: skip
    masks = (x_mask.numpy(), s_mask.numpy())
    for n, length in enumerate(lengths.tolist()):
        own = split([w.numpy() for w in weights], masks, n, gates)
        clears = reset[:length, n].tolist()
        rows = x[:length, n].numpy()
        expected, last = oracle(rows, h0[n].numpy(), own, clears, reverse, gates == 2)
        for name, got, want in (("y", y[:length, n], expected), ("h_n", h[n], last)):
            truth = torch.from_numpy(want)
            assert_close_by_rule(f"{name} of sequence {n}", got, truth, truth)
        assert not y[length:, n].any()


@pytest.mark.parametrize("gates", [2, 3])
def test_gradients_by_central_differences(gates: int) -> None:
    T, N, I, H, depth = 3, 2, 2, 3, 2
    draw = torch.Generator().manual_seed(gates)
    shapes = [(T, N, I), (N, H), (gates * H, I), (depth, gates * H, H), (depth, gates * H)]
    leaves = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    masks = {
        "x_mask": torch.rand(1, N, I, generator=draw, dtype=torch.float64),
        "s_mask": torch.rand(gates, N, H, generator=draw, dtype=torch.float64),
    }
    slopes = torch.randn(T, N, H, generator=draw, dtype=torch.float64)

    def loss() -> Tensor:
        x, h0, *weights = leaves
        y, h = rhn_layer(x, h0, weights, **masks)
        return (y * slopes).sum() + (h * h).sum()

    numeric = []
    with torch.no_grad():
        for leaf in leaves:
            numeric.append(central_difference(lambda: float(loss()), leaf.numpy()))
    for leaf in leaves:
        leaf.requires_grad_()
    for got, want in zip(torch.autograd.grad(loss(), leaves), numeric, strict=True):
        assert_half_the_digits("gradient", got, torch.from_numpy(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    weights = [torch.randn(12, 2), torch.randn(2, 12, 6), torch.randn(2, 12)]
    y, h = rhn_layer(
        torch.randn(3, 2, 2).to(dtype), torch.zeros(2, 6, dtype=dtype),
        [w.to(dtype) for w in weights],
    )  # fmt: skip
    assert y.dtype == h.dtype == dtype


def test_coupled_and_uncoupled_agree_where_c_is_1_minus_t() -> None:
    """The rows of c as those of t with the sign turned: sigmoid(-a) = 1 - sigmoid(a)."""
    H, I, depth = 5, 3, 3
    shapes = [(2 * H, I), (depth, 2 * H, H), (depth, 2 * H)]
    coupled = [torch.randn(s, dtype=torch.float64) for s in shapes]
    axes = (0, 1, 1)
    uncoupled = [
        torch.cat([w, -w.narrow(axis, H, H)], axis) for w, axis in zip(coupled, axes, strict=True)
    ]
    x, h0 = torch.randn(4, 2, I, dtype=torch.float64), torch.randn(2, H, dtype=torch.float64)
    for a, b in itertools.pairwise((rhn_layer(x, h0, coupled), rhn_layer(x, h0, uncoupled))):
        for got, want in zip(a, b, strict=True):
            assert_close_by_rule("state", got, want, want)
