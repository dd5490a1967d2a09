"""Who runs a case on the GPU: fastrnn's backends, torch.nn (cuDNN), loops, FlashRNN.

A backend that refuses a case says why and takes no part: which cells it has is asked, not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

import fastrnn
from benchmarks import loops, peers, verify
from benchmarks.cases import Case
from benchmarks.peers import Contestant, Outputs, Problem

BACKENDS = {"fastrnn": "cuda", "fastrnn-triton": "triton"}
LOOP_GROUPS = ("loops",)


class Refused(Exception):
    """This contestant does not take this case; the message says why."""


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype or "float32")


def number_format(case: Case) -> str:
    """Of tests/tolerances.py: float32 is multiplied as TF32 by both sides, which is asked for."""
    return "" if case.dtype else "tf32"


class Field:
    """A case's problem and those who take part, on one device."""

    def __init__(self, case: Case, where: str, backends: dict[str, str] | None = None) -> None:
        self.case, self.where = case, where
        self.backends = BACKENDS if backends is None else backends
        self.looped = case.group in LOOP_GROUPS
        self.problem: Any = (loops.LoopProblem if self.looped else Problem)(case, where)
        self.contestants: dict[str, Contestant] = {}
        self.refused: dict[str, str] = {}
        for name in case.contestants:
            try:
                self.contestants[name] = self._build(name)
            except Refused as why:
                self.refused[name] = str(why)

    def _build(self, name: str) -> Contestant:
        case, dtype = self.case, dtype_of(self.case)
        make: Callable[..., Contestant] = loops.build if self.looped else peers.build
        if name == "flashrnn":
            return _flashrnn(self.problem, dtype)
        if name not in self.backends:
            return make(case, name, self.problem, dtype)
        backend = self.backends[name]
        try:
            with fastrnn.use_backend(backend):
                built = make(case, "fastrnn", self.problem, dtype)
        except RuntimeError as error:
            if "cannot serve this call" not in str(error):
                raise
            why = str(error).partition("cannot serve this call: ")[2].partition("; to let")[0]
            raise Refused(why) from None
        return replace(built, name=name, context=_both(built.context, backend))

    def check(self) -> dict[str, dict[str, Any]]:
        """A check by contestant, of all but the peers that the truth is made of."""
        case, dtype = self.case, dtype_of(self.case)
        if self.looped:
            expected = loops.truth(case, self.problem)
            peer = loops.peer_outputs(case, self.problem, expected, dtype)
        else:
            expected = verify.truth(case, self.problem)
            peer = verify.truth(case, self.problem, dtype)
        found = {}
        for name, contestant in self.contestants.items():
            if name in ("torch", "loop"):
                continue
            wanted = expected
            if name == "flashrnn":  # it gives the states only
                wanted = {"y": expected["y"]}
            found[name] = verify.check(
                contestant, wanted, peer, dtype, number_format(case)
            ).to_dict()
        return found


def _both(
    context: Callable[[], AbstractContextManager[Any]], backend: str
) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def inside() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(context())
            stack.enter_context(fastrnn.use_backend(backend))
            yield

    return inside


def _flashrnn(problem: Problem, dtype: torch.dtype) -> Contestant:
    """FlashRNN's fused LSTM with the input product in front of it: (B, T, G, heads, D)."""
    case = problem.case
    if not find_spec("flashrnn"):
        raise Refused("the package flashrnn is not installed")
    if case.cell != "lstm" or case.bidirectional or case.ragged:
        raise Refused("it has one direction of a dense LSTM")
    from flashrnn import flashrnn

    w = {key: value.to(dtype) for key, value in problem.weights.items()}
    training = case.mode == "training"
    x = problem.x.to(dtype).transpose(0, 1).contiguous().requires_grad_(training)
    w_ih = w["weight_ih_l0"].clone().requires_grad_(training)
    # R multiplies the state from the right: each gate's matrix transposed.
    r = w["weight_hh_l0"].view(4, 1, case.H, case.H).transpose(2, 3).contiguous()
    r.requires_grad_(training)
    b = (w["bias_ih_l0"] + w["bias_hh_l0"]).view(4, 1, case.H).clone().requires_grad_(training)
    dy = problem.dy.to(dtype).transpose(0, 1).contiguous()

    def run() -> Any:
        wx = torch.nn.functional.linear(x, w_ih).view(case.N, case.T, 4, 1, case.H)
        states, _ = flashrnn(wx, r, b, function="lstm", backend="cuda_fused")
        return states[0].view(case.N, case.T, case.H)

    def train() -> Any:
        for leaf in (x, w_ih, r, b):
            leaf.grad = None
        y = run()
        y.backward(dy)
        return y

    call = train if training else run

    def outputs() -> Outputs:
        return {"y": call().transpose(0, 1)}

    return (
        Contestant("flashrnn", call, outputs)
        if training
        else Contestant("flashrnn", call, outputs, torch.no_grad)
    )
