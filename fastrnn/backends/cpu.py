"""The CPU backend: the ops of `fastrnn.ops` on top of the native library `fastrnn._cpu`.

This file owns every buffer: it allocates outputs, the tape and the workspace through torch, and
hands the library addresses and strides. Shapes are those of `fastrnn.ops`; arguments were checked.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.cpu_memory import CPU, kept, kept_like, output, read_limit
from fastrnn.backends.cpu_plan import Plan, read_plan
from fastrnn.kinds import KINDS
from fastrnn.noise import Noise, tape_slots
from fastrnn.reference import philox

try:
    from fastrnn import _cpu

    _import_error: ImportError | None = None
    _cpu.team_kind()  # looks after forks from now on, also those before its first call
    read_limit()
except ImportError as error:  # a source tree without a build: every other backend still works
    _import_error = error

LOADED = _import_error is None
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_F32_BF16 = 3
_DENSE = (0,) * 5  # _sequence_fields without packed rows, lengths and resets
_Fields = tuple[float, ...]


def available() -> tuple[bool, str]:
    """Whether the native library could be loaded, and if not, why."""
    if _import_error is None:
        return True, ""
    return (
        False,
        f"the native library is not built ({_import_error}); "
        "run `pip install .` in the source tree",
    )


def isa() -> str:
    """The instruction set whose kernels run."""
    return str(_cpu.isa())


def vendor() -> str:
    """Who made this CPU: "amd", "intel", or "" for others and where the library is not built."""
    return str(_cpu.cpu_vendor()) if LOADED else ""


def supports(dtype: torch.dtype) -> bool:
    return dtype in _TYPES


def plan(
    cell: str,
    T: int,
    N: int,
    I: int,
    H: int,
    P: int,
    D: int,
    dtype: torch.dtype,
    threads: int,
    training: bool,
) -> str:
    """What the kernels will do with a layer of this shape, in words for `explain`."""
    widened = _widens(cell, dtype)
    kind = _TYPES[torch.float32 if widened else dtype]
    problem = (KINDS[cell].number, kind, 0, 0, threads, D, T, N, I, H, P or H, int(P > 0))
    count, partition = _cpu.plan(problem)
    if count == 1:
        split = "1 thread"
    elif D == 2 and count == 2:
        split = "2 threads, one per direction"
    else:
        what = "hidden units" if partition == "units" else "batch rows"
        split = f"{count} threads over {what}"
    precision = ", computed in float32" if widened else ""
    return f"{_cpu.isa()}, {split}, all steps in one call{precision}"


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def _addresses(tensors: Sequence[Tensor], directions: int, norms: int = 0) -> list[int]:
    """Five addresses a direction (w_ih, w_hh, b_ih, b_hh, w_hr), with layer norm nine (ln_ih,
    ln_hh, ln_c, ln_bias_c); 0 for the absent ones."""
    per = len(tensors) // directions
    plain = per - norms
    out: list[int] = []
    for d in range(directions):
        p = [t.data_ptr() for t in tensors[d * per : (d + 1) * per]]
        bias = p[2:4] if plain >= 4 else [0, 0]
        out += [p[0], p[1], *bias, p[plain - 1] if plain % 2 else 0]
        if norms:
            out += [*p[plain:], 0, 0][:4]
    return out


def _shape(x: Tensor, batch_sizes: Tensor | None, batch_first: bool, h0: Tensor) -> tuple[int, int]:
    if batch_sizes is not None:
        return batch_sizes.size(0), h0.size(1)
    return (x.size(1), x.size(0)) if batch_first else (x.size(0), x.size(1))


def _problem(
    cell: str,
    dtype: torch.dtype,
    plan: Plan,
    weights: Sequence[Tensor],
    shape: tuple[int, int],
    h0: Tensor,
) -> tuple[int, ...]:
    directions = h0.size(0)
    kind = _F32_BF16 if plan.bf16 and dtype == torch.float32 else _TYPES[dtype]
    w_hh = weights[1]
    return (
        KINDS[cell].number,
        kind,
        plan.partition,
        plan.linear,
        torch.get_num_threads(),
        directions,
        *shape,
        weights[0].size(1),
        w_hh.size(0) // KINDS[cell].gates,
        w_hh.size(1),
        len(weights) // directions % 2,
    )


def _strides(t: Tensor, packed: bool, batch_first: bool) -> tuple[int, int]:
    if packed:
        return 0, t.stride(0)
    return (t.stride(1), t.stride(0)) if batch_first else (t.stride(0), t.stride(1))


def _sequence_fields(
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, batch_first: bool
) -> list[int]:
    fields = [batch_sizes.data_ptr() if batch_sizes is not None else 0]
    fields.append(lengths.data_ptr() if lengths is not None else 0)
    if reset is None:
        return [*fields, 0, 0, 0]
    return [*fields, reset.data_ptr(), *_strides(reset, False, batch_first)]


_MODES = {"": 0, "update": 1, "cell": 2, "state": 3}


def _noise_fields(seed: Tensor | None, text: str) -> tuple[float, ...]:
    if not text:
        return ()
    n = Noise.parse(text)
    if n.training and seed is None:
        raise ValueError(f"seed: got None, expected a tensor for noise {text!r}")
    address = seed.data_ptr() if seed is not None else 0
    rates = (n.drop, n.zoneout_h, n.zoneout_c)
    return (address, n.layer, n.training, _MODES[n.mode], n.sequence, *rates)


def _rows(t: Tensor) -> Tensor:
    """Rows must be dense inside; any stride between them will do."""
    return t if t.stride(-1) == 1 or (t.size(-1) == 1 and t.is_contiguous()) else t.contiguous()


def _prepare_sequence(
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if batch_sizes is not None:
        batch_sizes = batch_sizes.contiguous()
    if lengths is not None:
        lengths = lengths.contiguous()
    return batch_sizes, lengths, reset


def _pointer(t: Tensor | None) -> int:
    return t.data_ptr() if t is not None and t.numel() else 0


_forward_bytes: dict[tuple[object, ...], int] = {}
_backward_bytes: dict[tuple[object, ...], int] = {}


def _workspace(
    known: dict[tuple[object, ...], int], key: tuple[object, ...], ask: Any, *fields: _Fields
) -> Tensor:
    """Scratch for one call; its size is asked for once a kind of call."""
    size = known.get(key)
    if size is None:
        if len(known) >= 1024:  # as many shapes as no program keeps coming back to
            known.clear()
        size = known[key] = ask(*fields) + 64
    return kept((size,), torch.uint8)


def _forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    want_cells: bool,
    want_gates: bool,
    plan_text: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, h_n, c_n, cells, gates; None for what the cell or the call does not have."""
    plan, kind = read_plan(plan_text), KINDS[cell]
    if _widens(cell, x.dtype):
        wide = [*_wide(x, h0, c0), _wide(*weights)]
        *results, cells, gates = _forward(  # type: ignore[call-arg]
            *wide, packed, batch_sizes, lengths, reset, cell, batch_first, want_cells, want_gates,
            plan_text, seed, noise,
        )  # fmt: skip
        y, h_n, c_n = _narrow(x.dtype, *results)
        return y, h_n, c_n, cells, gates
    lstm = kind.has_cell
    x = _rows(x)
    h0 = h0.contiguous()
    if lstm:
        assert c0 is not None
        c0 = c0.contiguous()
    weights = _contiguous(weights)
    directions, _, width = h0.shape
    shape = _shape(x, batch_sizes, batch_first, h0)
    problem = _problem(cell, x.dtype, plan, weights, shape, h0)
    hidden = problem[9]
    is_packed = batch_sizes is not None
    batch_sizes, lengths, reset = _prepare_sequence(batch_sizes, lengths, reset)

    lead = x.shape[:-1]
    dtype = x.dtype
    empty = kept if want_gates else output  # a caller may resize what no backward needs
    y = empty((*lead, directions * width), dtype)
    h_n = torch.empty_like(h0)
    c_n = cells = gates = None
    compute = _compute_dtype(dtype)
    if lstm:
        c_n = torch.empty_like(c0)  # type: ignore[arg-type]
        if want_cells:
            cells = empty((*lead, directions * hidden), compute)
    slots = tape_slots(cell, noise) if want_gates else 0
    if slots:
        rows = x.size(0) if is_packed else shape[0] * shape[1]
        gates = kept((directions, rows, slots * hidden), compute)
    if shape[1] == 0:
        return y, h_n, c_n, cells, gates
    tensors = (
        *_strides(x, is_packed, batch_first),
        *_strides(y, is_packed, batch_first),
        *((0, 0) if cells is None else _strides(cells, is_packed, batch_first)),
        x.data_ptr(),
        y.data_ptr(),
        _pointer(cells),
        h0.data_ptr(),
        c0.data_ptr() if lstm else 0,  # type: ignore[union-attr]
        h_n.data_ptr(),
        _pointer(c_n),
        _pointer(packed),
        _pointer(gates),
        *_sequence_fields(batch_sizes, lengths, reset, batch_first),
        *_addresses(weights, directions, kind.norms),
        *_noise_fields(seed, noise),
    )
    key = (problem, _cpu.isa(), packed is None, is_packed, noise)
    workspace = _workspace(_forward_bytes, key, _cpu.forward_workspace, problem, tensors)
    _cpu.forward(problem, tensors, _aligned(workspace))
    return y, h_n, c_n, cells, gates


