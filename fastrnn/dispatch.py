"""Which backend runs a call, and why.

Order: ``use_backend`` > the environment variable FASTRNN_BACKEND > the heuristic. The heuristic
takes the native kernels on the CPU, on a GPU what ``fastrnn.gpu`` says, hands over to torch's
kernels where HANDOVER says they were measured faster, and to the plain-PyTorch reference where
nothing else can serve.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import GRUCell, LSTMCell, RNNBase
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.rnn import PackedSequence

from fastrnn.backends import CPU_DTYPES, CPU_MISSING, NAMES, PLANS, SERVES, Problem
from fastrnn.bf16 import BF16_CELLS, bf16_allowed, bf16_pays
from fastrnn.handover import handed_over
from fastrnn.sequence import Batch, describe

__all__ = [
    "Explanation",
    "Problem",
    "choose",
    "decide",
    "explain",
    "explain_call",
    "settle",
    "use_backend",
]


@dataclass(frozen=True)
class Explanation:
    """Why a call runs where it runs.

    Attributes:
        backend: the chosen backend's name.
        plan: what that backend does with the call.
        reason: why this backend.
        rejected: (backend, reason) of those that were preferred or asked for but cannot serve, or
            would take longer.
    """

    backend: str
    plan: str
    reason: str
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}", f"plan: {self.plan}", f"reason: {self.reason}"]
        lines += [f"rejected: {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)


class _Override(NamedTuple):
    name: str
    strict: bool
    source: str
    undo: str
    fallbacks: list[tuple[str, str, str]]


def _check_name(name: object, source: str) -> str:
    if name not in NAMES:
        expected = ", ".join(repr(n) for n in NAMES)
        raise ValueError(f"{source}: got {name!r}, expected one of {expected}")
    return str(name)


def _from_environment() -> _Override | None:
    value = os.environ.get("FASTRNN_BACKEND", "")
    if not value:
        return None
    name = _check_name(value, "FASTRNN_BACKEND")
    undo = "unset FASTRNN_BACKEND"
    print(
        f"fastrnn: FASTRNN_BACKEND={name}: every call runs on the {name} backend or raises; "
        f"to undo, {undo}",
        file=sys.stderr,
    )
    return _Override(name, True, "FASTRNN_BACKEND", undo, [])


class _Active(threading.local):
    override: _Override | None = _from_environment()


_active = _Active()

# The overrides in force in any thread. A plain global, because torch.compile guards on globals and
# not on thread locals: entering or leaving a block makes compiled code choose anew.
_lock = threading.Lock()
_in_force: tuple[str, ...] = () if _active.override is None else (_active.override.source,)


def _change(add: str | None = None, remove: str | None = None) -> None:
    global _in_force
    with _lock:
        names = list(_in_force)
        if add is not None:
            names.append(add)
        if remove is not None:
            names.remove(remove)
        _in_force = tuple(names)


def _of_this_thread() -> _Override | None:
    return _active.override


if not hasattr(torch.compiler, "_compile_session_context"):
    # Before torch 2.13 (seen with 2.6 and 2.10) a thread local is traced as its class: dynamo has
    # to ask, once for each state of _in_force.
    _of_this_thread._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _override() -> _Override | None:
    return _of_this_thread() if _in_force else None


class use_backend:
    """Run every call of this thread inside the ``with`` block on one backend.

    Args:
        name: "cpu", "cuda", "triton", "torch" or "reference".
        strict: raise where the backend cannot serve a call. With False such a call goes to the
            backend that the heuristic chooses, and ``fallbacks`` gets an entry
            (backend asked for, backend that ran, reason).

    Raises:
        ValueError: ``name`` is no backend.
    """

    def __init__(self, name: str, strict: bool = True) -> None:
        self.name = _check_name(name, "use_backend: name")
        self.strict = bool(strict)
        self.fallbacks: list[tuple[str, str, str]] = []
        self._outer: list[_Override | None] = []

    def __enter__(self) -> use_backend:
        source = f"use_backend({self.name!r})"
        _change(add=f"{source}, strict={self.strict}")
        undo = f"leave the block, or pass strict=False to {source}"
        self._outer.append(_active.override)
        _active.override = _Override(self.name, self.strict, source, undo, self.fallbacks)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _active.override = self._outer.pop()
        _change(remove=f"use_backend({self.name!r}), strict={self.strict}")


def _candidates(p: Problem) -> list[tuple[str, str]]:
    """(backend, reason to prefer it), best first."""
    last = ("reference", "plain PyTorch serves every option, on every device")
    if p.transforms:
        return [("cpu", ""), ("reference", "plain PyTorch works under torch.func transforms")]
    if p.device in ("cpu", "meta"):
        native = ("cpu", "the native kernels serve this call, none was measured faster")
        torch_own = ("torch", "the native kernels cannot serve this call, torch's own can")
        # A traced call stays one operator: torch's kernel would be unrolled over the steps.
        box = None
        if not is_compiling():
            plain = not (p.packed or p.proj_size or p.regularisers)
            box = handed_over(p.cell, p.dtype, p.training, p.steps, p.batch, p.hidden_size, plain)
        if box is not None:
            faster = ("torch", f"torch's own kernel was measured faster here: {box.measured}")
            return [faster, native, last]
        return [native, torch_own, last]
    return [("torch", f"fastrnn has no kernels for {p.device}, torch's own serve this call"), last]


def decide(problem: Problem, runs: bool = False) -> Explanation:
    """Choose the backend of a call, which ``runs`` right after; the plan is left empty.

    Raises:
        RuntimeError: the backend that was asked for, or every backend, cannot serve the call.
    """
    rejected: list[tuple[str, str]] = []
    override = _override()
    if override is not None:
        why = SERVES[override.name](problem)
        if not why:
            return Explanation(override.name, "", f"asked for by {override.source}")
        if override.strict:
            raise RuntimeError(
                f"{override.source}: the {override.name} backend cannot serve this call: {why}; "
                f"to let another backend run it, {override.undo}"
            )
        rejected.append((override.name, why))
    if problem.device == "cuda" and not problem.transforms:
        from fastrnn.gpu import choice

        best = choice.choose(problem, runs)
        if best is not None:
            others = [each for each in best.rejected if each not in rejected]
            return Explanation(best.backend, "", best.reason, rejected + others)
    for name, reason in _candidates(problem):
        why = SERVES[name](problem)
        if not why:
            return Explanation(name, "", reason, rejected)
        if (name, why) not in rejected:
            rejected.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
    raise RuntimeError(
        f"no backend can serve this call ({reasons}); use a floating-point input and weights, "
        "float32 for speed"
    )


def choose(
    cell: str,
    input: Tensor,
    batch: Batch,
    sizes: tuple[int, int, int, int],
    training: bool,
    return_cells: bool,
    recompute: bool,
    regularisers: str = "",
    highway: tuple[int, int, bool] = (1, 0, False),
) -> tuple[str, str]:
    """The backend of a call and its plan ("" leaves it to the backend).

    Args:
        sizes: hidden_size, proj_size, directions, num_layers.
        training: gradients are recorded.
        regularisers: names those that have an effect.
        highway: depth, gates and gate_masks of a Recurrent Highway Network.
    """
    if (
        not _in_force
        and not CPU_MISSING
        and input.is_cpu
        and input.dtype in CPU_DTYPES
        and (
            is_compiling()
            or not handed_over(
                cell,
                input.dtype,
                training,
                batch.steps,
                batch.size,
                sizes[0],
                not (batch.batch_sizes is not None or sizes[1] or regularisers),
            )
        )
        and sizes[0]
        and input.size(-1)
        and not transformed()
    ):
        backend = "cpu"
    else:
        options = (return_cells, recompute, regularisers, highway)
        backend = settle(_problem(cell, input, batch, sizes, training, *options))
    if backend != "cpu":
        return backend, backend if backend in ("cuda", "triton") else ""
    rounds = cell in BF16_CELLS and not training and input.dtype == torch.float32
    return backend, "bf16" if rounds and bf16_allowed() and bf16_pays(batch.size) else ""


def settled() -> bool | None:
    """Whether bfloat16 weights are allowed; None under an override or a transform. While this and
    the arguments stay, ``choose`` returns the same in eager mode."""
    if _in_force or transformed():
        return None
    return bf16_allowed()


def settle(problem: Problem) -> str:
    """The backend of a call; where it is not the one asked for, ``use_backend`` hears of it."""
    found, override = decide(problem, runs=True), _override()
    if override is not None and found.backend != override.name and not is_compiling():
        override.fallbacks.append((override.name, found.backend, found.rejected[0][1]))
    return found.backend


def _problem(
    cell: str,
    input: Tensor,
    batch: Batch,
    sizes: tuple[int, int, int, int],
    training: bool,
    return_cells: bool,
    recompute: bool,
    regularisers: str,
    highway: tuple[int, int, bool],
) -> Problem:
    (hidden, proj, directions, layers), (depth, gates, gate_masks) = sizes, highway
    return Problem(
        cell=cell,
        device=input.device.type,
        dtype=input.dtype,
        training=training,
        steps=batch.steps,
        batch=batch.size,
        input_size=input.size(-1),
        hidden_size=hidden,
        proj_size=proj,
        directions=directions,
        num_layers=layers,
        packed=batch.batch_sizes is not None,
        lengths=batch.lengths is not None,
        reset=batch.reset is not None,
        return_cells=return_cells,
        recompute=recompute and not cell.startswith("rnn"),
        transforms=transformed(),
        depth=depth,
        gates=gates,
        regularisers=regularisers,
        gate_masks=gate_masks,
        ordinal=input.device.index,
    )


def _functorch_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


# Asked while tracing, where the transforms that are traced are entered; nothing to guard on.
_functorch_is_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether tensors may carry what the native library does not see: a level of torch.func's
    transforms, or a tangent. Traced code would take the operators for constants there."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on the input's device; float64 is left alone, as in torch."""
    if not torch._C._is_any_autocast_enabled() or input.dtype == torch.float64:
        return None
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def explain_call(
    cell: str,
    input: Tensor,
    batch: Batch,
    sizes: tuple[int, int, int, int],
    training: bool,
    return_cells: bool = False,
    recompute: bool = False,
    regularisers: str = "",
    highway: tuple[int, int, bool] = (1, 0, False),
) -> Explanation:
    """What ``choose`` would choose with the same arguments, and why; nothing runs."""
    options = (return_cells, recompute, regularisers, highway)
    problem = _problem(cell, input, batch, sizes, training, *options)
    found = decide(problem)
    return Explanation(found.backend, _plan(found.backend, problem), found.reason, found.rejected)


