"""Backends: each runs the layers of ``fastrnn.functional`` in its own way.

cpu        the native CPU library, through the operators of ``fastrnn.ops``
cuda       the native CUDA library, through the same operators
triton     Triton kernels, through the same operators
torch      torch's own kernels (those behind torch.nn), the whole stack in one call
reference  ``fastrnn.reference``: plain PyTorch, any device and floating dtype
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.compiler import is_compiling

from fastrnn.backends import torch_nn
from fastrnn.backends.triton.plan import LEAST_SHARED, MOST_SHARED, SHARED, choose, refusal
from fastrnn.backends.triton.plan import Plan as TritonPlan
from fastrnn.kinds import GATES

__all__ = [
    "CPU_DTYPES",
    "CPU_MISSING",
    "NAMES",
    "PLANS",
    "SERVES",
    "Problem",
    "cuda_missing",
    "cuda_plans",
    "triton_numbers",
    "triton_plan",
    "triton_shared_memory",
]

NAMES = ("cpu", "cuda", "triton", "torch", "reference")

CPU_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16))
_FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class Problem(NamedTuple):
    """One call, as far as the choice of a backend depends on it.

    ``training`` means that gradients are recorded, not the module's mode. ``regularisers`` names
    recurrent dropout, zoneout and weight dropout that have an effect on the call. ``given`` is the
    dtype of the tensors where the other backends compute in the wider ``dtype``; ``gate_masks``
    that each gate of a Recurrent Highway Network has a mask of the state of its own; ``ordinal``
    the number of the input's device, None for the current one.
    """

    cell: str
    device: str
    dtype: torch.dtype
    training: bool
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    proj_size: int
    directions: int
    num_layers: int
    packed: bool = False
    lengths: bool = False
    reset: bool = False
    return_cells: bool = False
    recompute: bool = False
    transforms: bool = False
    depth: int = 1
    gates: int = 0
    process_group: bool = False
    regularisers: str = ""
    given: torch.dtype | None = None
    gate_masks: bool = False
    ordinal: int | None = None


def _probe_cpu() -> str:
    """Why the native CPU library cannot be used; empty if it can."""
    try:
        from fastrnn.backends import cpu
    except ImportError as error:
        return f"the native CPU library does not load: {error}"
    usable, reason = cpu.available()
    return "" if usable else reason


# Asked once: the answer cannot change in a process, and a traced call must not ask.
CPU_MISSING = _probe_cpu()


def _serves_cpu(p: Problem) -> str:
    if p.device not in ("cpu", "meta"):
        return f"the input is on {p.device}"
    if CPU_MISSING:
        return CPU_MISSING
    if p.dtype not in CPU_DTYPES:
        return f"it has no {p.dtype} kernels, only float32, bfloat16 and float64"
    if p.process_group:
        return "its kernels see one process, statistics over a process group need collectives"
    if not p.hidden_size or not p.input_size:
        return "it has no kernels for an input or hidden size of 0"
    if p.transforms:
        return "torch.func transforms need operations they can see into"
    return ""


def _serves_torch(p: Problem) -> str:
    if p.cell == "bnlstm":
        return "torch.nn has no batch-normalised LSTM"
    missing = [
        name
        for name, used in (
            ("Recurrent Highway Network", p.cell == "rhn"),
            ("reset_after=False", p.cell == "gru_reset_before"),
            ("lengths", p.lengths),
            ("reset", p.reset),
            ("return_cells", p.return_cells),
            ("recompute", p.recompute),
            ("layer_norm", p.cell.endswith("_layer_norm")),
            (p.regularisers, p.regularisers),
        )
        if used
    ]
    if missing:
        return f"torch.nn has no {', '.join(missing)}"
    if p.dtype not in _FLOATING:
        return f"it has no {p.dtype} kernels"
    if not p.hidden_size:
        return "it has no LSTM without hidden units"
    if p.dtype == torch.float16 and p.device == "cpu" and p.cell == "lstm" and p.training:
        return "oneDNN has no float16 LSTM training on the CPU"
    return ""


def _serves_reference(p: Problem) -> str:
    return "" if p.dtype in _FLOATING else f"it computes in floating point, not in {p.dtype}"


_Answer = TypeVar("_Answer", str, int)
_GPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def _constant(function: Callable[[], _Answer]) -> Callable[[], _Answer]:
    """Asked once, and a constant in traced code: what torch's assume_constant_result would set."""
    known: list[_Answer] = []

    def ask() -> _Answer:
        if not known:
            known.append(function())
        return known[0]

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


