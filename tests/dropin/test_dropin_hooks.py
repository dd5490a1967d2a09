"""Hooks on modules and parameters see what they see with torch.nn, in the same order."""

from __future__ import annotations

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
    random_state,
    tensors,
    twins,
)
from torch import Tensor, nn

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))


def shapes(value: Any) -> list[Any]:
    return [tuple(t.shape) if isinstance(t, Tensor) else t for t in value]


def test_forward_hooks_are_called_in_order(any_kind: Kind) -> None:
    logs = []
    for module in twins(any_kind, 6, 6, num_layers=2):
        log: list[Any] = []
        module.register_forward_pre_hook(
            lambda m, args, log=log: log.append(("pre", shapes(tensors(args))))
        )
        module.register_forward_pre_hook(
            lambda m, args, kwargs, log=log: log.append(("pre_kwargs", sorted(kwargs))),
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda m, args, out, log=log: log.append(("post", shapes(tensors(out))))
        )
        module(X, hx=random_state(module, 3))
        module(X)
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6


def test_pre_hook_replaces_the_input(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    compare(ours, theirs, outcome, X, random_state(ours, 3))


def test_hook_replaces_the_output(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    for module in (ours, theirs):
        module.register_forward_hook(lambda m, args, out: (out[0].relu(), out[1]))
    compare(ours, theirs, outcome, X)


def test_removed_hook_is_gone(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 6, 6)
    before = outcome(ours, X)
    ours.register_forward_hook(lambda m, args, out: (out[0] * 0, out[1])).remove()
    assert_same_bits(outcome(ours, X), before)


def test_global_hooks(any_kind: Kind) -> None:
    counts = []
    for module in twins(any_kind, 6, 6, num_layers=2, bidirectional=True):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, seen=seen: seen.append(type(m).__name__)
        )
        try:
            module(X)
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] == [any_kind.name]


def test_full_backward_hooks(any_kind: Kind) -> None:
    logs = []
    for module in twins(any_kind, 6, 6, num_layers=2):
        log: list[Any] = []
        module.register_full_backward_pre_hook(
            lambda m, out, log=log: log.append(("pre", shapes(out)))
        )
        module.register_full_backward_hook(
            lambda m, into, out, log=log: log.append(("post", shapes(into), shapes(out)))
        )
        outputs, _ = module(leaf(X, torch.float32))
        outputs.sum().backward()
        logs.append(log)
    assert logs[0] == logs[1]
    assert [entry[0] for entry in logs[0]] == ["pre", "post"]


def test_backward_hook_changes_the_gradient(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    for module in (ours, theirs):
        module.register_full_backward_hook(lambda m, into, out: (into[0] * 3, *into[1:]))
    compare(ours, theirs, outcome, X)


def test_parameter_hooks(any_kind: Kind) -> None:
    """register_hook scales the gradient; the accumulation hook fires once per weight and pass."""
    ours, theirs = twins(any_kind, 6, 6, num_layers=2)

    def run(module: Any) -> dict[str, Tensor]:
        fired: list[str] = []
        handles = [module.weight_hh_l0.register_hook(lambda g: g * 5)]
        for name, p in module.named_parameters():
            handles.append(
                p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
            )
        found = outcome(module, X)
        assert sorted(fired) == sorted(module._flat_weights_names)
        for handle in handles:
            handle.remove()
        return found

    compare(ours, theirs, run)


def test_output_and_saved_tensor_hooks(any_kind: Kind) -> None:
    """Saved tensors pass through user hooks (offloading): same gradients."""
    ours, theirs = twins(any_kind, 6, 6)

    def run(module: Any) -> dict[str, Tensor]:
        x = leaf(X, next(module.parameters()).dtype)
        module.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            outputs = tensors(module(x))
        outputs[0].register_hook(lambda g: g * 2)
        loss_of(outputs).backward()
        return gradients(module, x)

    compare(ours, theirs, run)


def test_state_dict_hooks(any_kind: Kind) -> None:
    keys = []
    for module in twins(any_kind, 6, 6):
        module.register_state_dict_post_hook(lambda m, state, prefix, meta: state.update(extra=1))
        module.register_load_state_dict_pre_hook(lambda m, state, *rest: state.pop("extra", None))
        state = module.state_dict()
        module.load_state_dict(state)
        keys.append(list(state))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("style", ["sequential", "subclass", "modulelist"])
def test_inside_other_modules(any_kind: Kind, style: str) -> None:
    """Names inside a larger model, apply(), and subclassing with super().forward()."""

    def build(library_class: Any) -> nn.Module:
        options = any_kind.options
        if style == "sequential":
            return nn.Sequential(nn.Linear(6, 6), library_class(6, 6, **options))
        if style == "modulelist":
            return nn.ModuleList([library_class(6, 6, **options)])

        class Scaled(library_class):
            def forward(self, input: Tensor, hx: Any = None) -> Any:
                output, state = super().forward(input, hx)
                return output * 2, state

        return Scaled(6, 6, **options)

    theirs = build(getattr(nn, any_kind.name))
    ours = build(type(any_kind.ours(2, 4)))
    ours.load_state_dict(theirs.state_dict())
    visited = []
    for model in (ours, theirs):
        names: list[str] = []
        model.apply(lambda m, names=names: names.append(type(m).__name__))
        visited.append((names, list(model.state_dict())))
    assert visited[0] == visited[1]
    if style != "modulelist":
        compare(ours, theirs, outcome, X)
