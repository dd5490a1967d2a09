"""Single kernels for pytest-benchmark: compare two commits, without modules or dispatch.

    python -m pytest benchmarks/micro --benchmark-save=before     on the old commit
    python -m pytest benchmarks/micro --benchmark-compare         on the new one

The ops are called directly: no module, no autograd, no choice of backend. To compare with other
libraries use `python -m benchmarks`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

pytest.importorskip("fastrnn._cpu", reason="the native CPU library is not built")
from fastrnn import ops  # noqa: F401 - registers the ops

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
SHAPES = [(100, 1, 512), (100, 8, 256), (100, 32, 256)]
Case = tuple[Tensor, Tensor, Tensor | None, list[Tensor]]


def shape_id(shape: tuple[int, ...]) -> str:
    return "T{}-N{}-H{}".format(*shape)


@pytest.fixture(params=list(GATES))
def cell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SHAPES, ids=shape_id)
def case(request: pytest.FixtureRequest, cell: str) -> Case:
    """x (T, N, H), h0 and c0 (1, N, H), and the four weights of one direction."""
    steps, batch, hidden = request.param
    scale, rows = hidden**-0.5, GATES[cell] * hidden
    weights = [(torch.rand(rows, hidden) - 0.5) * 2 * scale for _ in range(2)]
    weights += [(torch.rand(rows) - 0.5) * 2 * scale for _ in range(2)]
    state = torch.zeros(1, batch, hidden)
    return torch.randn(steps, batch, hidden), state, state if cell == "lstm" else None, weights


def tail(cell: str, *flags: bool) -> tuple[object, ...]:
    """cell, batch_first, the op's own flags, plan."""
    return (cell, False, *flags, "")


def test_forward(benchmark: BenchmarkFixture, cell: str, case: Case) -> None:
    """Inference with weights packed beforehand."""
    x, h0, c0, weights = case
    packed = torch.ops.fastrnn.pack_weights(weights, cell, "")
    run = torch.ops.fastrnn.layer_forward.default
    benchmark(run, x, h0, c0, weights, packed, None, None, None, *tail(cell, False))


def test_forward_train(benchmark: BenchmarkFixture, cell: str, case: Case) -> None:
    """Forward that keeps the tape, packing included."""
    run = torch.ops.fastrnn.layer_forward_train.default
    benchmark(run, *case, None, None, None, *tail(cell, False))


def test_backward(benchmark: BenchmarkFixture, cell: str, case: Case) -> None:
    """All gradients. The tape may be consumed by a call, so every round gets a fresh one."""
    x, h0, c0, weights = case
    forward = torch.ops.fastrnn.layer_forward_train.default
    backward: Callable[..., object] = torch.ops.fastrnn.layer_backward.default

    def setup() -> tuple[tuple[object, ...], dict[str, object]]:
        y, h_n, c_n, cells, gates = forward(*case, None, None, None, *tail(cell, False))
        dc_n = torch.ones_like(c_n) if cell == "lstm" else None
        gradients = (torch.ones_like(y), torch.ones_like(h_n), dc_n, None)
        saved = (x, y, h0, c0, cells, gates, weights, None, None, None)
        return (*gradients, *saved, *tail(cell, True, True, True)), {}

    benchmark.pedantic(backward, setup=setup, rounds=20, warmup_rounds=2)


def test_pack(benchmark: BenchmarkFixture, cell: str, case: Case) -> None:
    """The packing of one layer's weights for inference."""
    benchmark(torch.ops.fastrnn.pack_weights.default, case[3], cell, "")