@_constant
def _triton_interprets() -> str:
    """Why Triton cannot run on the CPU; empty where its interpreter is on."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return (
            "the input is on cpu, where Triton only runs under its interpreter "
            "(TRITON_INTERPRET=1 in the environment before triton is imported)"
        )
    triton = sys.modules.get("triton.language")
    if triton is not None and type(triton.zeros).__name__ == "JITFunction":
        return "triton was imported before TRITON_INTERPRET was set"
    return ""


@_constant
def _triton_missing() -> str:
    return "" if find_spec("triton") else "triton is not installed: pip install triton"


_of_devices: dict[tuple[object, int], Any] = {}


def _of_the_device(function: Callable[[int], _Answer]) -> Callable[[int | None], _Answer]:
    """As ``_constant``, for each device; None is the current one, -1 that torch finds none."""

    def ask(ordinal: int | None) -> _Answer:
        if not torch.cuda.is_available():
            ordinal = -1
        elif ordinal is None:
            ordinal = torch.cuda.current_device()
        key = (function, ordinal)
        if key not in _of_devices:
            _of_devices[key] = function(ordinal)
        return cast("_Answer", _of_devices[key])

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


@_of_the_device
def _shared_memory(ordinal: int) -> int:
    if ordinal < 0:
        return SHARED
    properties = torch.cuda.get_device_properties(ordinal)
    found = getattr(properties, "shared_memory_per_block_optin", 0)  # not in torch 2.6
    if found or torch.version.hip is not None:
        return int(found) or LEAST_SHARED
    capability = (properties.major, properties.minor)
    return MOST_SHARED.get(capability, LEAST_SHARED)


def triton_shared_memory(device: str, ordinal: int | None) -> int:
    """Bytes that a program may have on a GPU, or what stands for it where there is none."""
    return _shared_memory(ordinal) if device == "cuda" else SHARED


@_of_the_device
def _triton_gpu(ordinal: int) -> str:
    """Why no kernel runs on a GPU; empty if one does."""
    if ordinal < 0:
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability(ordinal)
    if torch.version.hip is None and major < 8:
        return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def _serves_triton(p: Problem) -> str:
    if p.device not in ("cpu", "cuda"):
        return f"the input is on {p.device}"
    why = _triton_gpu(p.ordinal) if p.device == "cuda" else _triton_interprets()
    why = why or _triton_missing()
    if why:
        return why
    if p.dtype not in _GPU_DTYPES:
        return f"it has no {p.dtype} kernels, only float32, bfloat16 and float16"
    if p.process_group:
        return "its kernels see one process, statistics over a process group need collectives"
    if not p.hidden_size or not p.input_size:
        return "it has no kernels for an input or hidden size of 0"
    if p.transforms:
        return "torch.func transforms need operations they can see into"
    if p.cell.endswith("_layer_norm"):
        return "it has no kernels with layer_norm"
    if p.cell == "bnlstm" and p.device == "cuda" and is_compiling():
        return "a program has the whole batch, whose size is not known in a traced call"
    shared = triton_shared_memory(p.device, p.ordinal)
    return refusal(p.cell, p.hidden_size, p.dtype.itemsize, p.batch, shared)


def triton_numbers(p: Problem) -> tuple[TritonPlan, int]:
    """How the Triton kernels cut a layer up, and how many recurrent matrices it has."""
    count = GATES | {"rhn": p.gates, "bnlstm": 4}
    out = p.proj_size or p.hidden_size
    sizes = (p.hidden_size, out, p.dtype.itemsize, p.batch, p.directions)
    plan = choose(p.cell, count[p.cell], *sizes, triton_shared_memory(p.device, p.ordinal))
    return plan, count[p.cell] + (out != p.hidden_size)


def triton_plan(p: Problem) -> str:
    """What the Triton kernels will do, in words for ``explain``."""
    return str(triton_numbers(p)[0])


@_constant
def cuda_missing() -> str:
    """Why the native CUDA library cannot be called on this machine; empty if it can."""
    from fastrnn.backends import cuda_native

    return cuda_native.missing()


@_constant
def _cuda_on_cpu() -> str:
    """Why the native CUDA library takes no tensor on the CPU; empty where it is the tests' own."""
    module = sys.modules.get("fastrnn._cuda")
    return "" if module is not None and module.emulated else "the input is on cpu"


