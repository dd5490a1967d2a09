"""The native CUDA library: whether it can run, which kernel a layer gets, launches, its error word.

Everything goes to torch's current stream of the tensors' device, and nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid
from fastrnn.backends.rows import tf32_allowed

try:
    from fastrnn import _cuda

    _import_error: ImportError | None = None
except ImportError as error:  # not built, the usual case on a machine without a GPU
    _import_error = error

__all__ = [
    "CELLS",
    "GridTooLarge",
    "Launcher",
    "Need",
    "Plan",
    "candidates",
    "choose",
    "current",
    "describe_plans",
    "emulated",
    "launcher_of",
    "missing",
    "on",
    "on_its_device",
    "padded",
    "pair_line",
    "raise_if_failed",
    "refusal",
    "refused_grids",
    "with_next_plan",
]

# The numbers of csrc/cuda/core/geometry.h.
CELLS = {
    "lstm": 0,
    "gru": 1,
    "gru_reset_before": 2,
    "rnn_tanh": 3,
    "rnn_relu": 4,
    "rhn": 5,
    "rhn_uncoupled": 6,
    "bnlstm": 7,
    "lstm_projected": 8,
    "lstm_layer_norm": 9,
    "gru_layer_norm": 10,
}
_FORMATS = {torch.bfloat16: 0, torch.float16: 1}
_NAMES = ("bf16", "fp16", "tf32", "bf16x3")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Need(NamedTuple):
    """What a kernel is chosen by: a layer and its batch.

    Attributes:
        depth: micro-steps of a highway layer.
        regularised: recurrent dropout or zoneout act inside the kernel.
        out: outputs of a projection; 0: none.
        normed: layer norm.
        gate_masks: each gate of a highway layer has a mask of the state of its own.
    """

    cell: str
    dtype: torch.dtype
    size: int
    hidden: int
    directions: int
    depth: int = 1
    regularised: bool = False
    out: int = 0
    normed: bool = False
    gate_masks: bool = False

    @property
    def extent(self) -> int:
        """What the shared memory of a CTA grows with, beside the tile."""
        return max(self.size, 1) if self.cell == "bnlstm" else self.depth


class Plan(NamedTuple):
    """One compiled kernel for a problem; ``refused`` says why it cannot run.

    ``groups`` of ``rows`` batch rows and ``ctas`` CTAs run at a time, for each direction; a batch
    takes ``launches``. ``step_us`` is the cost model's, of all of them; 0 where the library does
    not tell.
    """

    text: str
    refused: str
    exchange: str
    kernel: tuple[int, ...]
    rows: int
    groups: int
    ctas: int
    launches: int
    step_us: float = 0.0

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


def pair_line(hidden: int) -> int:
    """Floats of a row in the mail of row statistics."""
    return int(_cuda.pair_line(hidden))


_numbers: dict[int, tuple[int, ...]] = {}
_chosen: dict[tuple[object, ...], Plan] = {}
_none: dict[tuple[object, ...], str] = {}  # why a layer has no kernel, by the same and the device
# Devices and kernels whose cooperative launch the driver refused there in this process.
_too_large: set[tuple[int, tuple[int, ...]]] = set()
_REFUSED = "too many blocks in cooperative launch"  # the runtime's words for its error 720


def refused_grids() -> int:
    """How many a driver has refused: what was chosen before the last of them is out of date."""
    return len(_too_large)


def _device(ordinal: int) -> tuple[int, ...]:
    if ordinal not in _numbers:
        _numbers[ordinal] = _cuda.device(ordinal)
    return _numbers[ordinal]


def candidates(need: Need, backward: bool, ordinal: int, most_ctas: int = 0) -> list[Plan]:
    """All kernels for a layer, those that can run first, the fastest by the cost model first.

    ``most_ctas`` stands for the device's own number of multiprocessors where it is not 0.
    """
    numbers = _device(ordinal)
    if most_ctas:
        numbers = (most_ctas, *numbers[1:])
    kind = (CELLS[need.cell], _format(need.dtype), backward, need.regularised)
    # An empty batch, which only explain asks about, has the plan of one row.
    sizes = (max(need.size, 1), need.hidden, need.directions, need.depth, need.out)
    options = (need.normed, need.gate_masks)
    return [Plan(*fields) for fields in _cuda.plans(numbers, (*kind, *sizes, *options))]


def choose(need: Need, backward: bool, ordinal: int, exchange: str = "") -> Plan:
    """The first kernel of ``candidates`` that the driver agrees to hold as a whole.

    Raises:
        RuntimeError: none can run; the reasons are in the message.
    """
    key = (need, backward, ordinal, _format(need.dtype), exchange)
    found = _chosen.get(key)
    if found is not None:
        return found
    nothing = (*key, _device(ordinal))
    if nothing in _none:
        raise RuntimeError(_none[nothing])
    reasons = []
    for plan in candidates(need, backward, ordinal):
        if exchange and plan.exchange != exchange:
            continue
        if (ordinal, plan.kernel) in _too_large:
            plan = plan._replace(refused="the driver refused its grid as too large")
        # A step that is launched by itself waits for nobody.
        if not plan.refused and plan.exchange != "steps":
            most = _cuda.resident_ctas(ordinal, plan.kernel, plan.ctas, need.extent)
            if need.directions * plan.groups * plan.ctas > most:
                fewer = candidates(need, backward, ordinal, most) if most else []
                same = [p for p in fewer if p.kernel == plan.kernel]
                plan = same[0] if same else plan._replace(refused="the driver holds no CTA of it")
        if not plan.refused:
            if len(_chosen) >= 1024:  # as many shapes as no program keeps coming back to
                _chosen.clear()
            _chosen[key] = plan
            return plan
        reasons.append(f"{plan.exchange} of {plan.rows} rows: {plan.refused}")
    what = "regularised " if need.regularised else ""
    depth = f", depth {need.depth}" if need.cell.startswith("rhn") else ""
    if len(_none) >= 1024:
        _none.clear()
    _none[nothing] = (
        f"no {what}{_NAMES[_format(need.dtype)]} kernel takes a hidden size of {need.hidden}{depth}"
        f" in {need.directions} direction(s) "
        f"({'; '.join(dict.fromkeys(reasons)) or f'none with exchange {exchange}'})"
    )
    raise RuntimeError(_none[nothing])


def refusal(need: Need) -> str:
    """Why a layer cannot run on the current device; empty if it can."""
    ordinal = current()
    try:
        for backward in (False, True):
            choose(need, backward, ordinal)
    except RuntimeError as error:
        return str(error)
    return ""


def describe_plans(need: Need, training: bool) -> str:
    """What the kernels will do, and what became of the others, in words for ``explain``."""
    ordinal, words = current(), []
    for backward in (False, True)[: 1 + training]:
        chosen = choose(need, backward, ordinal)
        listed = candidates(need, backward, ordinal)
        others = [p.text for p in listed if p.kernel != chosen.kernel]
        words.append(
            f"{'backward' if backward else 'forward'}: {chosen.text}"
            + (f" (instead of: {' | '.join(others)})" if others else "")
        )
    what = ", with regularisers" if need.regularised else ""
    return f"{_NAMES[_format(need.dtype)]}{what}; {'; '.join(words)}"


def current() -> int:
    """The current device's number."""
    return 0 if emulated() else torch.cuda.current_device()


