"""Backward passes beyond the plain one: partial, repeated, in eval, checkpointed, second order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    assert_same_bits,
    compare,
    gradients,
    leaf,
    loss_of,
    outcome,
    raised,
    random_state,
    tensors,
    twins,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def stacked(kind: Kind, **options: Any) -> tuple[Any, Any]:
    return twins(kind, 5, 7, num_layers=2, bidirectional=True, **options)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_unused_outputs(any_kind: Kind, used: tuple[int, ...]) -> None:
    if max(used) == 2 and not any_kind.has_cell_state:
        used = (0, 1)

    def run(module: Any, x: Tensor, hx: Any) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        x, hx = leaf(x, dtype), leaf(hx, dtype)
        module.zero_grad()
        outputs = tensors(module(x, hx))
        loss_of([outputs[i] for i in used]).backward()
        return gradients(module, x, hx)

    ours, theirs = stacked(any_kind)
    compare(ours, theirs, run, torch.randn(4, 3, 5), random_state(ours, 3))


def test_part_of_an_output(any_kind: Kind) -> None:
    """A loss on the last step or on one expanded, non-contiguous slice only."""

    def run(module: Any, x: Tensor, pick: Any) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        x = leaf(x, dtype)
        module.zero_grad()
        module(x)[0][pick].sum().backward()
        return gradients(module, x)

    ours, theirs = stacked(any_kind)
    for pick in (-1, (slice(None), 1), (0, 0, 0), (slice(1, 4, 2), slice(None), slice(0, None, 3))):
        compare(ours, theirs, run, torch.randn(5, 3, 5), pick)


def test_inputs_that_need_no_gradient(any_kind: Kind) -> None:
    """Every subset of input, hx and weights that asks for gradients."""

    def run(module: Any, x: Tensor, hx: Any, wanted: tuple[bool, bool, bool]) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        x, hx = leaf(x, dtype).requires_grad_(wanted[0]), leaf(hx, dtype)
        for t in tensors(hx):
            t.requires_grad_(wanted[1])
        module.zero_grad()
        module.requires_grad_(wanted[2])
        outputs = tensors(module(x, hx))
        assert all(out.requires_grad == any(wanted) for out in outputs)
        if any(wanted):
            loss_of(outputs).backward()
        return {"output": outputs[0].detach(), **gradients(module, x, hx)}

    ours, theirs = stacked(any_kind)
    for wanted in itertools.product([False, True], repeat=3):
        compare(ours, theirs, run, torch.randn(4, 3, 5), random_state(ours, 3), wanted)


def test_one_of_two_states_needs_gradient() -> None:
    def run(module: Any, x: Tensor, hx: Any, which: int) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        hx = leaf(hx, dtype)
        hx[1 - which].requires_grad_(False)
        module.zero_grad()
        loss_of(tensors(module(x.to(dtype), hx))).backward()
        return gradients(module, None, hx)

    ours, theirs = stacked(Kind("lstm", "LSTM"))
    for which in (0, 1):
        compare(ours, theirs, run, torch.randn(4, 3, 5), random_state(ours, 3), which)


def test_backward_in_eval(any_kind: Kind) -> None:
    ours, theirs = stacked(any_kind, dropout=0.5)
    compare(ours.eval(), theirs.eval(), outcome, torch.randn(4, 3, 5), random_state(ours, 3))


def test_retain_graph_twice(any_kind: Kind) -> None:
    """The second backward pass over a kept graph adds the same gradient again."""
    ours, _ = stacked(any_kind)
    loss = loss_of(tensors(ours(torch.randn(4, 3, 5))))
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in ours.named_parameters()}
    loss.backward()
    assert_same_bits(
        {n: 2 * g for n, g in once.items()}, {n: p.grad for n, p in ours.named_parameters()}
    )


def test_second_backward_without_the_graph(any_kind: Kind) -> None:
    texts = []
    for module in stacked(any_kind):
        loss = loss_of(tensors(module(torch.randn(4, 3, 5))))
        loss.backward()
        texts.append(raised(loss.backward))
    assert texts[0][0] is texts[1][0] is RuntimeError
    assert "Trying to backward through the graph a second time" in texts[0][1]


def test_two_losses_over_one_graph(any_kind: Kind) -> None:
    """Gradients of two losses taken apart sum to those of their sum."""
    ours, _ = twins(any_kind, 5, 7, dtype=torch.float64)
    output, state = ours(torch.randn(4, 3, 5, dtype=torch.float64))
    losses = [output.sum(), tensors(state)[0].square().sum()]
    weights = list(ours.parameters())
    apart = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    for a, b, whole in zip(*apart, torch.autograd.grad(sum(losses), weights), strict=True):
        torch.testing.assert_close(a + b, whole)


def test_gradients_accumulate(any_kind: Kind) -> None:
    ours, _ = stacked(any_kind)
    x = torch.randn(4, 3, 5)
    once = outcome(ours, x)
    loss_of(tensors(ours(leaf(x, torch.float32)))).backward()
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, 2 * once[f"d{name}"])


def test_graph_is_kept_across_calls(any_kind: Kind) -> None:
    """The state of one call feeds the next, the loss reaches back through both."""

    def run(module: Any, x: Tensor) -> dict[str, Tensor]:
        x = leaf(x, next(module.parameters()).dtype)
        module.zero_grad()
        _, state = module(x[:3])
        loss_of(tensors(module(x[3:], state))).backward()
        return gradients(module, x)

    compare(*twins(any_kind, 5, 7, num_layers=2), run, torch.randn(7, 3, 5))


@pytest.mark.parametrize("what", ["weight", "input", "state", "output"])
def test_value_changed_before_backward_is_noticed(any_kind: Kind, what: str) -> None:
    """Writing into what backward needs is an error, as in torch.nn, not a wrong gradient."""
    kinds = []
    for module in twins(any_kind, 5, 7):
        x, hx = torch.randn(4, 3, 5), random_state(module, 3)
        outputs = tensors(module(x, hx))
        loss = outputs[0].square().sum()
        changed = {
            "weight": module.weight_hh_l0,
            "input": x,
            "state": tensors(hx)[0],
            "output": outputs[0],
        }
        with torch.no_grad():
            changed[what].add_(1)
        kinds.append(raised(loss.backward))
    assert kinds[0][0] is kinds[1][0] is RuntimeError
    assert "modified by an inplace operation" in kinds[0][1]


@pytest.mark.parametrize("reentrant", [False, True], ids=["functional", "reentrant"])
def test_activation_checkpoint(any_kind: Kind, reentrant: bool) -> None:
    """Checkpointed, with dropout drawn again from the saved generator state: the same bits."""
    ours, _ = stacked(any_kind, dropout=0.5)
    x, hx = torch.randn(4, 3, 5), tensors(random_state(ours, 3))

    def run(wrapped: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        leaves, state = leaf(x, torch.float32), leaf(hx, torch.float32)
        ours.zero_grad()

        def call(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensors(ours(x, hx if len(hx) > 1 else hx[0])))

        outputs = (
            checkpoint(call, leaves, *state, use_reentrant=reentrant)
            if wrapped
            else call(leaves, *state)
        )
        loss_of(list(outputs)).backward()
        return gradients(ours, leaves, state)

    assert_same_bits(run(True), run(False))


def test_gradcheck(any_kind: Kind) -> None:
    """First and second order, in random directions (fast_mode) over all arguments at once."""
    ours, _ = twins(any_kind, 2, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, hx = (
        torch.randn(3, 2, 2).double().requires_grad_(),
        leaf(random_state(ours, 2), torch.float64),
    )
    names = [n for n, _ in ours.named_parameters()]

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(tensors(hx))], rest[len(tensors(hx)) :]
        state = states if any_kind.has_cell_state else states[0]
        returned = torch.func.functional_call(
            ours, dict(zip(names, weights, strict=True)), (x, state)
        )
        return tuple(tensors(returned))

    arguments = (x, *tensors(hx), *ours.parameters())
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


def gradient_penalty(module: Any, x: Tensor, hx: Any) -> dict[str, Tensor]:
    """Gradients of the squared gradient of the output, as in WGAN-GP."""
    dtype = next(module.parameters()).dtype
    x, hx = leaf(x, dtype), leaf(hx, dtype)
    module.zero_grad()
    first = torch.autograd.grad(
        loss_of(tensors(module(x, hx))), [x, *tensors(hx)], create_graph=True
    )
    sum(g.square().sum() for g in first).backward()
    return {"first": first[0].detach(), **gradients(module, x, hx)}


def test_double_backward_float64(any_kind: Kind) -> None:
    ours, theirs = stacked(any_kind, dtype=torch.float64)
    compare(ours, theirs, gradient_penalty, torch.randn(4, 3, 5), random_state(ours, 3))


def test_double_backward_of_an_empty_batch(any_kind: Kind) -> None:
    """Zeros, not None."""
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, dtype=torch.float64)
    found = [gradient_penalty(m, torch.randn(4, 0, 5), random_state(m, 0)) for m in (ours, theirs)]
    assert_same_bits(*({k: v.abs() for k, v in each.items()} for each in found))
    assert len(found[0]) > len(list(ours.parameters()))


def test_anomaly_mode(any_kind: Kind) -> None:
    ours, theirs = stacked(any_kind)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        compare(ours, theirs, outcome, torch.randn(4, 3, 5))


def test_nan_travels_like_in_torch(any_kind: Kind) -> None:
    """A NaN at one step of one sequence spoils that sequence from there on and nothing else."""
    x = torch.randn(6, 3, 5)
    x[2, 1, 0] = float("nan")
    masks = []
    for module in twins(any_kind, 5, 7):
        with torch.no_grad():
            output, state = module(x)
        masks.append([output.isnan(), *(t.isnan() for t in tensors(state))])
    for mine, other in zip(*masks, strict=True):
        assert torch.equal(mine, other)


def test_infinite_and_huge_inputs(any_kind: Kind) -> None:
    """Saturated gates give torch's finite numbers, infinities included."""
    if any_kind.options.get("nonlinearity") == "relu":
        return
    for value in (1e4, -1e4, 1e30, float("inf")):
        ours, theirs = twins(any_kind, 5, 7)
        with torch.no_grad():
            for module in (ours, theirs):
                for p in module.parameters():
                    p.abs_().add_(0.1)
            x = torch.full((4, 2, 5), value)
            for mine, other in zip(tensors(ours(x)), tensors(theirs(x)), strict=True):
                torch.testing.assert_close(mine, other)