def _plan(backend: str, p: Problem) -> str:
    noise = f", {p.regularisers}" if p.regularisers else ""
    if backend in PLANS:
        return PLANS[backend](p) + noise
    if backend != "cpu":
        return "a Python loop over the steps" + noise
    from fastrnn.backends import cpu

    precision = ""
    if p.dtype == torch.float32 and bf16_allowed():
        if p.cell not in BF16_CELLS:
            precision = "float32 (no bf16 weights for this cell), "
        elif p.training:
            precision = "float32 (bf16 weights are for inference only), "
        elif bf16_pays(p.batch):
            precision = "bf16 weights, "
        else:
            precision = "float32 (bf16 weights pay up to 4 rows on this CPU), "
    threads = torch.get_num_threads()
    plans: dict[str, list[str]] = {}
    out = p.proj_size or p.hidden_size
    for k in range(p.num_layers):
        wide = p.input_size if k == 0 else p.directions * out
        text: Any
        if p.cell == "rhn":
            from fastrnn.backends import cpu_rhn

            text = cpu_rhn.plan(
                p.depth, p.gates, p.steps, p.batch, wide, p.hidden_size, p.directions, p.dtype,
                threads,
            )  # fmt: skip
        else:
            text = cpu.plan(
                p.cell, p.steps, p.batch, wide, p.hidden_size, p.proj_size, p.directions, p.dtype,
                threads, p.training,
            )  # fmt: skip
        plans.setdefault(str(text), []).append(str(k))
    if len(plans) == 1:
        return precision + next(iter(plans)) + noise
    each = (f"layers {', '.join(k)}: {text}" for text, k in plans.items())
    return precision + "; ".join(each) + noise


