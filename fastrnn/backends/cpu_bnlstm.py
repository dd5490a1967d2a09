"""The batch-normalised LSTM's ops on the native CPU library; see ``fastrnn.backends.cpu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastrnn.backends import cpu
from fastrnn.backends.cpu_memory import kept, kept_like, maker, output

__all__ = [
    "BNLSTMCall",
    "bnlstm_backward",
    "bnlstm_forward",
    "follow",
    "inference_layer",
    "plan",
]

_TERMS = 3  # input term, recurrent term, cell
_STATISTICS = 2 * _TERMS + 1  # means, variances and a count of batches, per direction


def _library() -> Any:
    """The native module; absent from a tree without a build, where no call comes this far."""
    return cpu._cpu  # type: ignore[attr-defined]


def _problem(
    x: Tensor,
    shape: tuple[int, int],
    directions: int,
    hidden: int,
    batch_stats: bool,
    sequence: bool,
    eps: float,
    plan: str,
) -> tuple[float, ...]:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x: got {x.dtype}, a batch-normalised LSTM has CPU kernels of float32 and float64; "
            "convert it, as fastrnn.functional.bnlstm does"
        )
    if plan and (plan != "linear" or x.dtype != torch.float64):
        raise ValueError(f"plan: got {plan!r}, expected '', or 'linear' in float64")
    return (
        cpu._TYPES[x.dtype],
        plan == "linear",
        torch.get_num_threads(),
        directions,
        *shape,
        x.size(-1),
        hidden,
        batch_stats,
        sequence,
        eps,
    )


def _addresses(weights: Sequence[Tensor], directions: int) -> list[int]:
    """Seven addresses a direction (w_ih, w_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c)."""
    per = len(weights) // directions
    out: list[int] = []
    for d in range(directions):
        p = [t.data_ptr() for t in weights[d * per : (d + 1) * per]]
        out += p if per == 7 else [*p[:2], 0, *p[2:]]
    return out


def plan(
    shape: tuple[int, int], features: int, hidden: int, directions: int, dtype: torch.dtype
) -> str:
    """What the kernels will do with a layer of this shape, in words for ``explain``."""
    x = torch.empty((0, features), dtype=dtype, device="cpu")
    problem = _problem(x, shape, directions, hidden, True, False, 1.0, "")
    count = _library().bnlstm_threads(problem)
    if count == 1:
        split = "1 thread"
    elif directions == 2 and count == 2:
        split = "2 threads, one per direction"
    else:
        split = f"{count} threads over hidden units, statistics local to a thread"
    return f"{cpu.isa()}, {split}, all steps in one call"


def _forward_fields(
    strides: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    sequence: Sequence[int],
    weights: Sequence[Tensor],
    running: Sequence[Tensor],
    directions: int,
) -> tuple[int, ...]:
    """What the library reads: layouts of x, y and cells, ``tensors`` in its order (x, y, cells, h0,
    c0, h_n, c_n, packed, tape and the used statistics), lengths and the like, parameters."""
    per = len(running) // directions
    addresses = _addresses(weights, directions)
    fields = [*strides, *(cpu._pointer(t) for t in tensors), *sequence]
    for d in range(directions):
        fields += addresses[7 * d : 7 * d + 7]
        for i in range(_TERMS):
            mean, var = running[per * d + 2 * i : per * d + 2 * i + 2]
            fields += (mean.data_ptr(), var.data_ptr(), mean.size(0))
    return tuple(fields)


def _used_shapes(directions: int, steps: int, hidden: int, sequence: bool) -> list[tuple[int, ...]]:
    """Of the used statistics: mean and variance of the input term, recurrent term and cell."""
    first = min(steps, 1) if sequence else steps
    return [
        (directions, 2, first, 4 * hidden),
        (directions, 2, steps, 4 * hidden),
        (directions, 2, steps, hidden),
    ]


def bnlstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    running: Sequence[Tensor],
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    eps: float,
    batch_stats: bool,
    sequence: bool,
    batch_first: bool,
    return_cells: bool,
    record: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, h0, c0 = cpu._rows(x), h0.contiguous(), c0.contiguous()
    weights, running = cpu._contiguous(weights), cpu._contiguous(running)
    directions, size, hidden = h0.shape
    shape = cpu._shape(x, batch_sizes, batch_first, h0)
    problem = _problem(x, shape, directions, hidden, batch_stats, sequence, eps, plan)
    is_packed = batch_sizes is not None
    batch_sizes, lengths, reset = cpu._prepare_sequence(batch_sizes, lengths, reset)

    lead = x.shape[:-1]
    empty = kept if record else output
    y = empty((*lead, directions * hidden), x.dtype)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    wanted = (*lead, directions * hidden) if return_cells or record else (0,)
    cells = empty(wanted, x.dtype)
    rows = (x.size(0) if is_packed else shape[0] * size) if record else 0
    tape = kept((directions, rows, _library().bnlstm_tape_width(hidden)), x.dtype)
    steps = shape[0] if batch_stats or record else 0
    used = [x.new_empty(each) for each in _used_shapes(directions, steps, hidden, sequence)]
    if size == 0:
        return y, h_n, c_n, cells, tape, *(t.zero_() for t in used)  # type: ignore[return-value]
    strides = (
        *cpu._strides(x, is_packed, batch_first),
        *cpu._strides(y, is_packed, batch_first),
        *(cpu._strides(cells, is_packed, batch_first) if cells.numel() else (0, 0)),
    )
    tensors = _forward_fields(
        strides, (x, y, cells, h0, c0, h_n, c_n, packed, tape, *used),
        cpu._sequence_fields(batch_sizes, lengths, reset, batch_first), weights, running,
        directions,
    )  # fmt: skip
    size = _library().bnlstm_forward_workspace(problem, tensors) + 64
    workspace = kept((size,), torch.uint8)
    _library().bnlstm_forward(problem, tensors, cpu._aligned(workspace))
    return y, h_n, c_n, cells, tape, *used  # type: ignore[return-value]


def bnlstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor,
    cells: Tensor,
    tape: Tensor,
    used: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    eps: float,
    batch_stats: bool,
    sequence: bool,
    batch_first: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    # What was saved may have come back from a hook with other strides.
    x, y, h0, c0, cells, tape = cpu._contiguous((x, y, h0, c0, cells, tape))
    used, weights = cpu._contiguous(used), cpu._contiguous(weights)
    directions, size, hidden = h0.shape
    shape = cpu._shape(x, batch_sizes, batch_first, h0)
    problem = _problem(x, shape, directions, hidden, batch_stats, sequence, eps, plan)
    is_packed = batch_sizes is not None
    batch_sizes, lengths, reset = cpu._prepare_sequence(batch_sizes, lengths, reset)
    empty = x.new_empty(0)

    dx = kept_like(x) if need_dx else empty
    dh0 = torch.empty_like(h0) if need_dstate else empty
    dc0 = torch.empty_like(c0) if need_dstate else empty
    dweights = [kept_like(w) for w in weights] if need_dw else []
    if size == 0:
        return dx, dh0, dc0, [w.zero_() for w in dweights]
    dy, dh_n, dc_n, dcells = (cpu._like_input(g, x.dtype) for g in (dy, dh_n, dc_n, dcells))
    tensors = (
        *cpu._strides(x, is_packed, batch_first),
        *cpu._strides(y, is_packed, batch_first),
        *cpu._strides(cells, is_packed, batch_first),
        x.data_ptr(),
        y.data_ptr(),
        cells.data_ptr(),
        cpu._pointer(dx),
        cpu._pointer(dy),
        cpu._pointer(dcells),
        h0.data_ptr(),
        c0.data_ptr(),
        cpu._pointer(dh_n),
        cpu._pointer(dc_n),
        cpu._pointer(dh0),
        cpu._pointer(dc0),
        tape.data_ptr(),
        *(t.data_ptr() for t in used),
        need_dw,
        *cpu._sequence_fields(batch_sizes, lengths, reset, batch_first),
        *_addresses(weights, directions),
        *(_addresses(dweights, directions) if need_dw else ()),
    )
    size = _library().bnlstm_backward_workspace(problem, tensors) + 64
    workspace = kept((size,), torch.uint8)
    _library().bnlstm_backward(problem, tensors, cpu._aligned(workspace))
    return dx, dh0, dc0, dweights


def inference_layer(
    x: Tensor,
    strides: tuple[int, ...],
    shape: tuple[int, int],
    hidden: int,
    directions: int,
    weights: Sequence[Tensor],
    running: Sequence[Tensor],
    packed: Tensor,
    sequence: bool,
    eps: float,
) -> Any:
    """The library's description of a layer that normalises by the running statistics (with the
    counts), for dense x (of this one's features) and y of these strides and (steps, rows)."""
    problem = _problem(x, shape, directions, hidden, False, sequence, eps, "")
    tensors = [*[None] * 7, packed, *[None] * 4]  # of x to c_n the library asks in each call
    fields = _forward_fields((*strides, 0, 0), tensors, cpu._DENSE, weights, running, directions)
    return _library().bnlstm_inference_layer(problem, fields)


class _Setting(NamedTuple):
    """What the number of threads and the instruction set decide: the library's numbers of a call
    and its scratch. Replaced whole, since callers may be concurrent."""

    threads: int
    isa: str
    problem: tuple[float, ...]
    bytes: int


class BNLSTMCall:
    """A layer that records and normalises by the statistics of the batch, for inputs like ``x``
    (dense, contiguous): what only the shapes decide. The results are ``bnlstm_forward``'s."""

    def __init__(
        self, x: Tensor, hidden: int, directions: int, batch_first: bool, sequence: bool, eps: float
    ) -> None:
        lead = x.shape[:-1]
        self.batch_first, self.sequence, self.eps = batch_first, sequence, eps
        self._shape = (lead[1], lead[0]) if batch_first else (lead[0], lead[1])
        self._hidden, self._directions = hidden, directions
        steps, size = self._shape

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=x.dtype, device="meta")

        y = empty(*lead, directions * hidden)
        self._make_y = maker(y)
        self._make_tape = maker(
            empty(directions, steps * size, _library().bnlstm_tape_width(hidden))
        )
        self._make_used = [
            maker(empty(*shape)) for shape in _used_shapes(directions, steps, hidden, sequence)
        ]
        layout = cpu._strides(y, False, batch_first)
        self._strides = (*cpu._strides(x, False, batch_first), *layout, *layout)
        self._setting = _Setting(0, "", (), 0)

    def forward(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weights: Sequence[Tensor],
        running: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """y, h_n, c_n, cells, tape and the used statistics; ``running`` with the counts."""
        y, cells, tape = self._make_y(), self._make_y(), self._make_tape()
        h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
        used = [make() for make in self._make_used]
        tensors = _forward_fields(
            self._strides, (x, y, cells, h0, c0, h_n, c_n, None, tape, *used), cpu._DENSE, weights,
            running, self._directions,
        )  # fmt: skip
        library, setting = _library(), self._setting
        threads, isa = torch.get_num_threads(), library.isa()
        if setting.threads != threads or setting.isa != isa:
            problem = _problem(
                x, self._shape, self._directions, self._hidden, True, self.sequence, self.eps, ""
            )
            size = library.bnlstm_forward_workspace(problem, tensors) + 64
            self._setting = setting = _Setting(threads, isa, problem, size)
        workspace = kept((setting.bytes,), torch.uint8)
        library.bnlstm_forward(setting.problem, tensors, cpu._aligned(workspace))
        return y, h_n, c_n, cells, tape, *used


def follow(
    statistics: Sequence[Tensor], used: Sequence[Tensor], first: int, momentum: float
) -> bool:
    """Move running statistics from row ``first`` on towards those that a batch of two rows or more
    used: ``running.lerp_(used, momentum)``, and the counts. False: nothing done, for tensors that
    the library does not read.

    statistics: per direction as ``fastrnn.functional.bnlstm`` has them, seven.
    used: as ``bnlstm_forward`` returns them.
    """
    dtype = used[0].dtype
    if dtype not in cpu._TYPES or dtype.itemsize < 4:
        return False
    for i, t in enumerate(statistics):
        floats = i % _STATISTICS < _STATISTICS - 1
        if not t.is_contiguous() or t.dtype is not (dtype if floats else torch.int64):
            return False
    fields: list[int] = []
    item, found = dtype.itemsize, [u.data_ptr() for u in used]
    given = used[1].size(2)
    steps = min(given, statistics[_STATISTICS - 1].size(0) - first)
    if steps <= 0:
        return True
    for d in range(len(statistics) // _STATISTICS):
        *own, counts = statistics[_STATISTICS * d : _STATISTICS * (d + 1)]
        fields.append(counts.data_ptr() + 8 * first)
        for i, buffer in enumerate(own):
            width, rows = buffer.size(1), used[i // 2].size(2)
            shared = i < 2 and buffer.size(0) == 1
            skipped = 0 if shared else first * width * item
            at = found[i // 2] + (2 * d + i % 2) * rows * width * item
            fields += (buffer.data_ptr() + skipped, at, (1 if shared else steps) * width)
    threads = torch.get_num_threads()
    _library().bnlstm_follow(cpu._TYPES[dtype], threads, momentum, steps, tuple(fields))
    increment_version(statistics)
    return True
