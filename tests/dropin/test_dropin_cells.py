"""LSTMCell, GRUCell and RNNCell against torch.nn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    assert_alike,
    assert_same_bits,
    compare,
    gradients,
    leaf,
    loss_of,
    outcome,
    raised,
    results,
    tensors,
    twins,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))


def random_cell_state(kind: Kind, *shape: int) -> Any:
    hidden = torch.randn(shape)
    return (hidden, torch.randn(shape)) if kind.has_cell_state else hidden


SAME_TEXT: list[tuple[tuple, dict[str, Any]]] = [
    ((-1, 4), {}),
    ((3, -1), {}),
    ((3, 4), {"dtype": torch.int32}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4.5), {}),
]
SAME_TYPE: list[tuple[tuple, dict[str, Any]]] = [
    ((), {}),
    ((3,), {}),
    ((3, 4), {"no_such_argument": 1}),
    ((3, 4), {"num_layers": 2}),
]


@pytest.mark.parametrize(("args", "options"), SAME_TEXT)
def test_bad_argument_raises_what_torch_raises(cell: Kind, args: tuple, options: dict) -> None:
    assert raised(lambda: cell.ours(*args, **options)) == raised(
        lambda: cell.theirs(*args, **options)
    )


@pytest.mark.parametrize(("args", "options"), SAME_TYPE)
def test_bad_call_raises_the_same_type(cell: Kind, args: tuple, options: dict) -> None:
    ours = raised(lambda: cell.ours(*args, **options))
    assert ours[0] is raised(lambda: cell.theirs(*args, **options))[0]


def test_unknown_nonlinearity() -> None:
    """torch.nn finds out at the call, not in the constructor."""
    kind = Kind("rnn_cell", "RNNCell", {"nonlinearity": "sigmoid"})
    ours, theirs = twins(kind, 5, 7)
    assert raised(lambda: ours(X)) == raised(lambda: theirs(X))


@pytest.mark.parametrize("bias", [True, False])
def test_attributes_and_parameters(cell: Kind, bias: bool) -> None:
    built, rng = [], []
    for build in (cell.ours, cell.theirs):
        torch.manual_seed(5)
        built.append(build(5, 7, bias))
        rng.append(torch.get_rng_state())
    ours, theirs = built
    for name in theirs.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert set(theirs.__constants__) <= set(ours.__constants__)
    assert isinstance(ours, nn.RNNCellBase)
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(*rng)
    assert repr(ours) == repr(theirs)
    if not bias:
        assert ours.bias_ih is ours.bias_hh is None
        assert "bias_ih" in ours._parameters


def test_dtype_and_device_arguments(cell: Kind) -> None:
    module = cell.ours(5, 7, True, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
    positional = ("relu", "meta") if cell.name == "RNNCell" else ("meta",)
    module = Kind(cell.id, cell.name).ours(5, 7, True, *positional)
    assert all(p.is_meta for p in module.parameters())
    assert getattr(module, "nonlinearity", "relu") == "relu"


def test_strict_load_and_reset(cell: Kind) -> None:
    ours, theirs = cell.ours(5, 7), cell.theirs(5, 7)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in (ours, theirs):
        torch.manual_seed(3)
        module.reset_parameters()
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for state in ({}, cell.theirs(5, 8).state_dict(), cell.theirs(5, 7, False).state_dict()):
        assert raised(ours.load_state_dict, state) == raised(theirs.load_state_dict, state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rows", [(3,), (1,), (17,), (0,), ()], ids=str)
def test_values_and_gradients(cell: Kind, rows: tuple, dtype: torch.dtype, bias: bool) -> None:
    ours, theirs = twins(cell, 5, 7, bias=bias, dtype=dtype)
    for hx in (None, random_cell_state(cell, *rows, 7)):
        compare(ours, theirs, results, torch.randn(*rows, 5), hx)
        compare(ours, theirs, outcome, torch.randn(*rows, 5), hx)


@pytest.mark.parametrize("sizes", [(1, 1), (17, 33), (64, 32)])
def test_sizes(cell: Kind, sizes: tuple[int, int]) -> None:
    ours, theirs = twins(cell, *sizes)
    hx = random_cell_state(cell, 3, sizes[1])
    compare(ours, theirs, outcome, torch.randn(3, sizes[0]), hx)


def test_hidden_size_zero(cell: Kind) -> None:
    ours, theirs = cell.ours(5, 0), cell.theirs(5, 0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(tensors(ours(X)), tensors(theirs(X)), strict=True):
        assert mine.shape == other.shape == (3, 0)


def test_result_types(cell: Kind) -> None:
    for module in twins(cell, 5, 7):
        assert type(module(X)) is (tuple if cell.has_cell_state else Tensor)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_arguments_in_any_layout(cell: Kind, layout: str) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        return t[:1].expand_as(t) if layout == "expanded" else t.repeat(1, 2)[:, ::2]

    ours, theirs = twins(cell, 5, 7)
    hx = tuple(laid_out(t) for t in tensors(random_cell_state(cell, 3, 7)))
    compare(ours, theirs, outcome, laid_out(X), hx if cell.has_cell_state else hx[0])


def test_arguments_are_not_written_to(cell: Kind) -> None:
    ours, _ = twins(cell, 5, 7)
    arguments = [X.clone(), *tensors(random_cell_state(cell, 3, 7))]
    before = [t.clone() for t in arguments]
    outcome(ours, arguments[0], tuple(arguments[1:]) if cell.has_cell_state else arguments[1])
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


Arguments = Callable[[Kind], tuple]


def each(kind: Kind, change: Callable[[Tensor], Tensor]) -> Any:
    hx = random_cell_state(kind, 3, 7)
    return tuple(change(t) for t in hx) if kind.has_cell_state else change(hx)


SAME_ERROR: dict[str, Arguments] = {
    "input_3d": lambda k: (torch.randn(2, 3, 5),),
    "input_0d": lambda k: (torch.randn(()),),
    "features": lambda k: (torch.randn(3, 6),),
    "features_unbatched": lambda k: (torch.randn(6),),
    "hx_4d": lambda k: (X, each(k, lambda t: t[None, None])),
    "hx_3d": lambda k: (X, each(k, lambda t: t[None])),
    "hx_0d": lambda k: (X, each(k, lambda t: t[0, 0])),
    "hx_hidden": lambda k: (X, each(k, lambda t: t[:, 1:])),
    "hx_batch": lambda k: (X, each(k, lambda t: t[1:])),
    "hx_hidden_unbatched": lambda k: (X[0], each(k, lambda t: t[0, 1:])),
    "hx_2d_unbatched": lambda k: (X[0], each(k, lambda t: t)),
    "hx_2d_unbatched_one_row": lambda k: (X[0], each(k, lambda t: t[:1])),
    "hx_1d_batched": lambda k: (X, each(k, lambda t: t[0])),
    "hx_1d_batched_of_n": lambda k: (X, each(k, lambda t: t[:, 0])),
}
REFUSED: dict[str, Arguments] = {
    "double_input": lambda k: (X.double(),),
    "integer_input": lambda k: (X.long(),),
    "double_hx": lambda k: (X, each(k, lambda t: t.double())),
    "meta_input": lambda k: (X.to("meta"), each(k, lambda t: t.to("meta"))),
    "meta_hx": lambda k: (X, each(k, lambda t: t.to("meta"))),
}


@pytest.mark.parametrize("arguments", SAME_ERROR.values(), ids=SAME_ERROR.keys())
def test_same_error(cell: Kind, arguments: Arguments) -> None:
    ours, theirs = twins(cell, 5, 7)
    before = outcome(ours, X)
    assert raised(lambda: ours(*arguments(cell))) == raised(lambda: theirs(*arguments(cell)))
    assert_same_bits(outcome(ours, X), before)


def test_same_error_of_one_state() -> None:
    """LSTMCell names which of the two states is wrong."""
    ours, theirs = twins(Kind("lstm_cell", "LSTMCell"), 5, 7)
    good, bad = torch.zeros(3, 7), (torch.zeros(1, 1, 3, 7), torch.zeros(3, 6), torch.zeros(2, 7))
    for wrong in bad:
        for hx in ((wrong, good), (good, wrong)):
            assert raised(ours, X, hx) == raised(theirs, X, hx)


def test_same_error_of_what_is_no_pair() -> None:
    ours, theirs = twins(Kind("lstm_cell", "LSTMCell"), 5, 7)
    h = torch.zeros(3, 7)
    for hx in ((h, h, h), [h, h, h], (h,), (), h, torch.stack([h, h])):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert raised(ours, X, hx) == raised(theirs, X, hx)
    for hx in ((h[0],), (), 3):
        assert raised(ours, X[0], hx) == raised(theirs, X[0], hx)


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED.keys())
def test_refused(cell: Kind, arguments: Arguments) -> None:
    """torch.nn's text comes from deep inside its kernels: only the kind of error is compared."""
    for module in twins(cell, 5, 7):
        before = outcome(module, X)
        assert issubclass(
            raised(module, *arguments(cell))[0], (RuntimeError, ValueError, TypeError)
        )
        assert_same_bits(outcome(module, X), before)


