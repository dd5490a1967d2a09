"""One layer problem: its inputs, what the reference says, and what fastrnn.ops says.

A ``Case`` is printable data; ``Problem(case)`` draws the tensors from the case's own seed.
``solve_reference`` and ``solve_ops`` return the same dictionary: y, h_n, c_n, cells, dx, dh0, dc0
and dw0 .. in the layout of the ops, so that a test compares them key by key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from fastrnn import ops
from fastrnn.kinds import GATES, KINDS
from fastrnn.noise import Noise
from fastrnn.reference import gru_layer, lstm_layer, rnn_layer
from fastrnn.regularisers import draw_masks
from tests.solved_once import once_per_state
from tests.tolerances import assert_close_by_rule, moved_values, worst_of

PLAIN = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")
NORMED = ("lstm_layer_norm", "gru_layer_norm")
CELLS = PLAIN + NORMED
UPSTREAM = ("y", "h_n", "c_n", "cells")
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What a layer is asked to do; layout is "time", "batch" or "packed"."""

    cell: str
    dtype: torch.dtype = torch.float32
    T: int = 5
    N: int = 3
    I: int = 4
    H: int = 6
    proj: int = 0
    directions: int = 1
    layout: str = "time"
    lengths: bool = False
    reset: bool = False
    bias: bool = True
    recompute: bool = False
    upstream: tuple[str, ...] = UPSTREAM
    plan: str = ""
    seed: int = 0
    noise: Noise | None = None

    def __str__(self) -> str:
        """A readable test id: the cell, the dtype, then whatever is not the default."""
        words = [self.cell, str(self.dtype).removeprefix("torch.")]
        words += [f"{name}{getattr(self, name)}" for name in "TNIH"]
        for f in fields(self)[6:]:
            value = getattr(self, f.name)
            if f.name != "seed" and value != f.default:
                text = value.text() if isinstance(value, Noise) else value
                text = "+".join(value) if f.name == "upstream" else text
                words.append(f.name if value is True else f"{f.name}={text}")
        return "-".join(words)

    @property
    def is_lstm(self) -> bool:
        return self.cell.startswith("lstm")

    @property
    def out(self) -> int:
        """Size of h: the projection's, or H."""
        return self.proj or self.H

    @property
    def cell_dtype(self) -> torch.dtype:
        """dtype of the cells output: float32 for 16-bit input."""
        return torch.float32 if self.dtype.itemsize == 2 else self.dtype


