"""One Recurrent Highway layer problem: its tensors, the reference's answer, and that of the ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fastrnn import ops
from fastrnn.reference import rhn_layer
from tests.solved_once import once_per_state
from tests.tolerances import assert_close_by_rule, assert_same_bits

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What a layer is asked to do; layout is "time", "batch" or "packed".

    x_mask and s_mask: "" for none, "tied" or "untied".
    """

    dtype: torch.dtype = torch.float32
    T: int = 5
    N: int = 3
    I: int = 4
    H: int = 6
    depth: int = 2
    gates: int = 2
    directions: int = 1
    layout: str = "time"
    x_mask: str = ""
    s_mask: str = ""
    lengths: bool = False
    reset: bool = False
    bias: bool = True
    recompute: bool = False
    upstream: tuple[str, ...] = ("y", "h_n")
    plan: str = ""
    seed: int = 0

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch.")]
        words += [f"{name}{getattr(self, name)}" for name in "TNIH"]
        for f in fields(self)[5:]:
            value = getattr(self, f.name)
            if f.name != "seed" and value != f.default:
                text = "+".join(value) if isinstance(value, tuple) else value
                words.append(f.name if value is True else f"{f.name}={text}")
        return "-".join(words)


class Problem:
    """The tensors of a case, in the layout of the ops, drawn from the case's own seed."""

    def __init__(self, case: Case) -> None:
        self.case = c = case
        self._draw = draw = torch.Generator().manual_seed(c.seed * 7919 + c.T * 31 + c.H)
        self.lengths: Tensor | None = None
        if c.lengths or c.layout == "packed":
            self.lengths = torch.randint(1, c.T + 1, (c.N,), generator=draw)
            self.lengths[torch.randint(c.N, (1,), generator=draw)] = c.T
            if c.layout == "packed":
                self.lengths = self.lengths.sort(descending=True).values
        bound, rows = 1 / math.sqrt(c.H), c.gates * c.H
        shapes = [(rows, c.I), (c.depth, rows, c.H)] + [(c.depth, rows)] * c.bias
        self.weights = [
            (torch.rand(s, generator=draw) * 2 - 1).mul(bound).to(c.dtype)
            for s in shapes * c.directions
        ]
        self.x = self.to_layout(self._normal(c.T, c.N, c.I), padding=math.nan)
        self.h0 = self._normal(c.directions, c.N, c.H)
        self.x_mask = self._mask(c.x_mask, c.I)
        self.s_mask = self._mask(c.s_mask, c.H)
        self.reset: Tensor | None = None
        if c.reset:
            shape = (c.N, c.T) if c.layout == "batch" else (c.T, c.N)
            self.reset = torch.rand(shape, generator=draw) < 0.3
        # Gradients sent into the padding must have no effect: make them too large to miss.
        upstream = {
            "y": self.to_layout(self._normal(c.T, c.N, c.directions * c.H), padding=1e3),
            "h_n": self._normal(c.directions, c.N, c.H),
        }
        self.upstream = {k: v for k, v in upstream.items() if k in c.upstream}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw).to(self.case.dtype)

    def _mask(self, kind: str, width: int) -> Tensor | None:
        """Zeros and other values, so that a mask in the wrong place cannot go unseen."""
        if not kind:
            return None
        groups = self.case.gates if kind == "untied" else 1
        shape = (self.case.directions, groups, self.case.N, width)
        values = 0.5 + torch.rand(shape, generator=self._draw)
        return (values * (torch.rand(shape, generator=self._draw) > 0.3)).to(self.case.dtype)

    @property
    def batch_sizes(self) -> Tensor | None:
        if self.case.layout != "packed" or self.lengths is None:
            return None
        return (self.lengths[:, None] > torch.arange(self.case.T)).sum(0)

    @property
    def padding(self) -> Tensor:
        """(T, N) bool, True past the end of a sequence."""
        ends = torch.full((self.case.N,), self.case.T) if self.lengths is None else self.lengths
        return torch.arange(self.case.T)[:, None] >= ends

    @property
    def op_lengths(self) -> Tensor | None:
        return None if self.case.layout == "packed" else self.lengths

    def to_layout(self, time_major: Tensor, padding: float | None = None) -> Tensor:
        if padding is not None:
            hole = torch.full_like(time_major, padding)
            time_major = torch.where(self.padding.unsqueeze(-1), hole, time_major)
        if self.case.layout == "packed":
            return pack_padded_sequence(time_major, self.lengths).data
        if self.case.layout == "batch":
            return time_major.transpose(0, 1).contiguous()
        return time_major

    def from_layout(self, data: Tensor) -> Tensor:
        if self.case.layout == "packed":
            padded = data.new_zeros((self.case.T, self.case.N, data.shape[-1]))
            return padded.masked_scatter(~self.padding.unsqueeze(-1), data)
        return data.transpose(0, 1) if self.case.layout == "batch" else data

    def inputs(self) -> list[Tensor]:
        """Every tensor an op is given, to check that none is written to."""
        optional = [self.x_mask, self.s_mask, self.lengths, self.reset]
        given = [self.x, self.h0, *self.weights, *self.upstream.values()]
        return given + [t for t in optional if t is not None]