def _acts_in_kernel(p: Problem) -> bool:
    """Whether there are regularisers that a kernel has to have; weights are dropped before it."""
    names = p.regularisers.split(", ") if p.regularisers else []
    return any(not name.startswith("weight dropout") for name in names)


def _cuda_need(p: Problem) -> tuple[Any, ...]:
    """The arguments of ``cuda_need.need_of``."""
    cell = "rhn_uncoupled" if p.cell == "rhn" and p.gates == 3 else p.cell
    sizes = (p.batch, p.hidden_size, p.directions, p.depth)
    return cell, p.given or p.dtype, *sizes, _acts_in_kernel(p), p.proj_size, p.gate_masks


def _cuda_refusal(ordinal: int | None, *need: Any) -> str:
    from fastrnn.backends import cuda_native, cuda_need

    with cuda_native.on(ordinal):
        return cuda_native.refusal(cuda_need.need_of(*need))


# As _constant, for each of its arguments.
_cuda_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _serves_cuda(p: Problem) -> str:
    if p.device not in ("cpu", "cuda"):
        return f"the input is on {p.device}"
    why = (_cuda_on_cpu() if p.device == "cpu" else "") or cuda_missing()
    if why:
        return why
    if p.dtype not in _GPU_DTYPES:
        return f"it has no {p.dtype} kernels, only float32, bfloat16 and float16"
    if p.transforms:
        return "torch.func transforms need operations they can see into"
    if p.process_group:
        return "its kernels see one process, statistics over a process group need collectives"
    if not p.hidden_size or not p.input_size:
        return "it has no kernels for an input or hidden size of 0"
    cell, dtype, _, *sizes = _cuda_need(p)
    return _cuda_refusal(p.ordinal, cell, dtype, 1, *sizes)


def cuda_plan(p: Problem) -> str:
    """What the CUDA kernels will do, in words for ``explain``."""
    from fastrnn.backends import cuda_native, cuda_need

    with cuda_native.on(p.ordinal):
        return cuda_native.describe_plans(cuda_need.need_of(*_cuda_need(p)), p.training)


def cuda_plans(p: Problem) -> list[Any]:
    """The ``cuda_native.Plan`` of forward and backward; RuntimeError where there is none."""
    from fastrnn.backends import cuda_native, cuda_need

    with cuda_native.on(p.ordinal):
        need, ordinal = cuda_need.need_of(*_cuda_need(p)), cuda_native.current()
        return [cuda_native.choose(need, backward, ordinal) for backward in (False, True)]


SERVES = {
    "cpu": _serves_cpu,
    "cuda": _serves_cuda,
    "triton": _serves_triton,
    "torch": _serves_torch,
    "reference": _serves_reference,
}

# What a backend will do with a call, in words; the native CPU library says it for each layer.
PLANS: dict[str, Callable[[Problem], str]] = {
    "cuda": cuda_plan,
    "triton": triton_plan,
    "torch": lambda p: torch_nn.plan(p.cell),
}