@dataclass
class Problem:
    """The tensors of a case, in the layout of the ops."""

    case: Case
    lengths: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        c = self.case
        draw = torch.Generator().manual_seed(c.seed * 7919 + c.T * 31 + c.H)
        self._draw = draw
        self.lengths = None
        if c.lengths or c.layout == "packed":
            self.lengths = torch.randint(1, c.T + 1, (c.N,), generator=draw)
            self.lengths[torch.randint(c.N, (1,), generator=draw)] = c.T
        if c.layout == "packed":
            assert self.lengths is not None
            self.lengths = self.lengths.sort(descending=True).values
        bound = 1 / math.sqrt(c.H)
        rows = GATES[c.cell] * c.H
        shapes = [(rows, c.I), (rows, c.out)] + [(rows,), (rows,)] * c.bias
        shapes += [(c.proj, c.H)] * bool(c.proj)
        self.weights = []
        for _ in range(c.directions):
            self.weights += self._uniform(shapes, bound)
            if c.cell in NORMED:
                self.weights += [1 + w for w in self._uniform([(rows,), (rows,)], 0.5)]
                if c.is_lstm:
                    gain, bias = self._uniform([(c.H,), (c.H,)], 0.5)
                    self.weights += [1 + gain, bias]
        self.x = self.to_layout(self._normal(c.T, c.N, c.I), padding=math.nan)
        self.h0 = self._normal(c.directions, c.N, c.out)
        self.c0 = self._normal(c.directions, c.N, c.H) if c.is_lstm else None
        self.reset = None
        if c.reset:
            shape = (c.N, c.T) if c.layout == "batch" else (c.T, c.N)
            self.reset = torch.rand(shape, generator=draw) < 0.3
        # Gradients sent into the padding must have no effect: make them too large to miss.
        self.upstream: dict[str, Tensor] = {
            "y": self.to_layout(self._normal(c.T, c.N, c.directions * c.out), padding=1e3),
            "h_n": self._normal(c.directions, c.N, c.out),
        }
        if c.is_lstm:
            cells = self.to_layout(self._normal(c.T, c.N, c.directions * c.H), padding=1e3)
            self.upstream["c_n"] = self._normal(c.directions, c.N, c.H)
            self.upstream["cells"] = cells.to(c.cell_dtype)
        self.upstream = {k: v for k, v in self.upstream.items() if k in c.upstream}

    def _uniform(self, shapes: list[tuple[int, ...]], bound: float) -> list[Tensor]:
        return [
            (torch.rand(s, generator=self._draw) * 2 - 1).mul(bound).to(self.case.dtype)
            for s in shapes
        ]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw).to(self.case.dtype)

    @cached_property
    def batch_sizes(self) -> Tensor | None:
        """Rows per step of a packed sequence, or None."""
        if self.case.layout != "packed" or self.lengths is None:
            return None
        return (self.lengths[:, None] > torch.arange(self.case.T)).sum(0)

    @cached_property
    def padding(self) -> Tensor:
        """(T, N) bool, True past the end of a sequence."""
        ends = torch.full((self.case.N,), self.case.T) if self.lengths is None else self.lengths
        return torch.arange(self.case.T)[:, None] >= ends

    @property
    def noise(self) -> tuple[Tensor | None, str]:
        """The seed of the masks and their description, as the ops take them."""
        noise = self.case.noise
        if noise is None:
            return None, ""
        seed = torch.tensor([(self.case.seed + 1) * 0x5DEECE66D1234567 % (1 << 63)])
        return seed if noise.training else None, noise.text()

    @property
    def op_lengths(self) -> Tensor | None:
        """lengths as the ops take them: not beside batch_sizes."""
        return None if self.case.layout == "packed" else self.lengths

    def to_layout(self, time_major: Tensor, padding: float | None = None) -> Tensor:
        """(T, N, K) -> the layout of the case; ``padding`` overwrites rows past the end."""
        if padding is not None:
            hole = torch.full_like(time_major, padding)
            time_major = torch.where(self.padding.unsqueeze(-1), hole, time_major)
        if self.case.layout == "packed":
            return pack_padded_sequence(time_major, self.lengths).data
        if self.case.layout == "batch":
            return time_major.transpose(0, 1).contiguous()
        return time_major

    def from_layout(self, data: Tensor) -> Tensor:
        """The layout of the case -> (T, N, K), zeros past the end of a packed sequence."""
        if self.case.layout == "packed":
            padded = data.new_zeros((self.case.T, self.case.N, data.shape[-1]))
            return padded.masked_scatter(~self.padding.unsqueeze(-1), data)
        return data.transpose(0, 1) if self.case.layout == "batch" else data

    def inputs(self) -> list[Tensor]:
        """Every tensor an op is given, to check that none is written to."""
        optional = [self.c0, self.op_lengths, self.reset, self.batch_sizes]
        given = [self.x, self.h0, *self.weights, *self.upstream.values()]
        return given + [t for t in optional if t is not None]

    def all_tensors(self) -> list[Tensor]:
        """``inputs`` and what else the reference reads."""
        return [*self.inputs(), self.padding, *([] if self.lengths is None else [self.lengths])]


class FixedBranches(TorchFunctionMode):
    """torch.relu takes, call by call, the branch that given outputs took.

    The derivative of relu jumps at 0: where a pre-activation is smaller than its own rounding
    error, either branch is right, and a gradient can only be compared on the same one.
    """

    def __init__(self, p: Problem, y: Tensor) -> None:
        super().__init__()
        time_major = p.from_layout(y.detach())
        forth, *back = (time_major > 0).chunk(p.case.directions, -1)
        self._masks = iter([*forth, *(mask for part in back for mask in part.flip(0))])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.relu:
            return args[0] * next(self._masks)
        return func(*args, **(kwargs or {}))