def test_loop_over_a_sequence(cell: Kind) -> None:
    """State carried through six calls, gradients through all of them."""

    def run(module: Any, x: Tensor) -> dict[str, Tensor]:
        x = leaf(x, next(module.parameters()).dtype)
        module.zero_grad()
        state = None
        outputs = []
        for step in x:
            state = module(step, state)
            outputs.append(tensors(state)[0])
        loss_of(outputs).backward()
        return {"last": outputs[-1].detach(), **gradients(module, x)}

    compare(*twins(cell, 5, 7), run, torch.randn(6, 3, 5))


def test_gradcheck(cell: Kind) -> None:
    ours, _ = twins(cell, 3, 4, dtype=torch.float64)
    names = [n for n, _ in ours.named_parameters()]
    states = tensors(leaf(random_cell_state(cell, 2, 4), torch.float64))

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = rest[: len(states)] if cell.has_cell_state else rest[0]
        weights = dict(zip(names, rest[len(states) :], strict=True))
        return tuple(tensors(functional_call(ours, weights, (x, hx))))

    arguments = (torch.randn(2, 3).double().requires_grad_(), *states, *ours.parameters())
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


def test_changed_weights_are_seen(cell: Kind) -> None:
    ours, theirs = twins(cell, 5, 7)
    results(ours, X)
    for module in (ours, theirs):
        module.weight_hh.data.mul_(2)
        with torch.no_grad():
            module.bias_ih.add_(1)
        module.weight_ih = nn.Parameter(module.weight_ih.detach() * 3)
    compare(ours, theirs, results, X)
    compare(ours, theirs, outcome, X)