@once_per_state(Problem.inputs)
def solve_reference(p: Problem, dtype: torch.dtype) -> Result:
    """Outputs and gradients of fastrnn.reference on the inputs of p, computed in ``dtype``."""
    c = p.case

    def leaf(t: Tensor) -> Tensor:
        return t.to(dtype).detach().requires_grad_()

    def mask(t: Tensor | None, d: int) -> Tensor | None:
        return None if t is None else t[d].to(dtype)

    x, h0, weights = leaf(p.x), leaf(p.h0), [leaf(w) for w in p.weights]
    reset = p.reset.t() if p.reset is not None and c.layout == "batch" else p.reset
    per = len(weights) // c.directions
    runs = [
        rhn_layer(
            p.from_layout(x),
            h0[d],
            weights[d * per : (d + 1) * per],
            x_mask=mask(p.x_mask, d),
            s_mask=mask(p.s_mask, d),
            reverse=d == 1,
            lengths=p.lengths,
            reset=reset,
            linear="linear" in c.plan,
        )
        for d in range(c.directions)
    ]
    out = {
        "y": p.to_layout(torch.cat([r[0] for r in runs], -1)),
        "h_n": torch.stack([r[1] for r in runs]),
    }
    leaves = {"dx": x, "dh0": h0} | {f"dw{i}": w for i, w in enumerate(weights)}
    grads = torch.autograd.grad(
        [out[k] for k in p.upstream],
        list(leaves.values()),
        [g.to(dtype) for g in p.upstream.values()],
        allow_unused=True,
        materialize_grads=True,
    )
    return {k: v.detach() for k, v in out.items()} | dict(zip(leaves, grads, strict=True))


def forward(p: Problem, packed: Tensor | None = None) -> Result:
    """ops.rhn_forward on p."""
    y, h_n = ops.rhn_forward(
        p.x, p.h0, p.weights, p.x_mask, p.s_mask, packed, p.batch_sizes, p.op_lengths, p.reset,
        p.case.layout == "batch", p.case.plan,
    )  # fmt: skip
    return {"y": y, "h_n": h_n}


def forward_train(p: Problem) -> Result:
    """ops.rhn_forward_train on p."""
    y, h_n, gates = ops.rhn_forward_train(
        p.x, p.h0, p.weights, p.x_mask, p.s_mask, p.batch_sizes, p.op_lengths, p.reset,
        p.case.layout == "batch", p.case.recompute, p.case.plan,
    )  # fmt: skip
    return {"y": y, "h_n": h_n, "gates": gates}


def backward(p: Problem, tape: Result, needs: tuple[bool, bool, bool] = (True,) * 3) -> Result:
    """ops.rhn_backward on p; needs = (dx, state, weights)."""
    dx, dh0, dweights = ops.rhn_backward(
        p.upstream.get("y"), p.upstream.get("h_n"), p.x, tape["y"], p.h0, tape["gates"], p.weights,
        p.x_mask, p.s_mask, p.batch_sizes, p.op_lengths, p.reset, p.case.layout == "batch", *needs,
        p.case.plan,
    )  # fmt: skip
    return {"dx": dx, "dh0": dh0} | {f"dw{i}": w for i, w in enumerate(dweights)}


def solve_ops(p: Problem) -> Result:
    """Outputs of the training forward and all gradients, without the opaque tape."""
    tape = forward_train(p)
    out = tape | backward(p, tape)
    del out["gates"]
    return out


def check(
    p: Problem,
    got: Result,
    note: str = "",
    number_format: str = "",
    rounded: Problem | None = None,
) -> None:
    """Apply the tolerance rule to every entry of ``got``; as ``tests.problems.check``."""
    ref64 = solve_reference(p, torch.float64)
    same = solve_reference(p if rounded is None else rounded, p.case.dtype)
    for name, value in got.items():
        label = f"{note}{name} of {p.case} (seed {p.case.seed})"
        assert value.dtype == p.case.dtype, f"{label}: {value.dtype}"
        assert_close_by_rule(label, value, ref64[name], same[name], None, number_format)
        if name in ("y", "dx") and p.op_lengths is not None:
            past = p.from_layout(value)[p.padding]
            assert not past.any(), f"{label}: not 0 past the end of a sequence"


def verify(p: Problem) -> None:
    """Both forwards and the backward by the rule; the same call twice; inputs left alone."""
    before = [t.clone() for t in p.inputs()]
    tape = forward_train(p)
    gates = tape["gates"].clone()
    got = {k: v for k, v in tape.items() if k != "gates"} | backward(p, tape)
    check(p, got)
    assert_same_bits("gates after backward", tape["gates"], gates)
    assert_equal_results(p.case, forward(p), {k: got[k] for k in ("y", "h_n")}, "inference")
    assert_equal_results(p.case, solve_ops(p), got, "second run")
    for tensor, copy in zip(p.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, copy)


def assert_equal_results(case: Case, got: Result, expected: Result, what: str) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same_bits(f"{name} of {case}, {what}", value, expected[name])


def on_threads(count: int, run: Callable[[], Result]) -> Result:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)