def solve_reference(
    p: Problem,
    dtype: torch.dtype,
    linear: bool = False,
    relu_as_in: Tensor | None = None,
    moved: int = 0,
) -> Result:
    """Outputs and gradients of fastrnn.reference on the inputs of p, computed in ``dtype``.

    With ``relu_as_in``, an output y, every relu takes the branch it took there. With ``moved``, a
    seed, a third of all input values are those just above, a third those just below.
    """
    if relu_as_in is not None:
        with FixedBranches(p, relu_as_in):
            return _solve_reference(p, dtype, linear)
    return _solved_reference(p, dtype, linear, moved)


def _solve_reference(p: Problem, dtype: torch.dtype, linear: bool, moved: int = 0) -> Result:
    c = p.case
    generator = torch.Generator().manual_seed(moved)

    def leaf(t: Tensor) -> Tensor:
        t = t.to(dtype).detach()
        return (moved_values(t, generator) if moved else t).requires_grad_()

    x, h0, weights = leaf(p.x), leaf(p.h0), [leaf(w) for w in p.weights]
    c0 = None if p.c0 is None else leaf(p.c0)
    reset = p.reset.t() if p.reset is not None and c.layout == "batch" else p.reset
    per = len(weights) // c.directions
    runs = []
    for d in range(c.directions):
        w, norms = weights[d * per : (d + 1) * per], KINDS[c.cell].norms
        options = {"reverse": d == 1, "lengths": p.lengths, "reset": reset, "linear": linear}
        xt = p.from_layout(x)
        if c.noise is not None:
            options["masks"] = draw_masks(c.noise, p.noise[0], d, (c.T, c.N), c.H, c.out, x)
        if norms:
            w, options["norm"] = w[:-norms], w[-norms:]
        if c0 is not None:
            runs.append(lstm_layer(xt, h0[d], c0[d], w, **options))
        elif c.cell.startswith("gru"):
            runs.append(
                gru_layer(xt, h0[d], w, reset_after=c.cell != "gru_reset_before", **options)
            )
        else:
            kind = c.cell.removeprefix("rnn_")
            runs.append(rnn_layer(xt, h0[d], w, nonlinearity=kind, **options))
    out = {"y": p.to_layout(torch.cat([r[0] for r in runs], -1))}
    out["h_n"] = torch.stack([r[1] for r in runs])
    if c.is_lstm:
        out["c_n"] = torch.stack([r[2] for r in runs])
        out["cells"] = p.to_layout(torch.cat([r[3] for r in runs], -1))
    leaves = {"dx": x, "dh0": h0} | ({} if c0 is None else {"dc0": c0})
    leaves |= {f"dw{i}": w for i, w in enumerate(weights)}
    grads = torch.autograd.grad(
        [out[k] for k in p.upstream],
        list(leaves.values()),
        [g.to(dtype) for g in p.upstream.values()],
        allow_unused=True,
        materialize_grads=True,
    )
    return {k: v.detach() for k, v in out.items()} | dict(zip(leaves, grads, strict=True))


_solved_reference = once_per_state(Problem.all_tensors)(_solve_reference)


def forward(p: Problem, return_cells: bool = True, packed: Tensor | None = None) -> Result:
    """ops.layer_forward on p."""
    c = p.case
    y, h_n, c_n, cells = ops.layer_forward(
        p.x,
        p.h0,
        p.c0,
        p.weights,
        packed,
        p.batch_sizes,
        p.op_lengths,
        p.reset,
        c.cell,
        c.layout == "batch",
        return_cells and c.is_lstm,
        c.plan,
        *p.noise,
    )
    return {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells}


