"""One batch-normalised LSTM layer: what the reference says, and what fastrnn.ops says.

Like tests/problems.py: a ``BNCase`` is printable data, ``BNProblem(case)`` draws its tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.backends import reference_bnlstm
from tests.problems import Case, Problem, Result
from tests.solved_once import once_per_state
from tests.tolerances import assert_close_by_rule

UPSTREAM = ("y", "h_n", "c_n", "cells")
USED = ("used_ih", "used_hh", "used_c")
WEIGHTS = ("w_ih", "w_hh", "bias", "gamma_ih", "gamma_hh", "gamma_c", "beta_c")


@dataclass(frozen=True)
class BNCase:
    """What a layer is asked to do; layout is "time", "batch" or "packed"."""

    dtype: torch.dtype = torch.float32
    T: int = 5
    N: int = 3
    I: int = 4
    H: int = 6
    directions: int = 1
    layout: str = "time"
    lengths: bool = False
    reset: bool = False
    bias: bool = True
    batch_stats: bool = True
    sequence: bool = False
    rows: int = 4  # of the running statistics
    upstream: tuple[str, ...] = UPSTREAM
    plan: str = ""
    # A batch of 2 or 3 has small variances: with 1e-5 one rounding grows by up to 300 at every
    # step, and the rule speaks of data of unit scale. Cases of many rows take 1e-5.
    eps: float = 0.1
    seed: int = 0

    def __str__(self) -> str:
        words = ["train" if self.batch_stats else "eval", str(self.dtype).removeprefix("torch.")]
        words += [f"{name}{getattr(self, name)}" for name in "TNIH"]
        for f in fields(self)[5:]:
            value = getattr(self, f.name)
            if f.name not in ("seed", "batch_stats") and value != f.default:
                text = "+".join(value) if isinstance(value, tuple) else value
                words.append(f.name if value is True else f"{f.name}={text}")
        return "-".join(words)


@dataclass
class BNProblem:
    """The tensors of a case, in the layout of the ops."""

    case: BNCase
    plain: Problem = field(init=False)

    def __post_init__(self) -> None:
        c = self.case
        # Inputs, states, lengths, resets and upstream gradients are those of an LSTM.
        self.plain = p = Problem(
            Case(
                "lstm", c.dtype, c.T, c.N, c.I, c.H, directions=c.directions, layout=c.layout,
                lengths=c.lengths, reset=c.reset, upstream=c.upstream, seed=c.seed,
            )
        )  # fmt: skip
        self.x, self.h0, self.upstream = p.x, p.h0, p.upstream
        assert p.c0 is not None
        self.c0 = p.c0
        draw = torch.Generator().manual_seed(c.seed * 7919 + 17)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return (torch.rand(shape, generator=draw) * (high - low) + low).to(c.dtype)

        bound = 1 / math.sqrt(c.H)
        self.weights: list[Tensor] = []
        self.running: list[Tensor] = []
        for _ in range(c.directions):
            self.weights += [
                uniform(-bound, bound, 4 * c.H, c.I),
                uniform(-bound, bound, 4 * c.H, c.H),
                *[uniform(-1, 1, 4 * c.H)] * c.bias,
                uniform(0.1, 0.8, 4 * c.H),
                uniform(0.1, 0.8, 4 * c.H),
                uniform(0.1, 0.8, c.H),
                uniform(-0.5, 0.5, c.H),
            ]
            for width in (4 * c.H, 4 * c.H, c.H):
                rows = 1 if c.sequence and len(self.running) % 6 == 0 else c.rows
                self.running += [uniform(-0.3, 0.3, rows, width), uniform(0.3, 1.5, rows, width)]

    def inputs(self) -> list[Tensor]:
        """Every tensor an op is given, to check that none is written to."""
        p = self.plain
        optional = [p.op_lengths, p.reset, p.batch_sizes]
        given = [self.x, self.h0, self.c0, *self.weights, *self.running, *self.upstream.values()]
        return given + [t for t in optional if t is not None]


def names(case: BNCase) -> list[str]:
    """What each weight of the problem is."""
    own = [name for name in WEIGHTS if case.bias or name != "bias"]
    return [name + "_reverse" * d for d in range(case.directions) for name in own]


@once_per_state(BNProblem.inputs)
def solve_reference(p: BNProblem, dtype: torch.dtype) -> Result:
    """Outputs, statistics and gradients of the reference on the inputs of p, in ``dtype``."""
    c, plain = p.case, p.plain

    def leaf(t: Tensor) -> Tensor:
        return t.to(dtype).detach().requires_grad_()

    x, h0, c0 = leaf(p.x), leaf(p.h0), leaf(p.c0)
    weights = [leaf(w) for w in p.weights]
    running = [t.to(dtype) for t in p.running]
    with _linear(c.plan == "linear"):
        results = reference_bnlstm.layer(
            x, h0, c0, weights, running, plain.batch_sizes, plain.op_lengths, plain.reset, c.eps,
            c.batch_stats, c.sequence, c.layout == "batch",
        )  # fmt: skip
    out = dict(zip((*UPSTREAM, *USED), results, strict=True))
    leaves = {"dx": x, "dh0": h0, "dc0": c0}
    leaves |= {f"d_{name}": w for name, w in zip(names(c), weights, strict=True)}
    grads = torch.autograd.grad(
        [out[k] for k in p.upstream],
        list(leaves.values()),
        [g.to(dtype) for g in p.upstream.values()],
        allow_unused=True,
        materialize_grads=True,
    )
    return {k: v.detach() for k, v in out.items()} | dict(zip(leaves, grads, strict=True))


class _linear:
    """Tangents in the place of sigmoid and tanh, in the reference."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        from fastrnn.reference import bnlstm

        self._kept = bnlstm.activations
        if self._on:
            bnlstm.activations = lambda linear: self._kept(True)

    def __exit__(self, *_: object) -> None:
        from fastrnn.reference import bnlstm

        bnlstm.activations = self._kept