def test_frozen_weights(cell: Kind) -> None:
    ours, theirs = twins(cell, 5, 7)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        for module in (ours, theirs):
            module.requires_grad_(True)
            getattr(module, name).requires_grad_(False)
        compare(ours, theirs, outcome, X, random_cell_state(cell, 3, 7))


def test_normed_pruned_and_tied_weights(cell: Kind) -> None:
    ours, theirs = twins(cell, 7, 7)
    wide = copy.deepcopy(theirs).double()
    x = torch.randn(3, 7)
    for module in (ours, theirs, wide):
        nn.utils.weight_norm(module, "weight_hh")
        prune.l1_unstructured(module, "weight_ih", amount=0.5)
        module.bias_hh = module.bias_ih
    assert_alike(outcome(ours, x), outcome(wide, x), outcome(theirs, x))


def test_copies(cell: Kind) -> None:
    ours, _ = twins(cell, 5, 7)
    before = outcome(ours, X)
    for twin in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert_same_bits(outcome(twin, X), before)


def test_replica_for_data_parallel(cell: Kind) -> None:
    ours, theirs = twins(cell, 5, 7)

    def run(module: Any, x: Tensor) -> dict[str, Tensor]:
        replica = module._replicate_for_data_parallel()
        for name, p in module.named_parameters():
            setattr(replica, name, p * 1)
        module.zero_grad()
        outputs = tensors(replica(x.to(module.weight_ih.dtype)))
        loss_of(outputs).backward()
        return {"out": outputs[0].detach(), **gradients(module)}

    compare(ours, theirs, run, X)


def test_conversions(cell: Kind) -> None:
    ours, theirs = twins(cell, 5, 7)
    x = (X * 8).round() / 8
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        compare(ours.to(dtype), theirs.to(dtype), results, x)
    compare(ours.bfloat16(), theirs.bfloat16(), outcome, x)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_meta(cell: Kind, grad: bool) -> None:
    for build in (cell.ours, cell.theirs):
        with torch.set_grad_enabled(grad):
            outputs = tensors(build(5, 7, device="meta")(X.to("meta")))
        assert all(t.is_meta and t.shape == (3, 7) for t in outputs)


def test_autocast(cell: Kind) -> None:
    dtypes = []
    for module in twins(cell, 5, 7):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = tensors(module(X))
        loss_of([t.float() for t in outputs]).backward()
        dtypes.append([t.dtype for t in outputs])
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert dtypes[0] == dtypes[1]


def test_hooks(cell: Kind) -> None:
    ours, theirs = twins(cell, 5, 7)
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        module.register_full_backward_hook(lambda m, into, out: (into[0] * 3, *into[1:]))
    compare(ours, theirs, outcome, X)