_MODES = {
    "LSTM": "lstm",
    "GRU": "gru",
    "RNN_TANH": "rnn_tanh",
    "RNN_RELU": "rnn_relu",
    "RHN": "rhn",
}


def _not_ours(module: Any) -> str:
    """Why a recurrent module of another library is left to its own forward."""
    kind = type_before_parametrizations(module)
    name = kind.__name__
    if kind.__module__.startswith("torch."):
        return f"this is torch.nn.{name}; fastrnn.replace(model) swaps it for fastrnn.{name}"
    base = next(each.__name__ for each in kind.__mro__ if each.__module__.startswith("torch."))
    return (f"{name} is a subclass of torch.nn's {base}, which fastrnn.replace leaves alone; "
            "derive it from fastrnn's class to run on its kernels")  # fmt: skip


def explain(
    module: Any,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Any = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
) -> Explanation:
    """Why ``module(input, hx, ...)`` runs where it runs; nothing is computed.

    Args:
        module: a recurrent module or cell of fastrnn or torch.nn.

    Raises:
        TypeError: ``module`` is neither.
        RuntimeError, TypeError, ValueError: as the call itself raises.
    """
    if hasattr(module, "_explain"):
        return cast(Explanation, module._explain(input, hx, lengths, reset, return_cells))
    if not isinstance(module, (RNNBase, RNNCellBase)):
        raise TypeError(
            f"module: got {type(module).__name__}, expected an LSTM, GRU, RNN, RHN or BNLSTM, or "
            "a cell; for a whole model explain its recurrent modules one by one"
        )
    if not hasattr(type(module), "_natively"):  # that of all our modules, and of no other
        return Explanation("torch", "torch.nn's own choice", _not_ours(module))
    batch_sizes: Tensor | None = None
    if isinstance(input, PackedSequence):
        batch_sizes, input = input.batch_sizes, input.data
    states = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    tensors = [input, *states, *module.parameters()]
    records = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    recompute = getattr(module, "recompute", False)
    batch_first = getattr(module, "batch_first", False)
    if isinstance(module, RNNCellBase):
        input = input.reshape(1, -1, input.size(-1))
        cell = "lstm" if isinstance(module, LSTMCell) else "gru"
        if not isinstance(module, (LSTMCell, GRUCell)):
            cell = f"rnn_{module.nonlinearity}"
        sizes = (module.hidden_size, 0, 1, 1)
    else:
        cell = _MODES[module.mode]
        directions = 2 if module.bidirectional else 1
        sizes = (module.hidden_size, module.proj_size, directions, module.num_layers)
        if batch_sizes is None and input.dim() == 2:
            where = 0 if batch_first else 1
            input = input.unsqueeze(where)
            if reset is not None and reset.dim() == 1:
                reset = reset.unsqueeze(where)
        module.check_input(input, batch_sizes)
    if cell == "gru" and not getattr(module, "reset_after", True):
        cell = "gru_reset_before"
    if getattr(module, "layer_norm", False):
        cell += "_layer_norm"
    batch = describe(
        input, batch_first=batch_first, batch_sizes=batch_sizes, lengths=lengths, reset=reset
    )
    half = autocast_dtype(input)
    if half is not None:
        input = input.to(half)
    active = getattr(module, "_active_regularisers", None)
    regularisers = "" if active is None else active()
    highway = cast(Any, module)._highway() if cell == "rhn" else (1, 0, False)
    options = (return_cells, recompute, regularisers, highway)
    return explain_call(cell, input, batch, sizes, records, *options)
