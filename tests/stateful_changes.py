"""A state machine of hypothesis whose rules are calls, and all that comes between them."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.quartet import H, draws, names, tensors
from tests.stateful_calls import BOOLS, Calls
from tests.tolerances import assert_same_bits


class Changes(Calls):
    """Calls, and all that comes between them."""

    # What changes the weights.

    @rule(index=st.integers(0, 15), how_much=st.sampled_from(["all", "one", "element", "element"]))
    def write(self, index: int, how_much: str) -> None:
        self.look()
        with torch.no_grad():
            every = how_much == "all"
            for p in list(self.q.ours.parameters()) if every else [self.weight(index)[1]]:
                if how_much == "element":
                    p[tuple(-min(n, 2) for n in p.shape)] = 0.5
                else:
                    p.mul_(-0.9)
        self.change()

    @rule(index=st.integers(0, 15), new_storage=BOOLS)
    def write_through_data(self, index: int, new_storage: bool) -> None:
        self.look()
        _, p = self.weight(index)
        if new_storage:
            p.data = p.data * -0.9
        else:
            p.data.mul_(-0.9)
        self.change(quiet=not new_storage)

    @rule(index=st.integers(0, 15))
    def write_one_element_and_say_so(self, index: int) -> None:
        self.look()
        self.weight(index)[1].data[..., -1].fill_(0.7)
        self.q.ours.flatten_parameters()
        self.change(quiet=True)

    @precondition(lambda self: self.whole)
    @rule(index=st.integers(0, 15), lazily=BOOLS, strided=BOOLS)
    def replace(self, index: int, lazily: bool, strided: bool) -> None:
        name, p = self.weight(index)

        def new(module: nn.Module) -> None:
            old = getattr(module, name)
            value = -0.9 * p.detach().to(old.dtype)
            if strided and value.dim() == 2:
                value = value.t().contiguous().t()
            value = torch._neg_view(value) if lazily else value
            setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))

        self.change(new)

    @precondition(lambda self: self.whole)
    @rule(assign=BOOLS)
    def load(self, assign: bool) -> None:
        def loaded(module: nn.Module) -> None:  # all of them: assigned weights are tied no more
            state = {
                n: 0.8 * v if v.is_floating_point() else v + 1
                for n, v in module.state_dict().items()
            }
            module.load_state_dict(state, assign=assign)

        self.change(loaded)
        if assign:
            self.change(nn.Module.zero_grad)

    @rule(kind=st.sampled_from(["SGD", "SGD fused", "Adam", "Adam foreach", "Adam fused"]))
    def optimise(self, kind: str) -> None:
        name, *how = kind.split()
        trained = [p for p in self.q.ours.parameters() if p.requires_grad]
        if not trained or any(p.is_neg() for p in trained):  # which fused ones do not take
            return
        options = dict.fromkeys(how, True)
        if self.optimiser is None or self.optimiser[0] != (kind, *map(id, trained)):
            made = getattr(torch.optim, name)(trained, 0.05, **options)
            self.optimiser = (kind, *map(id, trained)), made
        self.optimiser[1].step()
        self.change(quiet="fused" in how)

    @precondition(lambda self: self.whole)
    @rule(unit=st.integers(0, H - 1), freeze=BOOLS)
    def optimise_one_unit(self, unit: int, freeze: bool) -> None:
        """Few elements change, and no counter."""
        ours = self.q.ours
        trained = [p for p in ours.parameters() if p.requires_grad]
        trained = trained[:1] if freeze else trained
        if not trained or any(p.is_neg() for p in trained):
            return
        x, _ = self.arguments((1, 1), False, 0).given(self.q.dtype, (False, False))
        self.look()
        self.change(nn.Module.zero_grad)
        tensors(ours(x))[0][..., unit % self.out].sum().backward()
        torch.optim.SGD(trained, 1.0, fused=True).step()
        ours.zero_grad()
        self.change()

    @rule(set_to_none=BOOLS)
    def zero_grad(self, set_to_none: bool) -> None:
        for module in self.q.all:
            module.zero_grad(set_to_none)

    @precondition(lambda self: self.whole)
    @rule(fused=BOOLS)
    def train_another_that_shares(self, fused: bool) -> None:
        ours = self.q.ours
        other = copy.deepcopy(ours)
        for name, p in ours.named_parameters(remove_duplicate=False):
            setattr(other, name, p)
        trained = [p for p in ours.parameters() if p.requires_grad]
        if not trained or any(p.is_neg() for p in trained):
            return
        x, _ = self.arguments((3, 3), False, 0).given(self.q.dtype, (False, False))
        for module in self.q.all:
            module.zero_grad()
        tensors(other(x))[0].sum().backward()
        torch.optim.SGD(trained, 0.5, fused=fused).step()
        ours.zero_grad()
        self.change()

    @precondition(lambda self: self.whole and not self.q.is_cell and self.of_state > 1)
    @rule()
    def tie(self) -> None:
        first, *others = (n for n in names(self.q.ours) if n.startswith("weight_hh"))

        def tied(module: nn.Module) -> None:
            for name in others:
                setattr(module, name, getattr(module, first))

        self.change(tied)

    # What changes the module.

    @rule(index=st.integers(0, 15), every=BOOLS)
    def freeze_or_thaw(self, index: int, every: bool) -> None:
        name, p = self.weight(index)
        to = not p.requires_grad

        def switch(module: nn.Module) -> None:
            for other, each in module.named_parameters():
                if every or other == name:
                    each.requires_grad_(to)

        self.change(switch)

    @rule(training=BOOLS, dropout=st.sampled_from([0.0, 0.5]))
    def mode(self, training: bool, dropout: float) -> None:
        self.look()
        for module in self.q.all:
            module.train(training)
            if not self.q.is_cell and module.num_layers > 1:
                module.dropout = dropout
        self.change()

    @rule()
    def turn_over(self) -> None:
        if self.q.kind == "RNNCell":
            to = "relu" if self.q.ours.nonlinearity == "tanh" else "tanh"
            self.change(lambda m: setattr(m, "nonlinearity", to))
        elif not self.q.is_cell:
            self.change(lambda m: setattr(m, "batch_first", not m.batch_first))

    @rule(double=BOOLS)
    def convert(self, double: bool) -> None:
        for module in self.q.all:
            module.zero_grad()
        for module in self.q.all[:3]:
            module.double() if double else module.float()
        self.change()

    @rule(count=st.sampled_from([1, 2]))
    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
        self.look()

    @rule(index=st.integers(0, 15))
    def share_memory(self, index: int) -> None:
        p = self.weight(index)[1]
        p.share_memory_()
        self.change()
        # As another process would: of what is shared nothing is kept.
        p.data[..., -1].fill_(0.6)
        self.change()

    @precondition(lambda self: self.whole and not self.normed)
    @rule(how=st.sampled_from(["deepcopy", "pickle", "load"]))
    def go_on_with_a_copy(self, how: str) -> None:
        q = self.q
        x, _ = self.arguments((3, 3), False, 0).given(q.dtype, (False, False))
        with torch.no_grad():
            torch.manual_seed(1)
            said = tensors(q.ours(x))
        self.old = [(q.ours, x, said)]
        for index, module in enumerate(q.all):
            if how == "pickle":
                module.zero_grad()
                q.all[index] = pickle.loads(pickle.dumps(module))
            else:
                q.all[index] = copy.deepcopy(module)
                if how == "load":
                    q.all[index].load_state_dict(module.state_dict())
        self.change()

    @invariant()
    def what_was_copied_is_untouched(self) -> None:
        for module, x, said in getattr(self, "old", ()):
            if draws(module):
                continue
            with torch.no_grad():
                for a, b in zip(tensors(module(x)), said, strict=True):
                    assert_same_bits("of the original", a, b)

    @rule(index=st.integers(0, 15))
    def parametrise(self, index: int) -> None:
        q = self.q
        name = [n for n in names(q.ours) if n.startswith("weight")][index % 2]
        if parametrize.is_parametrized(q.ours, name):
            self.change(lambda m: parametrize.remove_parametrizations(m, name))
        elif self.whole:
            self.normed = True  # which leaves a hook that cannot be pickled
            self.change(nn.Module.zero_grad)
            self.change(lambda m: parametrizations.weight_norm(m, name))

    @rule(index=st.integers(0, 15))
    def prune_or_not(self, index: int) -> None:
        q = self.q
        name = [n for n in names(q.ours) if n.startswith("weight")][index % 2]
        if f"{name}_orig" in dict(q.ours.named_parameters()):
            self.change(lambda m: prune.remove(m, name))
        elif self.whole and getattr(q.ours, name).is_contiguous():  # as pruning wants it
            self.change(nn.Module.zero_grad)
            self.change(lambda m: prune.l1_unstructured(m, name, 0.3))

    @rule()
    def collect(self) -> None:
        gc.collect(0)


# Changes, each after prepared calls: what the draws above reach now and then.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "element": lambda m: [m.write(i, "element") for i in range(4)],
    "all": lambda m: m.write(0, "all"),
    "data": lambda m: m.write_through_data(1, False),
    "said": lambda m: [m.write_one_element_and_say_so(i) for i in range(4)],
    "fused": lambda m: [m.optimise_one_unit(u, f) for u in range(H) for f in (False, True)],
    "shared": lambda m: [m.share_memory(i) for i in range(4)],
    "replaced": lambda m: [m.replace(i, False, True) for i in range(4)],
    "lazy sign": lambda m: [m.replace(i, True, False) for i in range(4)],
    "loaded": lambda m: (m.load(False), m.load(True)),
    "turned over": lambda m: m.turn_over(),
    "threads": lambda m: (m.set_threads(2), m.set_threads(1)),
    "frozen": lambda m: (m.freeze_or_thaw(0, True), m.look()),
    "checkpoint": lambda m: (m.parametrise(0), m.checkpoint((2, 3))),
    "reference": lambda m: [m.by_the_reference((3, 3), False, grad) for grad in (False, True)],
    "autocast": lambda m: [m.autocast((3, 3), grad) for grad in (False, True)],
    "inference": lambda m: m.infer((3, 3), False, 0, 3, "both", False),
    "sign": lambda m: m.train((3, 3), False, 5, 2, (False, False), False),
    "results": lambda m: m.infer((3, 3), False, 0, 3, "no_grad", False),
    "scribble": lambda m: m.infer((3, 3), False, 0, 3, "no_grad", True),
    "waiting": lambda m: (
        m.train((3, 3), False, 0, 1, (True, False), True),
        m.set_threads(2),
        m.write_through_data(1, False),
        m.backward(True),
    ),
}


def each_after_prepared_calls(
    begin: Callable[[], Changes], changes: dict[str, Callable[[Any], Any]]
) -> None:
    for change in changes.values():
        machine = begin()
        try:
            for _ in range(3):
                machine.look()
            change(machine)
        finally:
            machine.teardown()