def on(ordinal: int | None) -> AbstractContextManager[Any]:
    """The device is the current one, None leaves that as it is: the backends are asked about it."""
    if ordinal is None or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.device(ordinal)


# A word for each device that a CTA sets when it waited for too long. In pinned host memory: the
# host looks at it without asking the device, and so also where launches are being captured.
_errors: dict[int, Tensor] = {}


def _error_word(ordinal: int) -> Tensor:
    if ordinal not in _errors:
        cpu = torch.device("cpu")
        with torch.inference_mode(False):  # written to in calls of every mode
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


class GridTooLarge(RuntimeError):
    """The driver does not hold a kernel's whole grid at once; other kernels may do."""

    def __init__(self, ordinal: int, kernel: tuple[int, ...]) -> None:
        super().__init__("fastrnn CUDA library: " + _REFUSED)
        self.where = (ordinal, kernel)


def with_next_plan(function: _Function) -> _Function:
    """Again with the next plan, where the driver refuses the grid of the one that was chosen."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return function(*args, **kwargs)
            except GridTooLarge as error:
                if error.where in _too_large:
                    raise
                _too_large.add(error.where)
                _chosen.clear()

    return cast("_Function", call)


class Launcher:
    """Kernels of one plan on the current stream of a tensor's device, which is the current one."""

    def __init__(self, like: Tensor, plan: Plan, need: Need) -> None:
        self.plan, self.need, self._like = plan, need, like
        self.where, self.error = _place(like)
        self._kept: list[Tensor] = []
        flags = need.directions * plan.groups * plan.ctas * _cuda.flag_bytes
        used = plan.exchange == "flags"
        self.flags = like.new_empty(flags, dtype=torch.uint8) if used else None

    @property
    def number_format(self) -> int:
        """The library's number of the kernel's format."""
        return self.plan.kernel[1]

    def pack(self, matrices: Sequence[Tensor], projections: Sequence[Tensor] = ()) -> list[int]:
        """Recurrent weights as the kernel wants them, kept here: addresses of each direction's.

        ``matrices``: of each direction (G*H, H), or (L, G*H, H) for the slabs of L micro-steps;
        ``projections``: of an LSTM that has them (P, H), and then the matrices are (4*H, P).
        """
        width = projections[0].size(0) if projections else 0
        folded = [p.contiguous() for p in projections]
        slabs = [m.contiguous().view(-1, *m.shape[-2:]) for m in matrices]
        depth = slabs[0].size(0)
        size = _cuda.packed_bytes(self.plan.kernel, self.plan.ctas)
        self.packed = matrices[0].new_empty((len(slabs), depth * size), dtype=torch.uint8)
        addresses = [self.packed.data_ptr() + d * depth * size for d in range(len(slabs))]
        for d, (own, to) in enumerate(zip(slabs, addresses, strict=True)):
            onto = folded[d].data_ptr() if folded else 0
            for level, matrix in enumerate(own.unbind(0)):
                _cuda.pack(
                    *self.where, self.plan.kernel, matrix.data_ptr(), to + level * size,
                    self.need.hidden, self.plan.ctas, onto, width,
                )  # fmt: skip
        return addresses

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, whose memory stays its own as long as this launcher."""
        self._kept.append(tensor)
        return tensor

    def prepare_mail(self, mail: Tensor) -> None:
        _cuda.prepare_mail(*self.where, mail.data_ptr(), mail.numel() * mail.element_size())

    def parts(self, size: int) -> list[tuple[int, int]]:
        """The batch rows of each launch, first and end."""
        each = self.plan.groups * self.plan.rows
        return [(n, min(n + each, size)) for n in range(0, size, each)]

    def start(
        self, run: str, grid: Grid, part: tuple[int, int], directions: Sequence[int], *rest: Any
    ) -> None:
        """One launch by the library's function ``run`` for a part of the batch.

        ``directions``: the fields of all directions; ``rest``: what the function takes beside them.
        """
        flags = 0
        if self.flags is not None:
            flags = self.flags.data_ptr()
            _cuda.clear(*self.where, flags, self.flags.numel())
        first, end = part
        reset = grid.reset_of(first, end)
        shape = (
            grid.steps,
            end - first,
            self.need.hidden,
            self.need.directions,
            min(self.plan.groups, -(-(end - first) // self.plan.rows)),
            self.plan.ctas,
            grid.lengths_at(first),
            0 if reset is None else reset.data_ptr(),
            flags,
            self.error.data_ptr(),
        )
        function = getattr(_cuda, run)
        try:
            function(*self.where, self.plan.kernel, shape, tuple(directions), *rest)
        except RuntimeError as error:
            if _REFUSED not in str(error):
                raise
            raise GridTooLarge(self.where[0], self.plan.kernel) from error

    def steps(
        self,
        run: str,
        shape: tuple[int, ...],
        weights: tuple[int, ...],
        directions: Sequence[int],
        *rest: Any,
    ) -> None:
        """All launches of a call by the library's function ``run``, with scratch of its own."""
        size = _cuda.steps_workspace_bytes(self.plan.kernel, shape)
        device = self._like.device
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        getattr(_cuda, run)(
            *self.where, self.plan.kernel, shape, weights, tuple(directions), *rest,
            workspace.data_ptr(),
        )  # fmt: skip

    def mask_states(self, noise: tuple[Any, ...], states: Sequence[int]) -> None:
        """The library's function of that name, in the kernel's format."""
        _cuda.mask_states(*self.where, self.number_format, noise, tuple(states))


def _place(like: Tensor) -> tuple[tuple[int, int], Tensor]:
    """Device and stream of a tensor's calls, and the device's error word."""
    if like.is_cuda:
        stream = torch.cuda.current_stream(like.device)
        where = (like.device.index, stream.cuda_stream)
    elif emulated():
        where = (0, 0)
    else:
        raise RuntimeError(f"the input is on {like.device}, these kernels run on a GPU")
    return where, _error_word(where[0])


def launcher_of(need: Need, like: Tensor, backward: bool, plan: str) -> Launcher:
    """The kernel of a layer's forward or backward; ``plan`` is the operator's.

    Raises:
        RuntimeError: there is none, the library cannot be called, or an earlier launch failed.
    """
    why = missing()
    if why:
        raise RuntimeError(why)
    ordinal = like.device.index if like.is_cuda else 0
    raise_if_failed(ordinal)
    found = choose(need, backward, ordinal, plan.partition(",")[2])
    return Launcher(like, found, need)


def on_its_device(function: _Function) -> _Function:
    """The library makes the device of a call the current one: torch is told, and puts it back."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return function(*args)

    return cast("_Function", call)
