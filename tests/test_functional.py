"""fastrnn.functional: stacks of layers, their derivatives of any order, and bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional
from fastrnn.kinds import GATES
from tests.problems import PLAIN as CELLS
from tests.tolerances import assert_close_by_rule, assert_same_bits


@dataclass(frozen=True)
class Stack:
    """A stack of layers and one batch, as data; ``build`` draws the tensors."""

    cell: str
    layers: int = 1
    directions: int = 1
    layout: str = "time"
    lengths: bool = False
    reset: bool = False
    proj: int = 0
    bias: bool = True
    recompute: bool = False
    T: int = 4
    N: int = 3
    I: int = 3
    H: int = 5

    def __str__(self) -> str:
        words = [self.cell, f"L{self.layers}", f"D{self.directions}", self.layout]
        words += [n for n in ("lengths", "reset", "proj", "recompute") if getattr(self, n)]
        return "-".join(words) + ("" if self.bias else "-nobias")

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Callable[..., Any]]:
        """Leaves (input, states, weights), and run(*leaves) -> tuple of differentiable outputs."""
        draw = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        out, rows = self.proj or self.H, GATES[self.cell] * self.H
        lengths = torch.randint(1, self.T + 1, (self.N,), generator=draw)
        lengths[0] = self.T
        x = normal(self.T, self.N, self.I)
        batch_sizes = None
        if self.layout == "packed":
            packed = pack_padded_sequence(x, lengths.sort(descending=True).values)
            x, batch_sizes = packed.data, packed.batch_sizes
        elif self.layout == "batch":
            x = x.transpose(0, 1)
        weights = []
        for layer in range(self.layers):
            wide = self.directions * out if layer else self.I
            shapes = [(rows, wide), (rows, out)] + [(rows,)] * (2 * self.bias)
            shapes += [(self.proj, self.H)] * bool(self.proj)
            for shape in shapes * self.directions:
                weights.append(normal(*shape) / math.sqrt(self.H))
        states = [normal(self.layers * self.directions, self.N, out)]
        if self.cell == "lstm":
            states.append(normal(self.layers * self.directions, self.N, self.H))
        reset = torch.rand(x.shape[:2], generator=draw) < 0.3 if self.reset else None
        options = {
            "bias": self.bias,
            "num_layers": self.layers,
            "bidirectional": self.directions == 2,
            "batch_first": self.layout == "batch",
            "batch_sizes": batch_sizes,
            "lengths": lengths if self.lengths else None,
            "reset": reset,
            "recompute": self.recompute,
        }
        count = len(states)

        def run(x: Tensor, *rest: Tensor, **more: Any) -> tuple[Tensor, ...]:
            states, weights = rest[:count], rest[count:]
            if self.cell == "lstm":
                both = options | {"proj_size": self.proj, "return_cells": True} | more
                return functional.lstm(x, (states[0], states[1]), weights, **both)
            if self.cell.startswith("gru"):
                after = self.cell == "gru"
                return functional.gru(x, states[0], weights, reset_after=after, **options | more)
            kind = self.cell.removeprefix("rnn_")
            return functional.rnn(x, states[0], weights, nonlinearity=kind, **options | more)

        leaves = [t.to(dtype).requires_grad_() for t in (x, *states, *weights)]
        return leaves, run


STACKS = [
    *(Stack(cell) for cell in CELLS),
    *(Stack(cell, 2, 2, "batch", lengths=True, reset=True) for cell in CELLS),
    *(Stack(cell, 2, 2, "packed", bias=False) for cell in CELLS),
    *(Stack(cell, 3, 1, "time", reset=True, recompute=True) for cell in CELLS),
    Stack("lstm", 2, 2, proj=2, lengths=True),
    Stack("lstm", 2, 1, "batch", proj=2, recompute=True),
]


# Not relu in bfloat16: rounding moves values across the kink, which leaves no gradient to compare.
PRECISIONS = [
    (stack, dtype)
    for stack in STACKS
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if stack.cell != "rnn_relu" or dtype != torch.bfloat16
]


def outputs_and_gradients(stack: Stack, dtype: torch.dtype) -> list[Tensor]:
    leaves, run = stack.build(dtype)
    outputs = run(*leaves)
    draw = torch.Generator().manual_seed(5)
    upstream = [torch.randn(o.shape, generator=draw, dtype=torch.float64) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, [u.to(dtype) for u in upstream])
    return [*(o.detach() for o in outputs), *grads]


@pytest.mark.parametrize(("stack", "dtype"), PRECISIONS, ids=str)
def test_agrees_with_the_reference(stack: Stack, dtype: torch.dtype) -> None:
    got = outputs_and_gradients(stack, dtype)
    with fastrnn.use_backend("reference"):
        same = outputs_and_gradients(stack, dtype)
        rounded, run = stack.build(dtype)
    leaves = [t.detach().double().requires_grad_() for t in rounded]
    with fastrnn.use_backend("reference"):
        outputs = run(*leaves)
    draw = torch.Generator().manual_seed(5)
    upstream = [torch.randn(o.shape, generator=draw, dtype=torch.float64) for o in outputs]
    upstream = [u.to(dtype).double() for u in upstream]
    exact = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    for i, parts in enumerate(zip(got, exact, same, strict=True)):
        assert_close_by_rule(f"{i} of {stack}", *parts)


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_inference_agrees_with_training(stack: Stack) -> None:
    leaves, run = stack.build(torch.float32)
    training = run(*leaves)
    exact = run(*(t.detach().double() for t in leaves))
    with torch.no_grad():
        inference = run(*leaves)
    for i, parts in enumerate(zip(inference, exact, training, strict=True)):
        assert_close_by_rule(f"{i} of {stack}", *parts)


SMALL = [
    Stack(cell, layers, directions, layout, lengths, reset, T=3, N=2, I=2, H=2)
    for cell in CELLS
    for layers, directions, layout, lengths, reset in (
        (1, 1, "time", False, False),
        (2, 2, "batch", True, True),
        (1, 2, "packed", False, False),
    )
] + [Stack("lstm", 1, 1, proj=1, T=3, N=2, I=2, H=2, recompute=True)]


def smooth_leaves(stack: Stack) -> tuple[list[Tensor], Callable[..., Any]]:
    leaves, run = stack.build()
    if stack.cell == "rnn_relu":
        # Away from the kink, where finite differences mean nothing.
        leaves = [(t.detach().abs() + 0.1).requires_grad_() for t in leaves]
    return leaves, run


@pytest.mark.parametrize("stack", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(stack: Stack) -> None:
    leaves, run = smooth_leaves(stack)
    torch.autograd.gradcheck(run, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_float32(cell: str) -> None:
    """A gradient penalty, as WGAN-GP takes it, against the reference in float64."""
    stack = Stack(cell, 2, 2, "batch", lengths=True)

    def penalty(dtype: torch.dtype) -> list[Tensor]:
        leaves, run = stack.build(torch.float32)
        leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
        outputs = run(*leaves)
        total = sum(o.square().sum() for o in outputs)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    got = penalty(torch.float32)
    with fastrnn.use_backend("reference"):
        same, exact = penalty(torch.float32), penalty(torch.float64)
    for i, parts in enumerate(zip(got, exact, same, strict=True)):
        assert_close_by_rule(f"second derivative {i}", *parts)


def test_third_derivative() -> None:
    leaves, run = Stack("gru", T=2, N=1, I=2, H=2).build()

    def derivatives() -> list[Tensor]:
        value = run(*leaves)[0].square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.pow(3).sum() for g in grads)
        return list(grads)

    got = derivatives()
    with fastrnn.use_backend("reference"):
        exact = derivatives()
    for parts in zip(got, exact, exact, strict=True):
        assert_close_by_rule("third derivative", *parts)


@pytest.mark.parametrize("cell", CELLS)
def test_every_subset_of_one(cell: str) -> None:
    """Any one of input, states and weights alone gets the same gradient as among all others."""
    leaves, run = Stack(cell, directions=2).build(torch.float32)
    everything = torch.autograd.grad(run(*leaves)[0].sum(), leaves)
    for i, expected in enumerate(everything):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        (got,) = torch.autograd.grad(run(*alone)[0].sum(), [alone[i]])
        assert_close_by_rule(f"gradient {i}", got, expected.double(), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_each_output_alone(cell: str) -> None:
    leaves, run = Stack(cell, 2, 2).build(torch.float32)
    for i in range(len(run(*leaves))):
        got = torch.autograd.grad(run(*leaves)[i].sum(), leaves, allow_unused=True)
        with fastrnn.use_backend("reference"):
            same = torch.autograd.grad(run(*leaves)[i].sum(), leaves, allow_unused=True)
        for a, b in zip(got, same, strict=True):
            zeros = torch.zeros(())
            a, b = zeros if a is None else a, zeros if b is None else b
            a, b = torch.broadcast_tensors(a, b)
            assert_close_by_rule(f"from output {i}", a, b.double(), b)


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_backward_twice_gives_the_same_bits(stack: Stack) -> None:
    leaves, run = stack.build(torch.float32)
    total = sum(o.square().sum() for o in run(*leaves))
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    again = torch.autograd.grad(sum(o.square().sum() for o in run(*leaves)), leaves)
    for a, b, c in zip(first, second, again, strict=True):
        assert_same_bits("gradient", a, b)
        assert_same_bits("gradient of a second call", a, c)


def test_tied_weights() -> None:
    leaves, run = Stack("gru", 2, I=5).build()
    x, h, *weights = leaves
    tied = [*weights[:4], *weights[:4]]
    outputs = run(x, h, *tied)
    got = torch.autograd.grad(outputs[0].sum(), weights[:4])
    apart = [w.detach().requires_grad_() for w in tied]
    both = torch.autograd.grad(run(x, h, *apart)[0].sum(), apart)
    for w, (a, b) in enumerate(zip(both[:4], both[4:], strict=True)):
        assert_close_by_rule(f"tied {w}", got[w], a + b, a + b)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_dropout_draws_as_torch(name: str, batch_first: bool) -> None:
    module = getattr(nn, name)(3, 5, 3, dropout=0.4, batch_first=batch_first, bidirectional=True)
    x = torch.randn(4, 6, 3)
    weights = list(module._flat_weights)

    def ours(p: float) -> Tensor:
        return getattr(functional, name.lower())(
            x, None, weights, num_layers=3, dropout=p, training=True, bidirectional=True,
            batch_first=batch_first,
        )[0]  # fmt: skip

    with torch.no_grad():
        torch.manual_seed(3)
        got = ours(0.4)
        torch.manual_seed(3)
        assert_same_bits("same seed", got, ours(0.4))
        torch.manual_seed(3)
        expected = module(x)[0]
        module.dropout = 1.0
        everything = module(x)[0]
    # The same mask: a unit dropped by one and kept by the other would differ by far more.
    assert_close_by_rule("dropout", got, expected.double(), expected)
    assert_close_by_rule("dropout=1", ours(1.0), everything.double(), everything)


AUTOCAST = [
    ("LSTM", {}), ("GRU", {}), ("RNN", {}), ("LSTM", {"proj_size": 2}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}), ("LSTMCell", {}), ("GRUCell", {}),
    ("RNNCell", {}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("records", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), AUTOCAST, ids=str)
def test_autocast_gives_torchs_dtypes(
    name: str, options: dict[str, Any], given: torch.dtype, records: bool
) -> None:
    plain = name == "LSTM" and "proj_size" not in options and given == torch.float32
    if plain and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch.nn.LSTM under bfloat16 autocast needs oneDNN's kernels of AVX-512")
    weight_dtype = torch.float64 if given == torch.float64 else torch.float32
    theirs = getattr(nn, name)(3, 4, **options).to(weight_dtype)
    ours = getattr(fastrnn, name)(3, 4, **options).to(weight_dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn((2, 3) if "Cell" in name else (5, 2, 3)).to(given)

    def call(module: nn.Module) -> list[Tensor]:
        result = module(x)
        if isinstance(result, tuple):
            return [t for r in result for t in ([r] if isinstance(r, Tensor) else r)]
        return [result]

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(records):
        got, expected = call(ours), call(theirs)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=0.03, rtol=0.03)
    if records:
        grads = torch.autograd.grad(sum(t.float().sum() for t in got), list(ours.parameters()))
        assert all(g.dtype == weight_dtype for g in grads)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_one_step_of_the_stack(cell: str, bias: bool) -> None:
    leaves, run = Stack(cell, T=1, bias=bias).build(torch.float32)
    states = 2 if cell == "lstm" else 1
    x, rest, weights = leaves[0], leaves[1 : 1 + states], leaves[1 + states :]
    _, *expected = run(*leaves)
    if cell == "lstm":
        got = functional.lstm_cell(x[0], (rest[0][0], rest[1][0]), *weights)
    elif cell.startswith("gru"):
        got = (functional.gru_cell(x[0], rest[0][0], *weights, reset_after=cell == "gru"),)
    else:
        kind = cell.removeprefix("rnn_")
        got = (functional.rnn_cell(x[0], rest[0][0], *weights, nonlinearity=kind),)
    for a, b in zip(got, expected, strict=False):
        assert_same_bits("state", a, b[0])
    ours = torch.autograd.grad(sum(t.sum() for t in got), leaves)
    theirs = torch.autograd.grad(sum(t.sum() for t in expected[:states]), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits("gradient", a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str) -> None:
    leaves, run = _without_batch(cell)
    outputs = run(*leaves)
    assert outputs[0].shape[:2] == (4, 0)
    for grad, leaf in zip(torch.autograd.grad(outputs[0].sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def _without_batch(cell: str) -> tuple[list[Tensor], Callable[..., Any]]:
    leaves, run = Stack(cell, 2, 2).build(torch.float32)
    states = 2 if cell == "lstm" else 1
    empty = [t.detach()[:, :0].requires_grad_() for t in leaves[: 1 + states]]
    return [*empty, *leaves[1 + states :]], run


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own jvp
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_function_transforms(name: str) -> None:
    """vmap over stacked modules, per-sample gradients and a jvp, all as in eager mode."""
    modules = [getattr(fastrnn, name)(3, 4) for _ in range(3)]
    params, _ = torch.func.stack_module_state(modules)
    x = torch.randn(5, 2, 3)

    def call(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], p, (x,))[0]

    stacked = torch.func.vmap(call, (0, None))(params, x)
    for got, module in zip(stacked, modules, strict=True):
        expected = module(x)[0].detach()
        assert_close_by_rule("vmap", got, expected.double(), expected)

    own = dict(modules[0].named_parameters())
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, one: call(p, one.unsqueeze(1)).sum()), (None, 1)
    )(own, x)
    total = torch.autograd.grad(call(own, x).sum(), list(own.values()))
    for got, expected in zip(per_sample.values(), total, strict=True):
        assert_close_by_rule("per-sample", got.sum(0), expected.double(), expected)
    _, tangent = torch.func.jvp(lambda x: call(own, x), (x,), (torch.ones_like(x),))
    assert tangent.shape == (5, 2, 4)


X, H0 = torch.zeros(4, 2, 3), torch.zeros(1, 2, 5)
LSTM_W = [torch.zeros(s) for s in ((20, 3), (20, 5), (20,), (20,))]
GRU_W = [torch.zeros(s) for s in ((15, 3), (15, 5), (15,), (15,))]
BAD = [
    (RuntimeError, r"input must have 3 dimensions, got 2", {"input": X[0]}),
    (RuntimeError, r"sequence length to be larger than 0 in RNN", {"input": X[:0]}),
    (
        RuntimeError,
        r"must be equal to input_size. Expected 3, got 7",
        {"input": torch.zeros(4, 2, 7)},
    ),
    (ValueError, r"input dtype \(torch.float64\) does not match weight", {"input": X.double()}),
    (RuntimeError, r"not at the same device", {"input": X.to("meta")}),
    (
        RuntimeError,
        r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]",
        {"hx": torch.zeros(1, 3, 5)},
    ),
    (RuntimeError, r"not the same dtype", {"hx": H0.double()}),
    (TypeError, r"hx: got tuple, expected a tensor", {"hx": (H0, H0)}),
    (TypeError, r"input: got list, expected a tensor", {"input": [[[0.0] * 3]]}),
    (ValueError, r"flat_weights: got 3 tensors, expected 4", {"flat_weights": GRU_W[:3]}),
    (ValueError, r"flat_weights: got 4 tensors, expected 2", {"bias": False}),
    (ValueError, r"expected 4 for each of 2 layers", {"num_layers": 2}),
    (
        RuntimeError,
        r"flat_weights\[2\]: got shape \(14,\), expected \(15,\)",
        {"flat_weights": [*GRU_W[:2], torch.zeros(14), GRU_W[3]]},
    ),
    (TypeError, r"lengths: got a tensor of torch.float32", {"lengths": torch.ones(2)}),
    (TypeError, r"lengths: got nan \(float\) at index 1", {"lengths": [1, math.nan]}),
    (TypeError, r"lengths: got True \(bool\) at index 0", {"lengths": [True, 1]}),
    (TypeError, r"lengths: got int, expected N=2", {"lengths": 3}),
    (ValueError, r"lengths: got values from 0 to 4.*between 1 and T=4", {"lengths": [0, 4]}),
    (ValueError, r"lengths: got values from 1 to 5", {"lengths": torch.tensor([5, 1])}),
    (ValueError, r"lengths: got shape \(3,\)", {"lengths": [1, 1, 1]}),
    (ValueError, r"lengths: got shape \(1, 2\)", {"lengths": torch.ones(1, 2).long()}),
    (ValueError, r"lengths: got a tensor on meta", {"lengths": torch.ones(2).long().to("meta")}),
    (TypeError, r"reset: got torch.float32", {"reset": torch.ones(4, 2)}),
    (TypeError, r"reset: got list", {"reset": [[True]]}),
    (
        ValueError,
        r"reset: got shape \(2, 4\).*\(T, N\) = \(4, 2\)",
        {"reset": torch.ones(2, 4).bool()},
    ),
    (ValueError, r"reset: got a tensor on meta", {"reset": torch.ones(4, 2).bool().to("meta")}),
]


@pytest.mark.parametrize(("kind", "message", "change"), BAD, ids=lambda v: None)
def test_bad_arguments(kind: type[Exception], message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input": X, "hx": H0, "flat_weights": GRU_W} | change
    with pytest.raises(kind, match=message):
        functional.gru(**arguments)


PACKED = pack_padded_sequence(X, [4, 2])
BAD_PACKED = [
    (ValueError, r"lengths: got it together with a PackedSequence", {"lengths": [4, 2]}),
    (
        ValueError,
        r"reset: got it together with a PackedSequence",
        {"reset": torch.ones(4, 2).bool()},
    ),
    (ValueError, r"batch_sizes: got torch.float32", {"batch_sizes": torch.ones(4)}),
    (
        ValueError,
        r"they add up to 5, but the packed data have 6",
        {"batch_sizes": torch.tensor([2, 2, 1])},
    ),
    (TypeError, r"batch_sizes: got list, expected a tensor", {"batch_sizes": [2, 2, 2]}),
    (ValueError, r"batch_sizes: they increase", {"batch_sizes": torch.tensor([2, 1, 2, 1])}),
    (ValueError, r"batch_sizes: the last is 0", {"batch_sizes": torch.tensor([2, 2, 2, 0])}),
    (RuntimeError, r"input must have 2 dimensions", {"input": X}),
]


@pytest.mark.parametrize(("kind", "message", "change"), BAD_PACKED, ids=lambda v: None)
def test_bad_packed(kind: type[Exception], message: str, change: dict[str, Any]) -> None:
    data, batch_sizes = PACKED.data, PACKED.batch_sizes
    good = {"input": data, "hx": H0, "flat_weights": GRU_W, "batch_sizes": batch_sizes}
    with pytest.raises(kind, match=message):
        functional.gru(**good | change)


def test_other_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"hx: got Tensor, expected a pair"):
        functional.lstm(X, H0, LSTM_W)
    with pytest.raises(TypeError, match=r"hx: got NoneType, expected a tensor"):
        functional.gru_cell(X[0], None, *GRU_W)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 5\)"):
        functional.lstm(X, (H0, torch.zeros(1, 2, 4)), LSTM_W)
    with pytest.raises(ValueError, match=r"nonlinearity: got 'sine'"):
        functional.rnn(X, None, LSTM_W, nonlinearity="sine")
    with pytest.raises(ValueError, match=r"b_ih, b_hh: got one"):
        functional.gru_cell(X[0], H0[0], *GRU_W[:3])
    with pytest.raises(RuntimeError, match=r"no backend can serve.*floating-point"):
        functional.gru(X.long(), H0.long(), [w.long() for w in GRU_W])
