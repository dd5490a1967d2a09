"""A state machine of hypothesis whose rules are calls, of whatever kind of module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor, nn

import fastrnn
from fastrnn.backends import cpu_memory
from tests.quartet import Arguments, H, I, Quartet, Run, draws, names, tensors
from tests.tolerances import assert_close_by_rule, assert_same_bits

BOOLS = st.booleans()
TIMES = st.integers(1, 3)  # so that prepared calls come into play
# Shapes that are others when the batch comes first, and one that is not.
SHAPES = st.sampled_from([(3, 3), (3, 3), (3, 3), (3, 2), (2, 3), (1, 1), (3,)])
PLACES: list[Callable[[Tensor], Tensor]] = [
    Tensor.clone,
    Tensor.clone,
    Tensor.clone,
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    lambda t: torch.stack((t, t), -1)[..., 0],
    lambda t: torch._neg_view(-t),  # the sign is torch's to carry out
    lambda t: t[..., :1].expand_as(t),
]


class Calls(RuleBasedStateMachine):
    """Calls of a module, and those that must leave its state as it is."""

    def start(self, q: Quartet, small_memory: bool, looks: str, of_state: int) -> None:
        """Begins with these modules, whose states have ``of_state`` parts for all layers."""
        self.q, self.looks, self.of_state, self.out = q, looks, of_state, H
        if small_memory:
            cpu_memory.KEPT = 64  # bytes: as if these tensors were large
        self.pending: Run | None = None
        self.watched: list[tuple[Tensor, Tensor]] = []  # results, which are the caller's
        self.old: list[tuple[Any, Any, list[Tensor]]] = []  # copied modules and what they said
        self.optimiser: Any = None
        self.normed = False

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.get_num_threads(), cpu_memory.KEPT

    def teardown(self) -> None:
        torch.set_num_threads(self.before[0])
        cpu_memory.KEPT = self.before[1]

    # Arguments.

    def arguments(self, shape: tuple[int, ...], given: bool, place: int) -> Arguments:
        def values(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=torch.float32).double()

        q = self.q
        parts = [self.out, H][: 1 + ("LSTM" in q.kind)] if given else []
        if q.is_cell:
            rows = shape[1:]
            x, state = values(*rows, I), tuple(values(*rows, H) for _ in parts)
        else:
            batch = shape[: len(shape) - 1] if q.ours.batch_first else shape[1:]
            x = values(*shape, I)
            state = tuple(values(self.of_state, *batch, width) for width in parts)
        return Arguments(x, state, PLACES[place])

    def keep(self, run: Run) -> None:
        self.watched = [(t, t.detach().clone()) for t in run.results[0] if not t.is_inference()]

    def change(self, made: Callable[[Any], Any] | None = None, quiet: bool = False) -> None:
        """Does something to our module, or to all, after which ours has the word.

        quiet: no counter of versions moves, so graphs stay as usable as with torch.nn.
        """
        if not quiet:
            self.pending = None
        if made:
            self.look()
        for module in self.q.all if made else ():
            with self.q.under(module):
                made(module)
        self.q.sync()
        self.look()

    def look(self) -> None:
        """A call of always the same shape, which before the change was a prepared one."""
        if self.looks == "step" and self.steppable:
            return self.steps(2, (3,), False, False)
        with torch.set_grad_enabled(self.looks == "train"):
            self.q.run(self.arguments((3, 3), False, 0), seed=1)

    def alters(self, module: Any) -> bool:
        """Whether a call leaves something in the module."""
        return False

    @property
    def steppable(self) -> bool:
        return not self.q.is_cell and not self.q.ours.bidirectional

    steps_begin_anywhere = True  # with the state of a sequence

    def state_after_steps(self, state: Any) -> Any:
        """As forward returns it."""
        return state

    @property
    def whole(self) -> bool:
        """Whether every weight is a Parameter of its own name."""
        own = dict(self.q.ours.named_parameters(remove_duplicate=False))
        return all(name in own for name in names(self.q.ours))

    def weight(self, index: int) -> tuple[str, nn.Parameter]:
        own = list(self.q.ours.named_parameters())
        return own[index % len(own)]

    # Calls.

    @rule(
        shape=SHAPES, given=BOOLS, place=st.integers(0, len(PLACES) - 1), times=TIMES,
        mode=st.sampled_from(["no_grad", "no_grad", "inference", "both"]), scribble=BOOLS,
    )  # fmt: skip
    def infer(
        self, shape: tuple[int, ...], given: bool, place: int, times: int, mode: str,
        scribble: bool,
    ) -> None:  # fmt: skip
        for _ in range(times):
            how = torch.no_grad() if mode == "no_grad" else torch.inference_mode()
            with how, torch.set_grad_enabled(mode == "both"):
                run = self.q.run(self.arguments(shape, given, place), seed=1)
                self.check_kept()
                if scribble:
                    run.results[0][0].zero_()
            self.keep(run)

    @rule(
        shape=SHAPES, given=BOOLS, place=st.integers(0, len(PLACES) - 1), times=TIMES,
        leaves=st.tuples(BOOLS, BOOLS), wait=BOOLS,
    )  # fmt: skip
    def train(
        self, shape: tuple[int, ...], given: bool, place: int, times: int,
        leaves: tuple[bool, bool], wait: bool,
    ) -> None:  # fmt: skip
        leaves = (leaves[0] and place < 3, leaves[1] and given and place < 3)
        for _ in range(times):
            run = self.q.run(self.arguments(shape, given, place), leaves, seed=1)
            self.check_kept()
            if any(t.requires_grad for t in run.results[0]):
                self.pending = run
                if not wait:
                    self.backward(False)
            self.keep(run)

    @precondition(lambda self: self.pending is not None)
    @rule(retain=BOOLS)
    def backward(self, retain: bool) -> None:
        run, self.pending = self.pending, None
        assert run is not None
        self.q.backward(run, retain)
        if retain:
            for leaf in (t for ts in run.leaves for t in ts):
                leaf.grad = None
            self.q.backward(run)

    @rule(shape=SHAPES, given=BOOLS)
    def second_derivative(self, shape: tuple[int, ...], given: bool) -> None:
        run = self.q.run(self.arguments(shape, given, 0), (True, given), seed=1)
        found = []
        for results, (x, *_), module in zip(run.results, run.leaves, self.q.all):
            y = results[0]
            wanted = [p for p in module.parameters() if p.requires_grad]
            with self.q.under(module):
                (dx,) = torch.autograd.grad(y, x, run.upstream[0].to(y.dtype), create_graph=True)
                grads = torch.autograd.grad(dx.sum(), [x, *wanted], allow_unused=True)
            found.append([dx, *(g for g in grads)])
        for ours, same, truth in zip(found[0], *found[2:]):
            if truth is not None and same is not None and self.q.judges:
                assert_close_by_rule("second derivative", ours, truth.detach(), same)

    @rule(lengths=st.lists(st.integers(1, 3), min_size=3, max_size=3), grad=BOOLS, given=BOOLS)
    def packed(self, lengths: list[int], grad: bool, given: bool) -> None:
        if self.q.is_cell:
            return
        arguments = self.arguments((3, 3), given, 0)._replace(lengths=lengths)
        with torch.set_grad_enabled(grad):
            run = self.q.run(arguments, (grad, grad), seed=1)
        if grad:
            self.q.backward(run)

    @rule(steps=st.integers(1, 3), rows=st.sampled_from([(), (2,), (3,)]), given=BOOLS, grad=BOOLS)
    def steps(self, steps: int, rows: tuple[int, ...], given: bool, grad: bool) -> None:
        q = self.q
        if not self.steppable:
            return
        first = q.ours.batch_first and len(rows) > 0
        given = given and self.steps_begin_anywhere
        arguments = self.arguments((*rows, steps) if first else (steps, *rows), given, 0)

        def call(module: Any, x: Tensor, hx: Any) -> Any:
            return self.step_by_step(module, x, hx) if module is q.ours else module(x, hx)

        if draws(q.ours):
            return  # each step draws anew
        with torch.set_grad_enabled(grad):
            run = q.run(arguments, (grad, grad), call)
        self.keep(run)

    def step_by_step(self, module: Any, x: Tensor, hx: Any) -> Any:
        time = 1 if module.batch_first and x.dim() == 3 else 0
        outputs = []
        for x_t in x.unbind(time):
            self.q.forget()
            y, hx = module.step(x_t, hx)
            outputs.append(y)
        return torch.stack(outputs, time), self.state_after_steps(hx)

    # Calls that must leave the state as it is.

    @rule(shape=SHAPES, grad=BOOLS)
    def autocast(self, shape: tuple[int, ...], grad: bool) -> None:
        self.look()
        if self.q.dtype == torch.float64:
            return
        arguments = self.arguments(shape, False, 0)
        results = []
        for module in self.q.all[:2]:
            self.q.forget()
            x, _ = arguments.given(torch.float32, (False, False))
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                results.append(tensors(module(x)))
        for a, b in zip(*results):
            assert_same_bits("under autocast", a, b)
        for (name, a), b in zip(self.q.ours.named_buffers(), self.q.fresh.buffers()):
            assert_same_bits(name, a.resolve_neg(), b.resolve_neg())
        self.q.sync()

    @rule(shape=SHAPES, given=BOOLS, grad=BOOLS)
    def by_the_reference(self, shape: tuple[int, ...], given: bool, grad: bool) -> None:
        self.look()
        with fastrnn.use_backend("reference"), torch.set_grad_enabled(grad):
            self.q.run(self.arguments(shape, given, 0), (grad, grad), seed=1)

    @precondition(lambda self: self.whole)
    @rule(shape=SHAPES, given=BOOLS, grad=BOOLS, parameters=BOOLS, times=TIMES)
    def functional_call(
        self, shape: tuple[int, ...], given: bool, grad: bool, parameters: bool, times: int
    ) -> None:
        other = {n: torch.randn(p.shape) / 3 for n, p in self.q.ours.named_parameters()}

        def call(module: nn.Module, x: Tensor, hx: Any) -> Any:
            values: dict[str, Tensor] = {n: v.to(x.dtype) for n, v in other.items()}
            if parameters:
                values = {n: nn.Parameter(v) for n, v in values.items()}
            return torch.func.functional_call(module, values, (x, hx))

        for _ in range(times):
            with torch.set_grad_enabled(grad):
                self.q.run(self.arguments(shape, given, 0), (grad, grad), call, seed=1)

    @precondition(lambda self: self.whole and not self.q.ours.training)
    @rule(shape=SHAPES, grad=BOOLS)
    def transforms(self, shape: tuple[int, ...], grad: bool) -> None:
        q, arguments = self.q, self.arguments(shape, False, 0)
        found = []
        for module in q.all:
            x, _ = arguments.given(q.dtype_of(module), (False, False))
            q.forget()
            values = {n: p.detach() for n, p in module.named_parameters()}

            def loss(values: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
                return tensors(torch.func.functional_call(module, values, (x,)))[0].sum()

            with q.under(module), torch.set_grad_enabled(grad):
                got = torch.func.grad(loss)(values, x)
                many = x
                if module in q.all[:2]:
                    many = torch.vmap(lambda x, m=module: tensors(m(x))[0])(torch.stack((x, -x)))
                else:
                    many = torch.stack([tensors(module(each))[0] for each in (x, -x)])
            found.append([*got.values(), many])
        q.compare("of a transform", found)

    @precondition(lambda self: self.whole)
    @rule(shape=SHAPES)
    def errors(self, shape: tuple[int, ...]) -> None:
        good, hx = self.arguments(shape, True, 0).given(self.q.dtype, (False, False))
        wrong = [torch.cat((good, good), -1), good[None, None], good.to(torch.bfloat16)]
        with self.nothing_changes(), torch.no_grad():
            for x in wrong:
                for module in (self.q.ours, self.q.theirs):
                    with self.q.under(module), pytest.raises((RuntimeError, ValueError)):
                        module(x, hx)

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Neither what the modules hold nor what will be drawn."""

        def found() -> dict[str, Tensor]:
            held = {n: v.resolve_neg() for n, v in self.q.ours.state_dict().items()}
            return {"random numbers": torch.get_rng_state(), **held}

        before = {name: value.clone() for name, value in found().items()}
        yield
        for name, value in found().items():
            assert_same_bits(name, value, before[name])

    @rule(shape=SHAPES, given=BOOLS, grad=BOOLS)
    def two_threads(self, shape: tuple[int, ...], given: bool, grad: bool) -> None:
        if draws(self.q.ours) or self.alters(self.q.ours):
            return  # one generator for both, and one state
        arguments = [self.arguments(shape, given, 0) for _ in range(2)]
        found: list[list[Tensor]] = [[], []]

        def work(index: int) -> None:
            x, hx = arguments[index].given(self.q.dtype, (False, False))
            with torch.set_grad_enabled(grad):
                for _ in range(3):
                    found[index] = tensors(self.q.ours(x, hx))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for index in range(2):
            with torch.set_grad_enabled(grad):
                run = self.q.run(arguments[index])
            for a, b in zip(found[index], run.results[0], strict=True):
                assert_same_bits("beside another thread", a, b)

    @rule(shape=SHAPES)
    def checkpoint(self, shape: tuple[int, ...]) -> None:
        def call(module: nn.Module, x: Tensor, hx: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(module, x, hx, use_reentrant=False)

        self.q.backward(self.q.run(self.arguments(shape, False, 0), (True, False), call, seed=1))

    def check_kept(self) -> None:
        for value, kept in self.watched:
            assert_same_bits("an earlier result", value, kept)
