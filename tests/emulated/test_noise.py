"""Recurrent dropout and zoneout on emulated CUDA kernels: outputs and every gradient under the
reference's masks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn.noise import Noise
from fastrnn.regularisers import draw_masks
from tests.emulated.test_layer import verify
from tests.formats import FORMATS, choose_format
from tests.problems import PLAIN, Case, Problem, solve_ops
from tests.test_kernels import LAYOUTS
from tests.test_regularisers_kernels import noises
from tests.tolerances import assert_close_by_rule, assert_same_bits


def grid() -> list[tuple[Case, str]]:
    """Every cell x noise; layout, format and sizes drawn, from a fixed seed, per point."""
    draw = random.Random(2016)
    cases = []
    for cell in PLAIN:
        for noise in noises(cell).values():
            layout, lengths, reset = draw.choice(list(LAYOUTS.values()))
            # With few digits rounding would decide branches that y does not show there.
            exact = cell == "rnn_relu" and noise.mixes
            name = "bf16x3" if exact else draw.choice(list(FORMATS))
            case = Case(
                cell,
                FORMATS[name],
                T=draw.choice((2, 3)),
                N=draw.choice((1, 3, 9)),
                I=3,
                H=draw.choice((5, 16, 37)),
                directions=draw.choice((1, 2)),
                layout=layout,
                lengths=lengths,
                reset=reset,
                recompute=draw.random() < 0.3,
                plan="cuda",
                seed=len(cases),
                noise=noise,
            )
            cases.append((case, name))
    return cases


@pytest.mark.parametrize(("case", "name"), grid(), ids=str)
def test_layer(case: Case, name: str) -> None:
    verify(Problem(case), name)


@pytest.mark.parametrize("cell", PLAIN)
def test_several_launches(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows keep their numbers, and so their masks, when the batch runs in parts."""
    from fastrnn.backends import cuda_native

    numbers = (4, *cuda_native._device(0)[1:])
    monkeypatch.setattr(cuda_native, "_device", lambda _: numbers)
    monkeypatch.setattr(cuda_native, "_chosen", {})
    noise = Noise(1, True, "state", False, 0.4, 0.2)
    p = Problem(
        Case(
            cell, torch.bfloat16, T=3, N=19, H=20, directions=2, lengths=True, reset=True,
            plan="cuda", noise=noise,
        )
    )  # fmt: skip
    verify(p, "bf16")
    assert {plan.launches for plan in cuda_native._chosen.values()} == {3}


@pytest.mark.parametrize("directions", [1, 2])
def test_masks_are_those_of_the_cpu(directions: int) -> None:
    """Every bit, with rows of several groups: without weights a GRU's step halves the state, which
    zoneout undoes where its mask says so."""
    noise = Noise(3, True, zoneout_h=0.4)
    p = Problem(Case("gru", T=4, N=19, I=1, H=64, directions=directions, plan="cuda", noise=noise))
    p.weights = [torch.zeros_like(w) for w in p.weights]
    p.h0 = torch.ones_like(p.h0)
    seed, text = p.noise
    rest = (None, None, None, None, "gru", False, False, "cuda", seed, text)
    y = torch.ops.fastrnn.layer_forward(p.x, p.h0, None, p.weights, *rest)[0]
    for d in range(directions):
        kept = draw_masks(noise, seed, d, (4, 19), 64, 64, y).zoneout_h
        assert isinstance(kept, torch.Tensor)
        own = y[..., d * 64 : (d + 1) * 64]
        own = own.flip(0) if d else own
        kept = kept.flip(0) if d else kept
        before = torch.cat([torch.ones_like(own[:1]), own[:-1]])
        assert_same_bits(f"masks of direction {d}", own < before, kept == 1)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.4)}),
    ("LSTM", {"recurrent_dropout": 0.3, "recurrent_dropout_mode": "cell"}),
    ("LSTM", {"weight_dropout": 0.4}),
    ("GRU", {"recurrent_dropout": 0.3, "recurrent_dropout_mode": "state", "weight_dropout": 0.4}),
    ("GRU", {"recurrent_dropout": 0.3, "recurrent_dropout_per": "sequence", "reset_after": False}),
    ("RNN", {"zoneout": 0.3, "recurrent_dropout": 0.2}),
]


