"""What a user does between two calls, and what a call before leaves behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import CELLS, KINDS, Kind, compare, outcome, raised, random_state, results, twins

from tests.versions import OLD

# An LSTM's hx of which a half is missing is an error in every call, not zeros from the second on.
HALVES: list[Callable[[Any], Any]] = [lambda hx: (None, hx[1]), lambda hx: (None, None)]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("half", HALVES, ids=["c", "neither"])
def test_half_a_state_is_refused_in_every_call(half: Callable[[Any], Any], grad: bool) -> None:
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    x, hx = torch.randn(4, 3, 5), random_state(ours, 3)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            for call, given in ((ours, x), (ours.step, x[0])):
                error, text = raised(call, given, half(hx))
                assert error is TypeError
                assert "(h_0, c_0)" in text
            ours(x, hx)
            ours(x)


WRONG = [torch.int64, torch.bool, torch.complex64, torch.float64]


@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_wrong_dtype_is_the_same_error_in_every_call(kind: Kind, dtype: torch.dtype) -> None:
    ours, theirs = twins(kind, 5, 7)
    x = torch.ones(4, 3, 5, dtype=dtype)
    expected = raised(theirs, x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = [raised(ours, x) for _ in range(3)] + [raised(ours.step, x[0])]
        assert len(set(found)) == 1
        assert found[0] == expected or (OLD and found[0][0] is expected[0])


@pytest.mark.parametrize("kind", [*KINDS[2:], *CELLS[2:]], ids=lambda kind: kind.id)
def test_a_weight_transposed_through_data_is_seen(kind: Kind) -> None:
    """Neither address nor version changes, nor do the words in memory."""
    ours, theirs = twins(kind, 6, 6)
    x = torch.randn(3, 6) if kind in CELLS else torch.randn(4, 3, 6)
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    hx = torch.randn(3, 6) if kind in CELLS else None
    for _ in range(3):
        results(ours, x, hx)
    for module in (ours, theirs):
        getattr(module, name).data = getattr(module, name).data.t()
    compare(ours, theirs, results, x, hx)
    compare(ours, theirs, outcome, x, hx)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS], ids=lambda kind: kind.id)
def test_a_fused_step_that_changes_one_element_is_seen(kind: Kind) -> None:
    """Fused optimisers move no version counter, and sampled words may stay what they were."""
    ours, theirs = twins(kind, 16, 8)
    x = torch.randn(3, 16) if kind in CELLS else torch.randn(4, 3, 16)
    optimiser = torch.optim.SGD(ours.parameters(), 10.0, fused=True)
    for _ in range(2):
        for _ in range(3):
            results(ours, x)
        outcome(ours, x)
        for p in ours.parameters():
            assert p.grad is not None
            p.grad.zero_()
        next(ours.parameters()).grad[3, 7] = 1.0  # type: ignore[index]
        optimiser.step()
        theirs.load_state_dict(ours.state_dict())
        compare(ours, theirs, results, x)


def test_a_refused_layout_leaves_nothing_behind() -> None:
    """A layer's buffers of a shape once came from the first input of it."""
    x = torch.randn(6, 3, 5)
    others = [x.to_sparse()]
    if torch.backends.mkldnn.is_available():
        others.append(x.to_mkldnn())
    for other in others:
        for grad in (True, False):
            ours, theirs = twins(KINDS[1], 5, 9)
            with torch.set_grad_enabled(grad):
                for _ in range(3):
                    error, text = raised(ours, other)
                    assert issubclass(error, RuntimeError)
                    assert "layout" in text
            compare(ours, theirs, outcome, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.id)
def test_a_nested_tensor_is_refused_with_the_way_out(
    kind: Kind, grad: bool, layout: torch.layout
) -> None:
    ours = kind.ours(5, 9, batch_first=True)
    parts = [torch.randn(6, 5), torch.randn(4, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    with torch.set_grad_enabled(grad):
        for _ in range(3):  # also once a call of its number of dimensions is prepared
            error, text = raised(ours, nested)
            assert issubclass(error, RuntimeError)
            assert "torch.nested.to_padded_tensor" in text
            found, _ = ours(padded, lengths=[6, 4])
            torch.testing.assert_close(found[1, :4], ours(parts[1])[0])
            ours(padded)


def bad_call(module: Any, x: torch.Tensor) -> Any:
    try:
        module(x.long())
    except Exception as error:
        return type(error)
    return None


ACTIONS = ("grad", "grad", "no_grad", "no_grad", "inference", "step", "write", "transpose", "flip",
           "freeze", "copy", "load", "bad", "batch", "convert")  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_of_a_user(seed: int) -> None:
    """Random actions in turn; after each the two modules agree."""
    pick = random.Random(seed)
    kind = pick.choice(KINDS)
    layers = pick.choice([1, 1, 2])
    both = list(twins(kind, 7, 7, num_layers=layers, bidirectional=pick.random() < 0.3))
    batch = 3
    for _ in range(25):
        action = pick.choice(ACTIONS)
        ours, theirs = both
        first = theirs.batch_first
        x = torch.randn(*((batch, 4) if first else (4, batch)), 7)
        hx = random_state(theirs, batch) if pick.random() < 0.5 else None
        if action == "grad" and any(p.requires_grad for p in ours.parameters()):
            compare(ours, theirs, outcome, x, hx)
        elif action in ("no_grad", "inference"):
            with torch.inference_mode(action == "inference"):
                for _ in range(pick.choice([1, 3])):
                    compare(ours, theirs, results, x, hx)
        elif action == "bad":
            found = [bad_call(module, x) for module in both]
            assert found[0] is found[1] is not None
        elif action == "batch":
            batch = pick.choice([0, 1, 3, 5])
        name, change = pick.choice(ours._flat_weights_names), pick.choice([0.5, -1.0])
        fused = pick.random() < 0.5
        for i, module in enumerate(both):
            weight = getattr(module, name)
            if action == "step" and weight.grad is not None:
                if i == 1:
                    weight.grad.copy_(getattr(ours, name).grad)
                torch.optim.SGD([weight], 0.1, fused=fused).step()
            elif action == "write":
                with torch.no_grad():
                    weight.mul_(change)
            elif action == "transpose" and weight.dim() == 2 and weight.size(0) == weight.size(1):
                weight.data = weight.data.t()
            elif action == "flip":
                module.batch_first = not first
            elif action == "freeze":
                weight.requires_grad_(change > 0)
            elif action == "copy":
                both[i] = copy.deepcopy(module)
            elif action == "load":
                module.load_state_dict({k: v * 0.9 for k, v in module.state_dict().items()})
            elif action == "convert":
                module.double().float()


@pytest.mark.parametrize("kind", [KINDS[0], CELLS[1]], ids=lambda kind: kind.id)
def test_a_layer_alone_is_no_leaf_of_a_symbolic_trace(kind: Kind) -> None:
    """torch.fx asks whether a module is a leaf only of those inside the traced one."""
    ours, _ = twins(kind, 5, 7)
    with pytest.raises(TypeError, match="input should be"):
        torch.fx.symbolic_trace(ours)