def train_args(p: Problem) -> tuple:
    """The arguments of ``layer_forward_train``."""
    c = p.case
    return (
        p.x, p.h0, p.c0, p.weights, p.batch_sizes, p.op_lengths, p.reset, c.cell,
        c.layout == "batch", c.recompute, c.plan, *p.noise,
    )  # fmt: skip


def forward_train(p: Problem) -> Result:
    """ops.layer_forward_train on p."""
    y, h_n, c_n, cells, gates = ops.layer_forward_train(*train_args(p))
    return {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells, "gates": gates}


def backward(p: Problem, tape: Result, needs: tuple[bool, bool, bool] = (True,) * 3) -> Result:
    """ops.layer_backward on p; needs = (dx, state, weights)."""
    c = p.case
    dx, dh0, dc0, dweights = ops.layer_backward(
        p.upstream.get("y"),
        p.upstream.get("h_n"),
        p.upstream.get("c_n"),
        p.upstream.get("cells"),
        p.x,
        tape["y"],
        p.h0,
        p.c0,
        tape["cells"],
        tape["gates"],
        p.weights,
        p.batch_sizes,
        p.op_lengths,
        p.reset,
        c.cell,
        c.layout == "batch",
        *needs,
        c.plan,
        *p.noise,
    )
    return {"dx": dx, "dh0": dh0, "dc0": dc0} | {f"dw{i}": w for i, w in enumerate(dweights)}


def solve_ops(p: Problem) -> Result:
    """Outputs of the training forward and all gradients, without the opaque tape."""
    tape = forward_train(p)
    out = tape | backward(p, tape)
    del out["gates"]
    return out


def check(
    p: Problem,
    got: Result,
    linear: bool = False,
    note: str = "",
    number_format: str = "",
    rounded: Problem | None = None,
) -> None:
    """Apply the tolerance rule to every entry of ``got``; entries that do not apply are empty.

    ``rounded`` is p in a ``number_format`` that torch has no dtype for (tests/formats.py).
    """
    dtype = torch.bfloat16 if "bf16" in p.case.plan else p.case.dtype
    at_dtype = p if rounded is None else rounded
    ref64 = solve_reference(p, torch.float64, linear)
    same = solve_reference(at_dtype, dtype, linear)
    if p.case.cell in NORMED:
        others = [solve_reference(at_dtype, dtype, linear, moved=seed) for seed in (1, 2, 3)]
        same = worst_of([same, *others], ref64)
    # The expectation of zoneout mixes new and old values: y does not show the branches.
    mixed = p.case.noise is not None and p.case.noise.mixes
    if p.case.cell == "rnn_relu" and not linear and "dx" in got and not mixed:
        # y is held to its own branches below, so branches can differ only where y is tiny.
        for truth, of, at in ((ref64, p, torch.float64), (same, at_dtype, dtype)):
            followed = solve_reference(of, at, linear, relu_as_in=got["y"])
            truth.update({k: v for k, v in followed.items() if k.startswith("d")})
    for name, value in got.items():
        label = f"{note}{name} of {p.case} (seed {p.case.seed})"
        if name not in ref64:
            assert value.numel() == 0, f"{label}: expected an empty tensor"
            continue
        expected = p.case.cell_dtype if name == "cells" else p.case.dtype
        assert value.dtype == expected, f"{label}: {value.dtype}, expected {expected}"
        assert_close_by_rule(label, value, ref64[name], same[name], None, number_format)
        if name in ("y", "cells", "dx") and p.op_lengths is not None:
            past = p.from_layout(value)[p.padding]
            assert not past.any(), f"{label}: not 0 past the end of a sequence"


def backward_args(p: Problem) -> tuple:
    """The arguments of ``layer_backward``: all gradients are wanted."""
    c, tape = p.case, forward_train(p)
    return (
        *(p.upstream.get(name) for name in ("y", "h_n", "c_n", "cells")),
        p.x, tape["y"], p.h0, p.c0, tape["cells"], tape["gates"], p.weights, p.batch_sizes,
        p.op_lengths, p.reset, c.cell, c.layout == "batch", True, True, True, "",
    )  # fmt: skip