@pytest.mark.parametrize(("cell", "options"), OPTIONS, ids=str)
def test_module_draws_the_masks_of_other_backends(cell: str, options: dict[str, Any]) -> None:
    """Seeds are torch's: a module in training gives what the reference gives after one seed."""
    choose_format("bf16x3")
    rnn = getattr(fastrnn, cell)(3, 5, num_layers=2, dropout=0.2, bidirectional=True, **options)
    x = torch.randn(3, 2, 3)
    results = []
    for backend in ("reference", "cuda"):
        rnn.zero_grad()
        torch.manual_seed(7)
        with fastrnn.use_backend(backend):
            assert fastrnn.explain(rnn, x).backend == backend
            y, state = rnn(x)
            states = state if isinstance(state, tuple) else (state,)
            sum(t.square().sum() for t in (y, *states)).backward()
            with torch.no_grad():
                rest = rnn.eval()(x)[0]
            rnn.train()
        grads = [w.grad.clone() for w in rnn.parameters()]
        results.append([y.detach(), *states, rest, *grads])
    for index, (expected, got) in enumerate(zip(*results, strict=True)):
        name = f"result {index}"
        assert_close_by_rule(name, got, expected.double(), expected, number_format="bf16x3")


def test_explain_names_the_kernels() -> None:
    """Masks inside need kernels of their own; weight dropout does not."""
    choose_format("bf16x3")
    x = torch.randn(3, 2, 3)
    with fastrnn.use_backend("cuda"):
        inside = fastrnn.explain(fastrnn.LSTM(3, 5, zoneout=0.1), x).plan
        outside = fastrnn.explain(fastrnn.LSTM(3, 5, weight_dropout=0.1), x).plan
    assert inside.startswith("bf16x3, with regularisers; forward: sentinel")
    assert inside.endswith(", zoneout 0.1")
    assert outside.startswith("bf16x3; forward: sentinel")


@pytest.mark.parametrize("cell", PLAIN)
def test_same_bits_whatever_the_schedule(cell: str) -> None:
    noise = Noise(0, True, "state", False, 0.5, 0.3)
    p = Problem(
        Case(cell, torch.bfloat16, T=3, N=9, H=37, directions=2, lengths=True, plan="cuda",
             noise=noise)
    )  # fmt: skip
    expected = solve_ops(p)
    for name, value in solve_ops(p).items():
        assert_same_bits(name, value, expected[name])


def test_gradient_of_a_gradient() -> None:
    choose_format("bf16x3")
    rnn = fastrnn.LSTM(3, 4, recurrent_dropout=0.3, zoneout=0.2)
    x = torch.randn(2, 2, 3)
    found = []
    for backend in ("cuda", "reference"):
        given = x.clone().requires_grad_()
        torch.manual_seed(3)
        with fastrnn.use_backend(backend):
            (dx,) = torch.autograd.grad(rnn(given)[0].square().sum(), given, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), rnn.parameters()))
    for index, (got, expected) in enumerate(zip(*found, strict=True)):
        name = f"gradient {index}"
        assert_close_by_rule(name, got, expected.double(), expected, number_format="bf16x3")


def test_noise_without_a_seed() -> None:
    p = Problem(Case("gru", T=2, plan="cuda"))
    noise = Noise(0, True, zoneout_h=0.5).text()
    with pytest.raises(ValueError, match="seed: got None, expected a tensor for noise"):
        torch.ops.fastrnn.layer_forward(
            p.x, p.h0, None, p.weights, None, None, None, None, "gru", False, False, "cuda",
            None, noise,
        )  # fmt: skip


def test_fakes_say_what_the_operators_return() -> None:
    for cell in PLAIN:
        noise = Noise(0, True, zoneout_h=0.5)
        p = Problem(Case(cell, torch.bfloat16, T=2, N=4, H=5, plan="cuda", noise=noise))
        rest = (None, None, None, cell, False, False, "cuda", *p.noise)
        torch.library.opcheck(
            torch.ops.fastrnn.layer_forward_train.default, (p.x, p.h0, p.c0, p.weights, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
