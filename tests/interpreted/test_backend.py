"""The Triton backend as a user meets it: modules, explain, reasons, gradients of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from tests.saved_strides import LAYERS, check_other_strides

MODULES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("LSTM", {"batch_first": True, "bias": False}),
    ("GRU", {"num_layers": 2}),
    ("GRU", {"reset_after": False, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
]
IDS = ["-".join([name, *options]) for name, options in MODULES]


def solve(rnn: torch.nn.Module, x: Any, backend: str, **options: Any) -> list[torch.Tensor]:
    """Output, states and gradients of a call on one backend."""
    rnn.zero_grad()
    with fastrnn.use_backend(backend):
        y, state, *cells = rnn(x, **options)
        y = y.data if isinstance(y, PackedSequence) else y
        states = state if isinstance(state, tuple) else (state,)
        sum(t.square().sum() for t in (y, *states, *cells)).backward()
    return [y.detach(), *states, *cells, *(w.grad.clone() for w in rnn.parameters())]


@pytest.mark.parametrize(("name", "options"), MODULES, ids=IDS)
def test_modules(name: str, options: dict[str, Any]) -> None:
    rnn = getattr(fastrnn, name)(3, 5, **options)
    x = torch.randn(3, 3, 3)
    more: dict[str, Any] = {"lengths": [1, 3, 2]}
    if name == "LSTM":
        more["return_cells"] = True
    for got, expected in zip(
        solve(rnn, x, "triton", **more), solve(rnn, x, "reference", **more), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_saved_tensors_with_other_strides(layer: str) -> None:
    check_other_strides(solve, layer, "triton")


def test_packed_sequence() -> None:
    rnn = fastrnn.GRU(3, 5, bidirectional=True)
    x = pack_sequence([torch.randn(t, 3) for t in (2, 3, 1)], enforce_sorted=False)
    for got, expected in zip(solve(rnn, x, "triton"), solve(rnn, x, "reference"), strict=True):
        torch.testing.assert_close(got, expected)


def test_explain() -> None:
    x = torch.randn(3, 2, 3)
    with fastrnn.use_backend("triton"):
        found = fastrnn.explain(fastrnn.LSTM(3, 5, zoneout=0.1), x)
        assert found.backend == "triton"
        assert "programs of 16 rows" in found.plan
        assert "kept on chip" in found.plan
        assert "zoneout" in found.plan
        assert "read again in each step" in fastrnn.explain(fastrnn.LSTM(3, 100), x).plan
        assert "programs of 16 rows" in fastrnn.explain(fastrnn.BNLSTM(3, 5, max_length=3), x).plan
    assert fastrnn.explain(fastrnn.LSTM(3, 5), x).backend == "cpu"


@pytest.mark.parametrize(
    ("rnn", "why"),
    [
        (fastrnn.LSTM(3, 129), "the largest hidden size is 128 in this dtype"),
        (fastrnn.GRU(3, 5, dtype=torch.float64), "it has no torch.float64 kernels"),
    ],
    ids=["large", "float64"],
)
def test_what_it_does_not_serve(rnn: torch.nn.Module, why: str) -> None:
    x = torch.randn(3, 2, 3, dtype=rnn.weight_hh_l0.dtype)
    with fastrnn.use_backend("triton"), pytest.raises(RuntimeError, match=why):
        rnn(x)
    with fastrnn.use_backend("triton", strict=False) as asked:
        rnn(x)
    assert asked.fallbacks[0][:2] == ("triton", "cpu")


def test_the_cpu_kernels_are_as_they_were() -> None:
    """The same module on both backends in turn: what one keeps does not reach the other."""
    rnn = fastrnn.LSTM(3, 5).eval()
    x = torch.randn(3, 2, 3)
    with torch.no_grad():
        before = rnn(x)[0]
        with fastrnn.use_backend("triton"):
            other = rnn(x)[0]
        after = rnn(x)[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(other, before)


def test_gradient_of_a_gradient() -> None:
    rnn = fastrnn.LSTM(3, 4)
    x = torch.randn(2, 2, 3, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        with fastrnn.use_backend(backend):
            y = rnn(x)[0]
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), rnn.parameters()))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast() -> None:
    rnn = fastrnn.LSTM(3, 5)
    x = torch.randn(3, 2, 3)
    with fastrnn.use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = rnn(x)
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16


@pytest.mark.compile
# torch's own, raised while it traces
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_whole() -> None:
    """One graph, in which the layer is an operator, forward and backward."""
    rnn = fastrnn.GRU(3, 5)
    x = torch.randn(3, 2, 3)
    expected = solve(rnn, x, "triton")
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    rnn.zero_grad()
    with fastrnn.use_backend("triton"):
        y, h_n = compiled(x)
        (y.square().sum() + h_n.square().sum()).backward()
    got = [y.detach(), h_n, *(w.grad for w in rnn.parameters())]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