def forward(p: BNProblem, record: bool = False, packed: Tensor | None = None) -> Result:
    """ops.bnlstm_forward on p."""
    c, plain = p.case, p.plain
    results = ops.bnlstm_forward(
        p.x, p.h0, p.c0, p.weights, p.running, packed, plain.batch_sizes, plain.op_lengths,
        plain.reset, c.eps, c.batch_stats, c.sequence, c.layout == "batch", True, record, c.plan,
    )  # fmt: skip
    return dict(zip((*UPSTREAM, "tape", *USED), results, strict=True))


def backward(p: BNProblem, tape: Result, needs: tuple[bool, bool, bool] = (True,) * 3) -> Result:
    """ops.bnlstm_backward on p; needs = (dx, state, weights)."""
    c, plain = p.case, p.plain
    dx, dh0, dc0, dweights = ops.bnlstm_backward(
        *(p.upstream.get(name) for name in UPSTREAM), p.x, tape["y"], p.h0, p.c0, tape["cells"],
        tape["tape"], [tape[name] for name in USED], p.weights, plain.batch_sizes,
        plain.op_lengths, plain.reset, c.eps, c.batch_stats, c.sequence, c.layout == "batch",
        *needs, c.plan,
    )  # fmt: skip
    grads = {f"d_{name}": w for name, w in zip(names(c), dweights, strict=needs[2])}
    return {"dx": dx, "dh0": dh0, "dc0": dc0} | grads


def solve_ops(p: BNProblem) -> Result:
    """Outputs, statistics and all gradients, without the opaque tape."""
    tape = forward(p, record=True)
    out = tape | backward(p, tape)
    del out["tape"]
    return out


def check(
    p: BNProblem,
    got: Result,
    note: str = "",
    number_format: str = "",
    rounded: BNProblem | None = None,
) -> None:
    """Apply the tolerance rule to every entry of ``got``; as ``tests.problems.check``."""
    ref64 = solve_reference(p, torch.float64)
    same = solve_reference(p if rounded is None else rounded, p.case.dtype)
    wide = torch.float32 if p.case.dtype.itemsize == 2 else p.case.dtype
    for name, value in got.items():
        label = f"{note}{name} of {p.case} (seed {p.case.seed})"
        expected = wide if name in ("cells", *USED) else p.case.dtype
        assert value.dtype == expected, f"{label}: {value.dtype}"
        assert_close_by_rule(label, value, ref64[name], same[name], p.case.dtype, number_format)
        if name in ("y", "cells", "dx") and p.plain.op_lengths is not None:
            past = p.plain.from_layout(value)[p.plain.padding]
            assert not past.any(), f"{label}: not 0 past the end of a sequence"
