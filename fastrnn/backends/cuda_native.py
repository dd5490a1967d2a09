"""The native CUDA library: whether it can run, which kernel a layer gets, launches, its error word.

Everything goes to torch's current stream of the tensors' device, and nothing waits for the device.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.backends.rows import tf32_allowed
from fastrnn.kinds import KINDS

try:
    from fastrnn import _cuda

    _import_error: ImportError | None = None
except ImportError as error:  # not built, the usual case on a machine without a GPU
    _import_error = error

__all__ = [
    "CELLS",
    "Launcher",
    "Plan",
    "candidates",
    "choose",
    "describe_plans",
    "emulated",
    "missing",
    "padded",
    "raise_if_failed",
    "refusal",
]

CELLS = frozenset(name for name, kind in KINDS.items() if not kind.norms)
_FORMATS = {torch.bfloat16: 0, torch.float16: 1}
_NAMES = ("bf16", "fp16", "tf32", "bf16x3")


class Plan(NamedTuple):
    """One compiled kernel for a problem; ``refused`` says why it cannot run.

    ``groups`` of ``rows`` batch rows and ``ctas`` CTAs run at a time, for each direction; a batch
    takes ``launches``.
    """

    text: str
    refused: str
    exchange: str
    kernel: tuple[int, ...]
    rows: int
    groups: int
    ctas: int
    launches: int

    @property
    def through_memory(self) -> bool:
        """Whether CTAs exchange rows through global memory, the mail."""
        return self.exchange in ("sentinel", "flags")


def missing() -> str:
    """Why the library cannot be called at all; empty if it can."""
    if _import_error is not None and find_spec("fastrnn._cuda") is not None:
        return f"the CUDA library does not load: {_import_error}"
    if _import_error is not None:
        return (
            "the CUDA library is not built; where nvcc is, `FASTRNN_CUDA=on pip install .` in the "
            "source tree builds it"
        )
    if emulated():
        return ""
    here = torch.cuda.is_available()
    try:
        # The library makes the device it is asked about the current one, for torch as well.
        _cuda.device(torch.cuda.current_device() if here else 0)
    except RuntimeError as error:
        return f"the CUDA library is built, but it finds no GPU it can use: {error}"
    return "" if here else "the CUDA library finds a GPU, this build of torch does not"


def emulated() -> bool:
    """Whether this is the library of the tests, whose device is a program and its memory ours."""
    return _import_error is None and bool(_cuda.emulated)


def _format(dtype: torch.dtype) -> int:
    """float32 is computed in TF32 where the switch of cuDNN's recurrent layers allows it, else with
    weights and states of two bfloat16 each."""
    found = _FORMATS.get(dtype)
    return (2 if tf32_allowed() else 3) if found is None else found


def padded(hidden: int, dtype: torch.dtype) -> int:
    """A hidden size as rows of 16-byte vectors have it."""
    vector = 16 // dtype.itemsize
    return -(-hidden // vector) * vector


_numbers: dict[int, tuple[int, ...]] = {}
_chosen: dict[tuple[object, ...], Plan] = {}


def _device(ordinal: int) -> tuple[int, ...]:
    if ordinal not in _numbers:
        _numbers[ordinal] = _cuda.device(ordinal)
    return _numbers[ordinal]


def candidates(
    cell: str,
    dtype: torch.dtype,
    backward: bool,
    size: int,
    hidden: int,
    directions: int,
    ordinal: int,
    most_ctas: int = 0,
) -> list[Plan]:
    """All kernels for a layer, those that can run first, the fastest by the cost model first.

    ``most_ctas`` stands for the device's own number of multiprocessors where it is not 0.
    """
    numbers = _device(ordinal)
    if most_ctas:
        numbers = (most_ctas, *numbers[1:])
    # An empty batch, which only explain asks about, has the plan of one row.
    problem = (KINDS[cell].number, _format(dtype), backward, max(size, 1), hidden, directions)
    return [Plan(*fields) for fields in _cuda.plans(numbers, problem)]


def choose(
    cell: str,
    dtype: torch.dtype,
    backward: bool,
    size: int,
    hidden: int,
    directions: int,
    ordinal: int,
    exchange: str = "",
) -> Plan:
    """The first kernel of ``candidates`` that the driver agrees to hold as a whole.

    Raises:
        RuntimeError: none can run; the reasons are in the message.
    """
    problem = (cell, dtype, backward, size, hidden, directions, ordinal)
    key = (*problem, _format(dtype), exchange)
    found = _chosen.get(key)
    if found is not None:
        return found
    reasons = []
    for plan in candidates(*problem):
        if exchange and plan.exchange != exchange:
            continue
        if not plan.refused:
            most = _cuda.resident_ctas(ordinal, plan.kernel, plan.ctas)
            if directions * plan.groups * plan.ctas > most:
                same = [p for p in candidates(*problem, most) if p.kernel == plan.kernel]
                plan = same[0] if most else plan._replace(refused="the driver holds no CTA of it")
        if not plan.refused:
            if len(_chosen) >= 1024:  # as many shapes as no program keeps coming back to
                _chosen.clear()
            _chosen[key] = plan
            return plan
        reasons.append(f"{plan.exchange} of {plan.rows} rows: {plan.refused}")
    raise RuntimeError(
        f"no {_NAMES[_format(dtype)]} kernel takes a hidden size of {hidden} in {directions} "
        f"direction(s) ({'; '.join(dict.fromkeys(reasons)) or f'none with exchange {exchange}'})"
    )


def refusal(cell: str, dtype: torch.dtype, hidden: int, directions: int) -> str:
    """Why a layer cannot run on the current device, whatever its batch; empty if it can."""
    ordinal = _current()
    try:
        for backward in (False, True):
            choose(cell, dtype, backward, 1, hidden, directions, ordinal)
    except RuntimeError as error:
        return str(error)
    return ""


def describe_plans(
    cell: str, dtype: torch.dtype, training: bool, size: int, hidden: int, directions: int
) -> str:
    """What the kernels will do, and what became of the others, in words for ``explain``."""
    ordinal, words = _current(), []
    for backward in (False, True)[: 1 + training]:
        problem = (cell, dtype, backward, size, hidden, directions, ordinal)
        chosen = choose(*problem)
        others = [p.text for p in candidates(*problem) if p.kernel != chosen.kernel]
        words.append(
            f"{'backward' if backward else 'forward'}: {chosen.text}"
            + (f" (instead of: {' | '.join(others)})" if others else "")
        )
    return f"{_NAMES[_format(dtype)]}; {'; '.join(words)}"


def _current() -> int:
    return 0 if emulated() else torch.cuda.current_device()


# A word for each device that a CTA sets when it waited for too long. In pinned host memory: the
# host looks at it without asking the device, and so also where launches are being captured.
_errors: dict[int, Tensor] = {}


def _error_word(ordinal: int) -> Tensor:
    if ordinal not in _errors:
        cpu = torch.device("cpu")
        word = torch.zeros(1, dtype=torch.int32, device=cpu)
        _errors[ordinal] = word if emulated() else word.pin_memory()
    return _errors[ordinal]


def raise_if_failed(ordinal: int = 0) -> None:
    """Raise if a launch on this device, of those that have ended so far, gave up waiting.

    Every call looks here first, so a failure is reported by the call after it; to have it at once,
    ``torch.cuda.synchronize()`` and this function.

    Raises:
        RuntimeError: it did; the next calls run as if nothing had been.
    """
    word = _errors.get(ordinal)
    if word is None or not int(word[0]):
        return
    word.zero_()
    raise RuntimeError(
        f"fastrnn CUDA library: in an earlier call on cuda:{ordinal} a part of the grid waited "
        "more than four seconds for another; the results of that call and of all since are wrong. "
        "Another program that holds the GPU can be the cause; fastrnn.use_backend('torch') avoids "
        "these kernels"
    )


class Launcher:
    """Kernels of one plan on the current stream of a tensor's device, which is the current one."""

    def __init__(self, like: Tensor, plan: Plan, hidden: int, directions: int) -> None:
        self.plan, self.hidden, self.directions = plan, hidden, directions
        if like.is_cuda:
            stream = torch.cuda.current_stream(like.device)
            self.where = (like.device.index, stream.cuda_stream)
        elif emulated():
            self.where = (0, 0)
        else:
            raise RuntimeError(f"the input is on {like.device}, these kernels run on a GPU")
        self.error = _error_word(self.where[0])
        flags = directions * plan.groups * plan.ctas * _cuda.flag_bytes
        used = plan.exchange == "flags"
        self.flags = like.new_empty(flags, dtype=torch.uint8) if used else None

    def pack(self, matrices: list[Tensor]) -> list[int]:
        """Recurrent weights as the kernel wants them, kept here: addresses of each direction's."""
        size = _cuda.packed_bytes(self.plan.kernel, self.plan.ctas)
        self.packed = matrices[0].new_empty((len(matrices), size), dtype=torch.uint8)
        addresses = [self.packed.data_ptr() + d * size for d in range(len(matrices))]
        for matrix, to in zip(matrices, addresses, strict=True):
            _cuda.pack(
                *self.where, self.plan.kernel, matrix.data_ptr(), to, self.hidden, self.plan.ctas
            )
        return addresses

    def prepare_mail(self, mail: Tensor) -> None:
        _cuda.prepare_mail(*self.where, mail.data_ptr(), mail.numel() * mail.element_size())

    def parts(self, size: int) -> list[tuple[int, int]]:
        """The batch rows of each launch, first and end."""
        each = self.plan.groups * self.plan.rows
        return [(n, min(n + each, size)) for n in range(0, size, each)]

    def __call__(
        self,
        steps: int,
        size: int,
        lengths: int,
        reset: Tensor | None,
        directions: tuple[int, ...],
    ) -> None:
        """One launch for ``size`` rows; address of their lengths, fields of the directions."""
        flags = 0
        if self.flags is not None:
            flags = self.flags.data_ptr()
            _cuda.clear(*self.where, flags, self.flags.numel())
        rows, groups = self.plan.rows, self.plan.groups
        shape = (
            steps,
            size,
            self.hidden,
            self.directions,
            min(groups, -(-size // rows)),
            self.plan.ctas,
            lengths,
            0 if reset is None else reset.data_ptr(),
            flags,
            self.error.data_ptr(),
        )
        run = _cuda.backward if self.plan.kernel[2] else _cuda.forward
        run(*self.where, self.plan.kernel, shape, directions)