def _aligned(workspace: Tensor) -> int:
    return (workspace.data_ptr() + 63) // 64 * 64


def layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    return_cells: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return _forward(
        x, h0, c0, weights, packed, batch_sizes, lengths, reset, cell, batch_first, return_cells,
        False, plan, seed, noise,
    )[:4]  # fmt: skip


def layer_forward_train(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    recompute: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return _forward(
        x, h0, c0, weights, None, batch_sizes, lengths, reset, cell, batch_first, True,
        not recompute, plan, seed, noise,
    )  # fmt: skip


def _widens(cell: str, dtype: torch.dtype) -> bool:
    """Whether a layer is computed in float32 between conversions: rows are normalised there."""
    return dtype == torch.bfloat16 and KINDS[cell].norms > 0


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.float() for t in tensors]


def _narrow(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _like_input(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient with the contiguous layout the kernels address it by."""
    return None if gradient is None else gradient.to(dtype).contiguous()


def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    cells: Tensor | None,
    gates: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    kind = KINDS[cell]
    if _widens(cell, x.dtype):
        wide = [*_wide(dy, dh_n, dc_n), dcells, *_wide(x, y, h0, c0), cells, gates, _wide(*weights)]
        *states, dweights = layer_backward(  # type: ignore[call-arg]
            *wide, batch_sizes, lengths, reset, cell, batch_first, need_dx, need_dstate, need_dw,
            plan, seed, noise,
        )  # fmt: skip
        wide_dx, dh0, dc0 = _narrow(x.dtype, *states)
        return wide_dx, dh0, dc0, _narrow(x.dtype, *dweights)
    # dx has x's logical layout, dense; x is read through its own strides only if they are the same.
    # What was saved may have come back from a hook with other strides.
    x, y = x.contiguous(), y.contiguous()
    cells, gates = [None if t is None else t.contiguous() for t in (cells, gates)]
    h0 = h0.contiguous()
    lstm = kind.has_cell
    c0 = c0.contiguous() if lstm and c0 is not None else None
    weights = _contiguous(weights)
    directions = h0.size(0)
    shape = _shape(x, batch_sizes, batch_first, h0)
    problem = _problem(cell, x.dtype, read_plan(plan), weights, shape, h0)
    is_packed = batch_sizes is not None
    batch_sizes, lengths, reset = _prepare_sequence(batch_sizes, lengths, reset)

    dx = kept_like(x) if need_dx else None
    dh0 = torch.empty_like(h0) if need_dstate else None
    dc0 = torch.empty_like(c0) if need_dstate and c0 is not None else None
    dweights = [kept_like(w) for w in weights] if need_dw else []
    if shape[1] == 0:
        return dx, dh0, dc0, [w.zero_() for w in dweights]
    dy = _like_input(dy, x.dtype)
    dh_n = _like_input(dh_n, x.dtype)
    dc_n = _like_input(dc_n, x.dtype)
    dcells = None if cells is None else _like_input(dcells, cells.dtype)
    tensors = (
        *_strides(x, is_packed, batch_first),
        *_strides(y, is_packed, batch_first),
        *(_strides(cells, is_packed, batch_first) if lstm and cells is not None else (0, 0)),
        x.data_ptr(),
        y.data_ptr(),
        _pointer(cells),
        _pointer(dx),
        _pointer(dy),
        _pointer(dcells),
        h0.data_ptr(),
        _pointer(c0),
        _pointer(dh_n),
        _pointer(dc_n) if lstm else 0,
        _pointer(dh0),
        _pointer(dc0),
        _pointer(gates),
        need_dw,
        *_sequence_fields(batch_sizes, lengths, reset, batch_first),
        *_addresses(weights, directions, kind.norms),
        *(_addresses(dweights, directions, kind.norms) if need_dw else ()),
        *_noise_fields(seed, noise),
    )
    taped = gates is not None and gates.numel() > 0
    key = (problem, _cpu.isa(), need_dx, need_dstate, need_dw, taped, is_packed, noise)
    workspace = _workspace(_backward_bytes, key, _cpu.backward_workspace, problem, tensors)
    _cpu.backward(problem, tensors, _aligned(workspace))
    return dx, dh0, dc0, dweights


def random_mask(seed: Tensor, stream: int, p: float, steps: int, rows: int, units: int) -> Tensor:
    """(steps, rows, units) bool, False with probability p: the masks the kernels draw."""
    if _import_error is not None:
        return philox.keep(seed, stream, p, steps, rows, units, seed.device)
    keep = torch.empty((steps, rows, units), dtype=torch.bool, device=CPU)
    shape = (stream, philox.threshold(p), steps, rows, units, torch.get_num_threads())
    _cpu.random(seed.data_ptr(), *shape, 0, keep.data_ptr())
    return keep


def describe_origin(
    refs: tuple[weakref.ref[Tensor], ...], versions: tuple[int, ...], samples: bytes
) -> Any:
    """What ``unchanged`` compares tensors with: references to them, the version of each (-1: what
    it holds may change), and what the 8-byte words at the addresses ``samples`` hold now."""
    return _cpu.describe_origin(refs, versions, samples)


def unchanged(weights: Sequence[Tensor], origin: Any) -> bool:
    """Whether each weight is what its reference refers to, of its address, sizes and version,
    contiguous, and the words of the samples are what they were."""
    return bool(_cpu.unchanged(weights, origin))


def footprint(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """Dtype and shape of each of these, where all that are there lie on the CPU with at most three
    dimensions and the library is loaded; else None."""
    return _cpu.footprint(tensors) if LOADED else None


def unobserved(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are torch's own tensors on the CPU, with their signs carried out, and no mode,
    transform, tracer or profiler would see an operator."""
    return LOADED and bool(_cpu.unobserved(tensors))


def pack_weights(weights: Sequence[Tensor], cell: str, plan: str) -> Tensor:
    """Weights in the order the forward kernels read them: opaque, of this instruction set."""
    if cell == "rhn":
        from fastrnn.backends import cpu_rhn

        return cpu_rhn.pack_weights(weights)
    weights = _contiguous(_wide(*weights) if _widens(cell, weights[0].dtype) else weights)
    directions = 2 if sum(w.dim() == 2 for w in weights) > 3 else 1
    state = weights[0].new_empty((directions, 1, weights[1].size(1)))
    problem = _problem(cell, weights[0].dtype, read_plan(plan), weights, (1, 1), state)
    packed = output((_cpu.packed_bytes(problem) + 64,), torch.uint8)
    offset = _aligned(packed) - packed.data_ptr()
    packed = packed[offset:].clone() if offset else packed
    addresses = _addresses(weights, directions, KINDS[cell].norms)
    _cpu.pack(problem, tuple(addresses), packed.data_ptr())
    return packed
