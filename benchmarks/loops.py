"""Cells that torch.nn does not have, beside the loop a user would write for them.

The loops are the fastest honest ones: the input product of all steps is one matmul, the time axis
is unbound outside the loop, batch norms of the input term are one call over all steps, and biases
that can be are added there too. "loop" runs them eagerly; "loop-compiled" hands the body of the
loop (one time step) to torch.compile, which unrolls nothing over time: compiling all steps takes
minutes.
The truth is the loop in float64, written apart from the library's own references; with a
regulariser, whose masks only the library knows, it is the reference backend in float64 with the
same seed. A compiled loop, whose masks are its own, is held to the loop, and "fastrnn-plain", which
is another function, to torch.nn.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, layer_norm, linear

import fastrnn
from benchmarks import verify
from benchmarks.cases import Case
from benchmarks.peers import Contestant, Outputs

SEED = 11
OPTIONS: dict[str, dict[str, Any]] = {
    "update": {"recurrent_dropout": 0.25, "recurrent_dropout_mode": "update"},
    "cell": {"recurrent_dropout": 0.25, "recurrent_dropout_mode": "cell"},
    "state": {"recurrent_dropout": 0.25, "recurrent_dropout_mode": "state"},
    "zoneout": {"zoneout": 0.1},
    "weight": {"weight_dropout": 0.25},
    "layer_norm": {"layer_norm": True},
}
_PLAIN = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


class LoopProblem:
    """Weights, input and output gradients of a case, seeded by its id."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.id.encode()))
        module = make_module(case, "fastrnn").to(device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    bound = parameter.size(-1) ** -0.5
                    parameter.uniform_(-bound, bound, generator=generator)
        self.weights = module.state_dict()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.x = normal(case.T, case.N, case.input_size)
        self.dy = normal(case.T, case.N, case.H)
        self.dh = normal(1, case.N, case.H)
        # Of the plain layer beside it: those that it shares with the cell, else its own.
        self.plain = make_module(case, "fastrnn-plain").to(device).state_dict()
        for name, value in self.plain.items():
            if case.option:
                value.copy_(self.weights[name])
            else:
                value.uniform_(-(case.H**-0.5), case.H**-0.5, generator=generator)

    def moved(self, seed: int) -> LoopProblem:
        """The same with every value moved by at most a spacing."""
        generator = torch.Generator(self.x.device).manual_seed(seed)
        move = verify.rule().moved_values
        other = copy.copy(self)
        other.weights = {
            name: move(value, generator) if value.is_floating_point() else value
            for name, value in self.weights.items()
        }
        other.x, other.dy, other.dh = (move(t, generator) for t in (self.x, self.dy, self.dh))
        return other


def make_module(case: Case, name: str) -> nn.Module:
    """fastrnn's module of a case: the cell itself, or the plain LSTM or GRU of its shape, which
    "torch-plain" is too."""
    if case.cell == "rhn" and name == "fastrnn":
        return fastrnn.RHN(case.input_size, case.H, depth=case.depth)
    if case.cell == "bnlstm" and name == "fastrnn":
        return fastrnn.BNLSTM(case.input_size, case.H, max_length=case.T)
    kind = getattr(nn if name == "torch-plain" else fastrnn, _PLAIN.get(case.cell, "LSTM"))
    return kind(
        case.input_size, case.H, **OPTIONS.get(case.option, {}) if name == "fastrnn" else {}
    )


def build(
    case: Case, name: str, problem: LoopProblem, dtype: torch.dtype = torch.float32
) -> Contestant:
    """The contestant: "fastrnn", "fastrnn-plain", "loop" or "loop-compiled"; or what one of them is
    verified by, "fastrnn-reference" or "torch-plain"."""
    if name.startswith("loop"):
        module: nn.Module = _Loop(case, problem, compiled=name == "loop-compiled")
    else:
        plain = name.endswith("-plain")
        module = make_module(case, name if plain else "fastrnn")
        module.load_state_dict(problem.plain if plain else problem.weights)
    module = module.to(problem.x.device, dtype).train(case.mode == "training")
    x = problem.x.detach().to(dtype).requires_grad_(case.mode == "training")
    dy, dh = problem.dy.to(dtype), problem.dh.to(dtype)
    parameters = dict(module.named_parameters())

    def run() -> tuple[Tensor, Tensor]:
        y, state = module(x)
        return y, state[0] if isinstance(state, tuple) else state

    def train() -> tuple[Tensor, Tensor]:
        x.grad = None
        for parameter in parameters.values():
            parameter.grad = None
        y, h_n = run()
        torch.autograd.backward((y, h_n), (dy, dh))
        return y, h_n

    call: Callable[[], tuple[Tensor, Tensor]] = train if case.mode == "training" else run

    def outputs() -> Outputs:
        torch.manual_seed(SEED)
        y, h_n = call()
        found = {"y": y, "h_n": h_n}
        if case.mode == "training":
            found["dx"] = x.grad
            found |= {f"d{key}": value.grad for key, value in parameters.items()}
        return found

    context: Any = nullcontext if case.mode == "training" else torch.no_grad
    if name == "fastrnn-reference":
        context = lambda: fastrnn.use_backend("reference")  # noqa: E731
    contestant = Contestant(name, call, outputs, context)
    if name == "fastrnn":
        with context():
            contestant.backend = str(fastrnn.explain(module, x).backend)
    return contestant


def yardstick(case: Case, name: str = "fastrnn") -> str:
    """What a contestant is verified by; itself where it is what the truth is made of."""
    if name == "fastrnn-plain":
        return "torch-plain"
    looped = name.startswith("loop") or case.option in ("", "layer_norm")
    return "loop" if looped else "fastrnn-reference"


def truth(case: Case, problem: LoopProblem, by: str = "") -> Outputs:
    """The float64 outputs, and gradients in training, of a yardstick; of fastrnn's own if ""."""
    return _run(build(case, by or yardstick(case), problem, torch.float64))


def peer_outputs(
    case: Case,
    problem: LoopProblem,
    expected: Outputs,
    dtype: torch.dtype = torch.float32,
    by: str = "",
) -> Outputs:
    """The same in the dtype that runs: what an error is measured against.

    With layer norm the worst of four draws of roundings, as the tests' rule has it.
    """
    by = by or yardstick(case)
    runs = [_run(build(case, by, problem, dtype))]
    if case.option != "layer_norm" or by == "torch-plain":
        return runs[0]
    for seed in range(3):
        runs.append(_run(build(case, by, problem.moved(seed), dtype)))
    return verify.rule().worst_of(runs, expected)


def check(
    case: Case, problem: LoopProblem, contestants: Sequence[Contestant]
) -> dict[str, verify.Check]:
    """A check by contestant, of all but those that the truth is made of. A compiled step is
    compiled here, once: the contestant is the one to be timed."""
    found, known = {}, {}
    for contestant in contestants:
        by = yardstick(case, contestant.name)
        if by == contestant.name:
            continue
        if by not in known:
            expected = truth(case, problem, by)
            known[by] = expected, peer_outputs(case, problem, expected, by=by)
        found[contestant.name] = verify.check(contestant, *known[by])
    return found


def _run(contestant: Contestant) -> Outputs:
    with contestant.context():
        outputs = contestant.outputs()
    return {name: value.detach() for name, value in outputs.items() if value is not None}


class _Loop(nn.Module):
    """The loop over time, with the parameters of fastrnn's module under the same names."""

    def __init__(self, case: Case, problem: LoopProblem, *, compiled: bool) -> None:
        super().__init__()
        self.case = case
        for name, value in problem.weights.items():
            if not name.startswith(("running", "num_batches")):
                self.register_parameter(name, nn.Parameter(value.clone()))
        step = {"rhn": _rhn_step, "bnlstm": _bnlstm_step}.get(case.cell, _dropout_lstm_step)
        if case.option == "layer_norm":
            step = _norm_lstm_step if case.cell == "lstm" else _norm_gru_step
        self.step = torch.compile(step, dynamic=False) if compiled else step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        case, w = self.case, self._parameters
        h = x.new_zeros(case.N, case.H)
        w_ih, w_hh = w["weight_ih_l0"], w["weight_hh_l0"]
        ys = []
        if case.cell == "rhn":
            (first, *bias), matrices = w["bias_l0"].unbind(0), [m.t() for m in w_hh.unbind(0)]
            for x_t in linear(x, w_ih, first).unbind(0):
                h = self.step(x_t, h, matrices, bias)
                ys.append(h)
        elif case.cell == "bnlstm":
            c = h
            norms = [w[f"bn_{k}_l0"] for k in ("weight_hh", "weight_c", "bias_c")]
            z = linear(x, w_ih).transpose(0, 1).reshape(case.N, -1)
            gain, bias = (w[name].repeat(case.T) for name in ("bn_weight_ih_l0", "bias_l0"))
            z = batch_norm(z, None, None, gain, bias, True)
            for x_t in z.view(case.N, case.T, -1).unbind(1):
                h, c = self.step(x_t, h, c, w_hh, *norms)
                ys.append(h)
        elif case.option == "layer_norm":
            c, names = h, ("ln_weight_c_l0", "ln_bias_c_l0")
            state = [w[name] for name in names] if case.cell == "lstm" else []
            gain, bias = w["ln_weight_hh_l0"], w["bias_hh_l0"]
            inputs = linear(x, w_ih)
            inputs = layer_norm(inputs, inputs.shape[-1:], w["ln_weight_ih_l0"], w["bias_ih_l0"])
            for x_t in inputs.unbind(0):
                h, c = self.step(x_t, h, c, w_hh, gain, bias, *state)
                ys.append(h)
        else:
            c, keep = h, 1 - OPTIONS["update"]["recurrent_dropout"]
            masks = x.new_empty(case.T, case.N, case.H).bernoulli_(keep)
            inputs = linear(x, w_ih, w["bias_ih_l0"] + w["bias_hh_l0"])
            for x_t, mask in zip(inputs.unbind(0), masks.unbind(0), strict=True):
                h, c = self.step(x_t, h, c, w_hh, mask)
                ys.append(h)
        return torch.stack(ys), h.unsqueeze(0)


def _rhn_step(x_t: Tensor, s: Tensor, matrices: list[Tensor], bias: list[Tensor]) -> Tensor:
    # The input's term has the first bias.
    for matrix, term in zip(matrices, [x_t, *bias], strict=True):
        z = torch.addmm(term, s, matrix)
        h, t = z.chunk(2, 1)
        s = torch.lerp(s, h.tanh(), t.sigmoid())
    return s


def _bnlstm_step(
    x_t: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, gamma_hh: Tensor, gamma_c: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    z = x_t + batch_norm(linear(h, w_hh), None, None, gamma_hh, None, True)
    i, f, g, o = z.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * batch_norm(c, None, None, gamma_c, beta, True).tanh(), c


def _norm_lstm_step(
    x_t: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, gain: Tensor, bias: Tensor, *cell: Tensor
) -> tuple[Tensor, Tensor]:
    z = x_t + layer_norm(linear(h, w_hh), x_t.shape[-1:], gain, bias)
    i, f, g, o = z.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * layer_norm(c, c.shape[-1:], *cell).tanh(), c


def _norm_gru_step(
    x_t: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, gain: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    r_x, z_x, n_x = x_t.chunk(3, 1)
    r_h, z_h, n_h = layer_norm(linear(h, w_hh), x_t.shape[-1:], gain, bias).chunk(3, 1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return torch.lerp(n, h, (z_x + z_h).sigmoid()), c


def _dropout_lstm_step(
    x_t: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    i, f, g, o = torch.addmm(x_t, h, w_hh.t()).chunk(4, 1)
    c = f.sigmoid() * c + mask * (i.sigmoid() * g.tanh())
    return o.sigmoid() * c.tanh(), c
