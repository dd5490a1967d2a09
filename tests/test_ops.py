"""The operators as torch sees them: schemas, fakes, registration. Numbers: test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import ops
from fastrnn.noise import Noise
from tests.problems import (
    CELLS,
    Case,
    Problem,
    backward,
    backward_args,
    forward,
    forward_train,
    train_args,
)
from tests.tolerances import assert_same_bits

CASES = [
    *(Case(cell) for cell in CELLS),
    *(Case(cell, torch.bfloat16, directions=2) for cell in CELLS),
    *(Case(cell, torch.float64, layout="packed") for cell in CELLS),
    *(Case(cell, layout="batch", directions=2, lengths=True, reset=True) for cell in CELLS),
    *(Case(cell, N=1, T=1, bias=False, recompute=True) for cell in CELLS),
    Case("lstm", proj=3, directions=2),
    Case("lstm", proj=3, layout="batch", recompute=True),
    Case("lstm", torch.bfloat16, upstream=("cells",)),  # float32, the others are not
    *(Case(cell, noise=Noise(1, True, zoneout_h=0.2)) for cell in CELLS),
    Case("lstm", directions=2, noise=Noise(0, False, "cell", drop=0.3, zoneout_c=0.2)),
    Case("gru", layout="batch", noise=Noise(2, True, "update", sequence=True, drop=0.3)),
    Case("rnn_relu", layout="packed", noise=Noise(0, False, zoneout_h=0.2)),
]
IDS = [str(case) for case in CASES]


def forward_args(p: Problem) -> tuple:
    c = p.case
    return (
        p.x, p.h0, p.c0, p.weights, None, p.batch_sizes, p.op_lengths, p.reset, c.cell,
        c.layout == "batch", c.is_lstm, "", *p.noise,
    )  # fmt: skip


DRAWN = Case(
    "lstm", proj=3, recompute=True, noise=Noise(1, True, "update", drop=0.3, zoneout_h=0.2)
)


# opcheck takes seconds a case: each cell once, every layout and optional argument among them.
@pytest.mark.parametrize("case", [*CASES[0:15:6], *CASES[15:19], CASES[25], DRAWN], ids=str)
def test_opcheck(case: Case) -> None:
    p = Problem(case)
    # NaN in the padding would make opcheck's own comparison of two equal runs fail.
    p.x = p.x.nan_to_num()
    # So would what is opaque, padding and all: the tape of a ragged batch and packed weights.
    described = ("test_schema", "test_autograd_registration", "test_faketensor")
    everything = (*described, "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.layer_forward, forward_args(p), test_utils=everything)
    utils = described if case.lengths else everything
    torch.library.opcheck(ops.layer_forward_train, train_args(p), test_utils=utils)
    back = (*backward_args(p), *p.noise)
    torch.library.opcheck(ops.layer_backward, back, test_utils=everything)
    torch.library.opcheck(ops.pack_weights, (p.weights, case.cell, ""), test_utils=described)


def test_opcheck_of_masks() -> None:
    for shape in ((4, 3, 5), (1, 3, 70), (0, 0, 0)):
        arguments = (torch.tensor([5]), 3, 0.3, *shape)
        torch.library.opcheck(torch.ops.fastrnn.random_mask.default, arguments)


def assert_described(fake: Tensor, real: Tensor, name: str) -> None:
    assert fake.shape == real.shape, f"{name}: fake {fake.shape}, real {real.shape}"
    assert fake.stride() == real.stride(), f"{name}: fake {fake.stride()}, real {real.stride()}"
    assert fake.dtype == real.dtype, f"{name}: fake {fake.dtype}, real {real.dtype}"


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_fakes_describe_the_outputs(case: Case, needs: tuple[bool, bool, bool]) -> None:
    p = Problem(case)
    real = [ops.layer_forward(*forward_args(p)), ops.layer_forward_train(*train_args(p))]
    arguments = backward_args(p)
    arguments = (*arguments[:-4], *needs, "", *p.noise)
    *states, weights = ops.layer_backward(*arguments)
    real.append((*states, *weights))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [
            torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, each)
            for each in (forward_args(p), train_args(p), arguments)
        ]
        fake = [ops.layer_forward(*faked[0]), ops.layer_forward_train(*faked[1])]
        *states, weights = ops.layer_backward(*faked[2])
        fake.append((*states, *weights))
    for name, got, expected in zip(("forward", "train", "backward"), fake, real, strict=True):
        assert len(got) == len(expected)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_described(a, b, f"{name} output {i}")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_functional_and_repeatable(case: Case) -> None:
    """No input is written, the tape least of all, and the same call gives the same bits."""
    p = Problem(case)
    tape = forward_train(p)
    given = [*p.inputs(), *tape.values()]
    copies = [t.clone() for t in given]
    first, second = backward(p, tape), backward(p, tape)
    again = forward_train(p)
    inference = forward(p)
    for got, copy in zip(given, copies, strict=True):
        assert_same_bits("input", got, copy)
    for name in first:
        assert_same_bits(name, first[name], second[name])
    for name in ("y", "h_n", "c_n"):
        assert_same_bits(name, tape[name], again[name])
        assert inference[name].shape == tape[name].shape
    outputs = [t for t in (*again.values(), *first.values()) if t.numel()]
    storages = {t.untyped_storage().data_ptr() for t in (*given, *outputs) if t.numel()}
    assert len(storages) == len([t for t in (*given, *outputs) if t.numel()])


@pytest.mark.parametrize("cell", CELLS)
def test_meta_tensors(cell: str) -> None:
    p = Problem(Case(cell, directions=2))
    arguments = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), train_args(p))
    for got, expected in zip(
        ops.layer_forward_train(*arguments), ops.layer_forward_train(*train_args(p)), strict=True
    ):
        assert got.is_meta
        assert_described(got, expected, cell)


@pytest.mark.parametrize("records", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", ["layer", "rhn"])
def test_whoever_looks_on_sees_the_operators(kind: str, records: bool) -> None:
    """Eager calls may skip the dispatcher, but not under a profiler, a mode or a tracer."""
    module = fastrnn.GRU(3, 4) if kind == "layer" else fastrnn.RHN(3, 4, depth=2)
    x, name = torch.randn(5, 2, 3), f"fastrnn::{kind}_forward" + "_train" * records
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.set_grad_enabled(records):
        with Record():
            module(x)
        assert name in seen
        with torch.profiler.profile() as profile:
            module(x)
        assert name in {event.key for event in profile.key_averages()}
        graph = make_fx(lambda x: module(x)[0])(x)
        assert name.replace("::", ".") in graph.code
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert module(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


@pytest.mark.parametrize("records", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RHN", "BNLSTM"])
def test_lengths_without_values(kind: str, records: bool) -> None:
    """Those of fake tensors: shapes go through a model, and make_fx traces it."""
    options = {"max_length": 5} if kind == "BNLSTM" else {}
    module = getattr(fastrnn, kind)(3, 4, **options)
    lengths, reset = torch.tensor([5, 2]), torch.zeros(5, 2, dtype=torch.bool)

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        return module(x, lengths=lengths, reset=reset)[0]

    with torch.set_grad_enabled(records):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = [mode.from_tensor(lengths), [5, 2]]
            for each in given:
                y = call(mode.from_tensor(torch.randn(5, 2, 3)), each)
                assert y.shape == (5, 2, 4)
            if records:
                y.sum().backward()
                module.zero_grad()
        x = torch.randn(5, 2, 3)
        graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, lengths)
        assert "fastrnn" in graph.code
