"""What users do between calls of an RHN or a BNLSTM, in any order: as test_stateful.py, of cells
that torch.nn does not have.

Each call is held against the general way to the bit, and against the reference backend in float64
by the rule; so are a BNLSTM's running statistics after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

from tests.drawn import drawn
from tests.quartet import H, OwnCells, names
from tests.stateful_calls import BOOLS, SHAPES, TIMES
from tests.stateful_changes import CHANGES, Changes, each_after_prepared_calls
from tests.tolerances import assert_same_bits

LOOKS = st.sampled_from(["infer", "infer", "train", "train", "step"])


class Own(Changes):
    """What an RHN and a BNLSTM share."""

    # What may be set between calls, each to some values.
    options: list[tuple[str, Any]]

    def unfit(self) -> list[tuple[str, Any]]:
        """Options that do not fit the module's parameters, and tensors of other sizes."""
        ours = self.q.ours
        found: list[tuple[str, Any]] = [
            (n, not getattr(ours, n)) for n in ("bias", "bidirectional")
        ]
        return [*found, *((n, nn.Parameter(torch.zeros(2, 2))) for n in names(ours))]

    @rule(
        lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3), shortened=BOOLS, reset=BOOLS,
        grad=BOOLS, given=BOOLS, cells=BOOLS, times=TIMES,
    )  # fmt: skip
    def ragged(
        self, lengths: list[int], shortened: bool, reset: bool, grad: bool, given: bool,
        cells: bool, times: int,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {"lengths": lengths} if shortened else {}
        if cells and self.q.kind == "BNLSTM":
            options["return_cells"] = True
        shape = (3, 4) if self.q.ours.batch_first else (4, 3)
        if reset:
            options["reset"] = torch.rand(shape) < 0.3

        def call(module: nn.Module, x: Tensor, hx: Any) -> Any:
            return module(x, hx, **options)

        for _ in range(times):
            with torch.set_grad_enabled(grad):
                run = self.q.run(self.arguments(shape, given, 0), (grad, grad), call, seed=1)
            if grad:
                self.q.backward(run)

    @rule(steps=st.integers(1, 3), rows=st.sampled_from([(), (2,), (3,)]), given=BOOLS, grad=BOOLS)
    def all_by_steps(self, steps: int, rows: tuple[int, ...], given: bool, grad: bool) -> None:
        """With masks of each step, and gradients."""
        if not self.steppable:
            return
        first = self.q.ours.batch_first and len(rows) > 0
        shape = (*rows, steps) if first else (steps, *rows)
        arguments = self.arguments(shape, given and self.steps_begin_anywhere, 0)
        with torch.set_grad_enabled(grad):
            run = self.q.run(arguments, (grad, grad), self.step_by_step, seed=1)
        self.keep(run)
        if grad:
            self.q.backward(run)

    @precondition(lambda self: self.whole)
    @rule(index=st.integers(0, 63), shape=SHAPES, grad=BOOLS)
    def what_does_not_fit(self, index: int, shape: tuple[int, ...], grad: bool) -> None:
        name, value = (found := self.unfit())[index % len(found)]
        x, _ = self.arguments(shape, False, 0).given(self.q.dtype, (grad, False))
        with self.nothing_changes(), torch.set_grad_enabled(grad):
            for module in self.q.all[:2]:
                kept = getattr(module, name)
                setattr(module, name, value)
                for _ in range(2):
                    with pytest.raises((RuntimeError, ValueError)):
                        module(x)
                setattr(module, name, kept)
        self.look()

    @rule(index=st.integers(0, 15), grad=BOOLS)
    def wrong_arguments(self, index: int, grad: bool) -> None:
        x, hx = self.arguments((3, 3), True, 0).given(self.q.dtype, (grad, grad))
        calls: list[Callable[[Any], Any]] = [
            lambda m: m(x, tuple(t[..., 1:] for t in hx) if isinstance(hx, tuple) else hx[:, 1:]),
            lambda m: m(x, "state"),
            lambda m: m(x, lengths=[3, 3]),
            lambda m: m(x, lengths=[3, 3, 0]),
            lambda m: m(x, lengths=[1.0, 2.0, 3.0]),
            lambda m: m(x, reset=torch.zeros(3, 3)),
            lambda m: m(x, reset=torch.zeros(2, 3, dtype=torch.bool)),
            lambda m: m(None),
            lambda m: m.step(x),
        ]
        with self.nothing_changes(), torch.set_grad_enabled(grad):
            for module in self.q.all[:2]:
                with pytest.raises((RuntimeError, ValueError, TypeError)):
                    calls[index % len(calls)](module)
        self.look()

    def may_be_set(self, name: str) -> bool:
        return True

    @rule(index=st.integers(0, 31), and_train=BOOLS)
    def set_option(self, index: int, and_train: bool) -> None:
        name, value = self.options[index % len(self.options)]

        def switch(module: nn.Module) -> None:
            setattr(module, name, value)
            module.train(module.training or and_train)

        if self.may_be_set(name):
            self.change(switch)

    @rule()
    def draw_weights_anew(self) -> None:
        if self.whole:
            self.look()
            self.q.ours.reset_parameters()
            self.change()


class Highway(Own):
    """RHN."""

    options = [
        *(("variational_input", p) for p in (0.0, 0.3, 1.0)),
        *(("variational_state", p) for p in (0.0, 0.3, 1.0)),
        *((name, on) for name in ("tie_gate_masks", "recompute") for on in (False, True)),
    ]

    @initialize(
        bias=BOOLS, layers=st.sampled_from([1, 1, 2]), directions=st.sampled_from([1, 1, 2]),
        batch_first=BOOLS, depth=st.integers(1, 3), couple_carry=BOOLS, small_memory=BOOLS,
        looks=LOOKS, seed=st.integers(0, 2**20),
    )  # fmt: skip
    def begin(
        self, bias: bool, layers: int, directions: int, batch_first: bool, depth: int,
        couple_carry: bool, small_memory: bool, looks: str, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        kept = {
            "bias": bias, "num_layers": layers, "bidirectional": directions == 2, "depth": depth,
            "batch_first": batch_first, "couple_carry": couple_carry, "init_range": H**-0.5,
            "transform_bias": 0.0,
        }  # fmt: skip
        self.start(OwnCells.of("RHN", kept), small_memory, looks, layers * directions)

    def unfit(self) -> list[tuple[str, Any]]:
        return [*super().unfit(), ("couple_carry", not self.q.ours.couple_carry)]

    @precondition(lambda self: self.whole)
    @rule(depth=st.integers(1, 3))
    def deepen(self, depth: int) -> None:
        """The depth is that of the weights."""

        def new(module: nn.Module) -> None:
            for name in names(module):
                if not name.startswith("weight_ih"):
                    old = getattr(module, name)
                    value = torch.stack([0.9 * old.detach()[0]] * depth)
                    setattr(module, name, nn.Parameter(value, old.requires_grad))

        self.change(new)


class Normalised(Own):
    """BNLSTM."""

    options = [
        *(("eps", value) for value in (0.3, 0.1, 1e-5)),
        *(("momentum", value) for value in (1.0, 0.0, None, 0.1)),
        *(("h0_noise", value) for value in (0.1, 0.0)),
        *(("learn_init_state", on) for on in (False, True)),
        *(("input_stats", of) for of in ("sequence", "step")),
    ]

    steps_begin_anywhere = False  # of another state than step's own

    @initialize(
        bias=BOOLS, layers=st.sampled_from([1, 1, 2]), directions=st.sampled_from([1, 1, 2]),
        batch_first=BOOLS, max_length=st.sampled_from([1, 2, 4]), sequence=BOOLS,
        learned=st.sampled_from([False, False, True]), small_memory=BOOLS,
        looks=st.sampled_from(["follow", "follow", "infer", "train", "step"]),
        seed=st.integers(0, 2**20),
    )  # fmt: skip
    def begin(
        self, bias: bool, layers: int, directions: int, batch_first: bool, max_length: int,
        sequence: bool, learned: bool, small_memory: bool, looks: str, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        kept = {
            "bias": bias, "num_layers": layers, "bidirectional": directions == 2,
            "batch_first": batch_first, "max_length": max_length, "gamma_init": 0.5, "eps": 0.1,
            "input_stats": "sequence" if sequence else "step", "learn_init_state": learned,
        }  # fmt: skip
        q = OwnCells.of("BNLSTM", kept)
        for module in q.all:
            module.train(looks == "train" or (looks == "follow" and seed % 2 == 0))
        for name, buffer in q.ours.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(*((0.3, 1.5) if "_var_" in name else (-0.3, 0.3)))
        q.sync()
        self.start(q, small_memory, looks, layers * directions)

    def look(self) -> None:
        """Where it follows the mode, as the mode's prepared calls are: training with gradients."""
        kept = self.looks
        if kept == "follow":
            self.looks = "train" if self.q.ours.training else "infer"
        super().look()
        self.looks = kept

    def alters(self, module: Any) -> bool:
        return bool(module.training)

    @property
    def steppable(self) -> bool:
        ours = self.q.ours
        return super().steppable and not (ours.training and ours.input_stats == "sequence")

    def state_after_steps(self, state: Any) -> Any:
        return state.h, state.c

    def unfit(self) -> list[tuple[str, Any]]:
        ours, found = self.q.ours, super().unfit()
        if ours.max_length > 1:
            found.append(("input_stats", "step" if ours.input_stats == "sequence" else "sequence"))
        if not hasattr(ours, "h_0_l0"):
            found.append(("learn_init_state", True))
        read = [n for n, b in ours.named_buffers() if b.is_floating_point()]
        return [*found, *((n, torch.zeros(2, 2)) for n in read)]

    def may_be_set(self, name: str) -> bool:
        if name == "input_stats":
            return bool(self.q.ours.max_length == 1)  # whose buffers serve both
        return name != "learn_init_state" or hasattr(self.q.ours, "h_0_l0")

    @rule(index=st.integers(0, 63), how=st.sampled_from(["all", "element", "data"]))
    def write_statistics(self, index: int, how: str) -> None:
        self.look()
        buffers = list(self.q.ours.buffers())
        buffer = buffers[index % len(buffers)]
        if how == "all":
            buffer.mul_(2)
        elif how == "element":
            buffer[(-1,) * buffer.dim()] = 2
        else:
            buffer.data[..., -1].fill_(2)
        self.change(quiet=True)

    @rule(index=st.integers(0, 63), how=st.sampled_from(["copied", "strided", "lazy sign"]))
    def replace_statistics(self, index: int, how: str) -> None:
        all_names = [name for name, _ in self.q.ours.named_buffers()]
        name = all_names[index % len(all_names)]

        def new(module: nn.Module) -> None:
            value = getattr(module, name).clone().mul_(2)
            if how == "strided" and value.dim() == 2:
                value = value.t().contiguous().t()
            if how == "lazy sign":
                value = torch._neg_view(-value)
            setattr(module, name, value)

        self.change(new, quiet=True)

    @rule()
    def forget_statistics(self) -> None:
        self.look()
        self.q.ours.reset_running_stats()
        self.change(quiet=True)

    @rule(shape=st.sampled_from([(3, 3), (3, 2), (2, 3)]), count=st.integers(1, 2))
    def recalibrate(self, shape: tuple[int, ...], count: int) -> None:
        self.look()
        q, batches = self.q, [self.arguments(shape, False, 0) for _ in range(count)]
        for module in q.all:
            q.forget()
            with q.under(module):
                module.recalibrate(
                    [b.given(q.dtype_of(module), (False, False))[0] for b in batches]
                )
        q.compare_buffers()
        self.change(quiet=True)

    @precondition(lambda self: self.whole)
    @rule(shape=SHAPES, grad=BOOLS, times=TIMES)
    def functional_call_with_statistics(
        self, shape: tuple[int, ...], grad: bool, times: int
    ) -> None:
        """Those that are given are moved, and the module's own are not."""
        other = {n: b.clone() for n, b in self.q.ours.named_buffers()}
        before = [b.resolve_neg().clone() for b in self.q.ours.buffers()]

        def call(module: nn.Module, x: Tensor, hx: Any) -> Any:
            given = {
                n: b.to(x.dtype) if b.is_floating_point() else b.clone() for n, b in other.items()
            }
            results = torch.func.functional_call(module, given, (x, hx))
            return results, [b for b in given.values() if b.is_floating_point()]

        for _ in range(times):
            with torch.set_grad_enabled(grad):
                self.q.run(self.arguments(shape, False, 0), (grad, grad), call, seed=1)
        for kept, buffer in zip(before, self.q.ours.buffers()):
            assert_same_bits("a buffer", buffer.resolve_neg(), kept)

    @precondition(lambda self: self.whole)
    @rule()
    def tie_norms(self) -> None:
        def tied(module: Any) -> None:
            module.bn_weight_hh_l0 = module.bn_weight_ih_l0

        self.change(tied)


MACHINES: dict[str, type[Own]] = {"RHN": Highway, "BNLSTM": Normalised}


@pytest.mark.first
@pytest.mark.parametrize("kind", MACHINES)
def test_any_order_of_calls_and_changes(kind: str) -> None:
    run_state_machine_as_test(MACHINES[kind], settings=drawn(4, stateful_step_count=24))


OWN_CHANGES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "RHN": {
        "depth": lambda m: [m.deepen(depth) for depth in (3, 1, 2)],
    },
    "BNLSTM": {
        "modes": lambda m: [m.mode(on, 0.0) for on in (True, False, True, False)],
        "statistics": lambda m: [
            m.write_statistics(i, ("element", "data")[i % 2]) for i in range(7)
        ],
        "other statistics": lambda m: [
            m.replace_statistics(i, how) for i in (0, 5) for how in ("copied", "lazy sign")
        ],
        "no statistics": lambda m: m.forget_statistics(),
        "recalibrated": lambda m: m.recalibrate((3, 3), 2),
        "given statistics": lambda m: m.functional_call_with_statistics((3, 3), False, 2),
        "tied": lambda m: m.tie_norms(),
    },
}


# Calls with gradients read the plain weights: what writes to those is drawn above.
OF_GRADIENTS = ("all", "replaced", "frozen", "checkpoint", "reference", "autocast", "waiting")


@pytest.mark.parametrize("looks", ["infer", "train", "step"])
@pytest.mark.parametrize("kind", MACHINES)
def test_a_change_after_prepared_calls(kind: str, looks: str) -> None:
    def begin() -> Own:
        m = MACHINES[kind]()
        if isinstance(m, Highway):
            m.begin(True, 1, 1, False, 2, True, False, looks, 3)
        elif isinstance(m, Normalised):
            m.begin(True, 1, 1, False, 2, False, False, False, looks, 3)
        return m

    grad = looks == "train"
    shared: dict[str, Callable[[Any], Any]] = {
        "unfit": lambda m: [
            m.what_does_not_fit(i, (3, 3), grad) for i in range(0, len(m.unfit()), 1 + grad)
        ],
        "wrong": lambda m: [m.wrong_arguments(i, grad) for i in range(9)],
        "options": lambda m: [m.set_option(i, False) for i in range(len(m.options))],
        "drawn": lambda m: m.draw_weights_anew(),
        "fused": lambda m: [m.optimise_one_unit(u, f) for u in (0, H - 1) for f in (False, True)],
    }
    kept = {"infer": CHANGES, "train": OF_GRADIENTS, "step": ()}[looks]
    common = {name: CHANGES[name] for name in kept}
    each_after_prepared_calls(begin, common | shared | OWN_CHANGES[kind])
