"""Layers whose steps are launched one by one, on emulated kernels, against the float64 reference:
every cell, projections, layer norm, regularisers, and sizes that no persistent kernel holds."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fastrnn
from fastrnn.backends import cuda_native
from fastrnn.ops.layer import _fake_layer_forward_train
from tests.emulated.test_layer import verify
from tests.formats import FORMATS, choose_format
from tests.problems import NORMED, PLAIN, Case, Problem, forward_train, solve_ops
from tests.test_kernels import LAYOUTS
from tests.test_regularisers_kernels import noises
from tests.tolerances import assert_same_bits

KINDS = [
    *((cell, 0) for cell in (*PLAIN, *NORMED)),
    ("lstm", 13),
    ("lstm_layer_norm", 13),
]


def grid() -> list[tuple[Case, str]]:
    """Every cell, projected or not, x layout; format, sizes and a regulariser drawn per point."""
    draw = random.Random(2025)
    cases = []
    for cell, proj in KINDS:
        # The rule for a number format is about its products, not about norms of their sums.
        names = ["bf16x3"] if cell in NORMED else list(FORMATS)
        for layout, lengths, reset in LAYOUTS.values():
            name = draw.choice(names)
            case = Case(
                cell,
                FORMATS[name],
                T=draw.choice((2, 3, 5)),
                N=draw.choice((1, 3, 9)),
                I=3,
                H=draw.choice((8, 17, 40)),
                proj=proj,
                directions=draw.choice((1, 2)),
                layout=layout,
                lengths=lengths,
                reset=reset,
                bias=draw.random() < 0.7,
                recompute=draw.random() < 0.3,
                plan="cuda,steps",
                seed=len(cases),
            )
            cases.append((case, name))
        for noise in noises(cell.removesuffix("_layer_norm")).values():
            if draw.random() < 0.5 or (cell == "rnn_relu" and noise.mixes):
                continue
            case = Case(
                cell, T=3, N=3, I=3, H=draw.choice((8, 17)), proj=proj, directions=2, lengths=True,
                reset=draw.random() < 0.5, plan="cuda,steps", seed=len(cases), noise=noise,
            )  # fmt: skip
            cases.append((case, "bf16x3"))
    return cases


@pytest.mark.parametrize(("case", "name"), grid(), ids=str)
def test_layer(case: Case, name: str) -> None:
    verify(Problem(case), name)


@pytest.mark.parametrize("cell", PLAIN)
def test_beyond_the_persistent_kernels(cell: str) -> None:
    """The plan follows from the size; forward and backward need not be of one kind."""
    choose_format("bf16x3")
    p = Problem(Case(cell, T=3, N=9, H=65, directions=2, lengths=True, plan="cuda"))
    verify(p, "bf16x3")
    need = cuda_native.Need(cell, torch.float32, 9, 65, 2)
    for backward in (False, True):
        assert cuda_native.choose(need, backward, 0).exchange == "steps"


@pytest.mark.parametrize("bf16", [False, True])
def test_modules(bf16: bool) -> None:
    """Options beside each other and large layers by request; twice the same bits."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(3, 2, 5, dtype=dtype)
    for rnn in (
        fastrnn.LSTM(5, 9, proj_size=4, zoneout=0.1, dtype=dtype),
        fastrnn.GRU(5, 9, layer_norm=True, zoneout=0.1, bidirectional=True, dtype=dtype),
        fastrnn.LSTM(5, 9, proj_size=4, layer_norm=True, num_layers=2, dtype=dtype),
        fastrnn.GRU(5, 65, zoneout=0.1, dtype=dtype),
    ):
        rnn.eval()
        outputs = []
        with fastrnn.use_backend("cuda"):
            assert "steps, " in fastrnn.explain(rnn, x).plan
            for _ in range(2):
                rnn.zero_grad()
                y = rnn(x)[0]
                y.float().square().sum().backward()
                outputs.append([y.detach(), *(p.grad.clone() for p in rnn.parameters())])
        for first, second in zip(*outputs, strict=True):
            assert_same_bits("twice", first, second)


@pytest.mark.parametrize(("cell", "proj"), KINDS)
def test_a_compiler_knows_the_tape(cell: str, proj: int) -> None:
    """The operator's shapes without data are those with data."""
    c = Case(cell, torch.bfloat16, H=9, proj=proj, directions=2, plan="cuda,steps")
    p = Problem(c)
    gates = forward_train(p)["gates"]
    empty = [None if t is None else t.to("meta") for t in (p.x, p.h0, p.c0)]
    weights = [w.to("meta") for w in p.weights]
    fake = _fake_layer_forward_train(
        *empty, weights, None, None, None, cell, False, False, c.plan
    )  # fmt: skip
    assert (fake[4].shape, fake[4].dtype) == (gates.shape, gates.dtype)


def test_a_refused_grid_gets_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a driver answers that shares its device with others."""
    monkeypatch.setattr(cuda_native, "_too_large", set())
    monkeypatch.setattr(cuda_native, "_chosen", {})
    monkeypatch.setattr(cuda_native, "_none", {})
    choose_format("bf16x3")

    def refuse(*_: object) -> None:
        raise RuntimeError("fastrnn CUDA library: launching: " + cuda_native._REFUSED)

    monkeypatch.setattr(cuda_native._cuda, "forward", refuse)
    monkeypatch.setattr(cuda_native._cuda, "backward", refuse)
    p = Problem(Case("gru", T=3, N=3, H=17, plan="cuda"))
    verify(p, "bf16x3")
    assert cuda_native._too_large
    # Another device may well hold it.
    need = cuda_native.Need("gru", torch.float32, 3, 17, 1)
    exchanges = [cuda_native.choose(need, False, ordinal).exchange for ordinal in (0, 1)]
    assert exchanges == ["steps", "sentinel"]
    with pytest.raises(RuntimeError, match="the driver refused its grid as too large"):
        solve_ops(Problem(dataclasses.replace(p.case, plan="cuda,sentinel")))
