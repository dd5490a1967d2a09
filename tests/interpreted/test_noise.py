"""Recurrent dropout and zoneout on Triton: the reference's masks, outputs and every gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fastrnn
from fastrnn.backends.triton.common import keep
from fastrnn.noise import Noise
from fastrnn.reference import philox
from tests.interpreted.test_layer import verify
from tests.problems import PLAIN, Case, Problem
from tests.test_kernels import LAYOUTS
from tests.test_regularisers_kernels import noises
from tests.tolerances import assert_same_bits


@triton.jit
def _keep_kernel(
    out, seed, stream, t, first, threshold, N: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    n, u = tl.arange(0, N), tl.arange(0, U)
    mask = keep(tl.load(seed), stream, t, n + first, u, threshold)
    tl.store(out + n[None, :] * U + u[:, None], mask)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 0x5DEECE66D1234567])
def test_masks_are_those_of_the_reference(seed: int, p: float) -> None:
    """Units beyond one draw of 64, rows of a second tile, a stream with all of its parts."""
    N, U, t, stream = 32, 256, 3, 5 << 8 | 1 << 4 | 2
    seeds = torch.tensor([seed])
    expected = philox.keep(seeds, stream, p, t + 1, 2 * N, U, torch.device("cpu"))[t]
    for first in (0, N):
        out = torch.empty((N, U))
        _keep_kernel[(1,)](out, seeds, stream, t, first, philox.threshold(p), N=N, U=U)
        assert torch.equal(out, expected[first : first + N].float())
        assert 0.0 < p < 1.0 or bool(out.all()) == (p == 0.0)


def alternating(cell: str) -> list[Noise]:
    """Noises of a cell. Each mode is there per step and per sequence, which differ in the step that
    masks are drawn for: one of them with zoneout, the other without, in turn."""
    made = noises(cell)
    for i, name in enumerate([n for n in made if "-sequence" in n]):
        del made[name if (i + PLAIN.index(cell)) % 2 else name.replace("-sequence", "")]
    return list(made.values())


def grid() -> list[Case]:
    """Every cell x noise; layout, dtype and sizes drawn, from a fixed seed, per point."""
    choose = random.Random(2016)
    cases = []
    for cell in PLAIN:
        for noise in alternating(cell):
            layout, lengths, reset = choose.choice(list(LAYOUTS.values()))
            # In 16 bits rounding would decide branches that y does not show there.
            exact = cell == "rnn_relu" and noise.mixes
            wide = torch.float32 if exact else choose.choice((torch.float32, torch.bfloat16))
            case = Case(
                cell,
                wide,
                T=choose.choice((2, 3)),
                N=choose.choice((1, 3)),
                I=3,
                H=choose.choice((5, 20)),
                proj=choose.choice((0, 4)) if cell == "lstm" else 0,
                directions=choose.choice((1, 2)),
                layout=layout,
                lengths=lengths,
                reset=reset,
                recompute=choose.random() < 0.3,
                plan="triton",
                seed=len(cases),
                noise=noise,
            )
            cases.append(case)
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: Case) -> None:
    verify(Problem(case))


@pytest.mark.parametrize(
    "options",
    [
        {"recurrent_dropout": 0.3, "zoneout": 0.2},
        {"weight_dropout": 0.4},
        {"recurrent_dropout": 0.3, "recurrent_dropout_mode": "state", "weight_dropout": 0.4},
    ],
    ids=lambda o: "-".join(o),
)
def test_module_draws_the_masks_of_other_backends(options: dict[str, Any]) -> None:
    """Seeds are torch's: a module in training gives what the reference gives after one seed."""
    rnn = fastrnn.LSTM(3, 5, num_layers=2, dropout=0.2, bidirectional=True, **options)
    x = torch.randn(3, 2, 3)
    results = []
    for backend in ("reference", "triton"):
        rnn.zero_grad()
        torch.manual_seed(7)
        with fastrnn.use_backend(backend):
            y, (h_n, c_n) = rnn(x)
            (y.sum() + h_n.sum() + c_n.square().sum()).backward()
        results.append([y.detach(), h_n, c_n, *(w.grad for w in rnn.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_seed_gives_the_same_bits() -> None:
    rnn = fastrnn.GRU(3, 5, recurrent_dropout=0.5, zoneout=0.3)
    x = torch.randn(3, 2, 3)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with fastrnn.use_backend("triton"):
            outputs.append(rnn(x)[0])
    assert_same_bits("the same seed", outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_noise_without_a_seed() -> None:
    p = Problem(Case("gru", T=2, plan="triton"))
    noise = Noise(0, True, zoneout_h=0.5).text()
    with pytest.raises(ValueError, match="seed: got None, expected a tensor for noise"):
        torch.ops.fastrnn.layer_forward(
            p.x, p.h0, None, p.weights, None, None, None, None, "gru", False, False, "triton",
            None, noise,
        )  # fmt: skip
