"""Kernels that nobody verified on this kind of device are tried before their first unasked use.

One tiny problem, forward and backward, beside ``fastrnn.reference`` in float64, once per process
for each ``Key``. Kernels that pass are used from then on; those that do not, or that raise, are
not, and one RuntimeWarning says why. The trial has a thread of its own, where none of the caller's
modes are in force (autocast, inference mode, hooks of saved tensors), and its numbers come from a
generator of its own. It waits for the device, once.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.backends import Problem, cuda_plans, reference, reference_bnlstm, triton_numbers
from fastrnn.backends.triton.plan import BATCH_ROWS, least_rows
from fastrnn.gpu.times import family, format_name
from fastrnn.kinds import GATES, KINDS
from fastrnn.noise import MODES, Noise

__all__ = ["Key", "attempt", "forget", "hindrance", "key_of", "keys_of_any_batch", "verdict"]

_SMALL, _ROWS, _STEPS, _INPUTS = 72, 5, 5, 8
# The rule of tests/tolerances.py: error <= K * that of the reference in the dtype + FLOOR * eps *
# scale. Formats of float32 have the K and FLOOR of 16 bits and a spacing of their own.
_K, _FLOOR = 2.0, 4.0
_EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "tf32": 2.0**-10, "float32": 2.0**-16}
_Results = dict[str, Tensor]


class Key(NamedTuple):
    """Calls that one trial speaks for.

    Attributes:
        plans: of the CUDA kernels the exchanges of forward and backward, of Triton's the tile. That
            tiles of CUDA kernels differ with the size is for the tests of a campaign.
    """

    backend: str
    family: str
    number_format: str
    directions: int
    plans: tuple[object, ...]
    ordinal: int


def key_of(backend: str, p: Problem, ordinal: int) -> Key:
    plans: tuple[object, ...]
    if backend == "cuda":
        plans = tuple(plan.exchange for plan in cuda_plans(p))
    else:
        tile, _ = triton_numbers(p)
        plans = (tile.units, tile.outputs, tile.rows, tile.warps, tile.stream)
    return Key(backend, family(p), format_name(p), p.directions, plans, ordinal)


def keys_of_any_batch(backend: str, p: Problem, ordinal: int) -> tuple[Key, ...]:
    """``key_of`` where the batch is not known: every tile of Triton's that one may bring about, of
    the CUDA kernels the exchanges that the batch of ``p`` has."""
    sizes = [p.batch]
    if backend == "triton":
        sizes = [least_rows(rows, p.directions) for rows in BATCH_ROWS]
    return tuple(dict.fromkeys(key_of(backend, p._replace(batch=n), ordinal) for n in sizes))


_verdicts: dict[Key, str] = {}
_lock = threading.Lock()


def verdict(key: Key) -> str | None:
    """Why these kernels are not used; "" if they passed, None if they were not tried yet."""
    return _verdicts.get(key)


def forget() -> None:
    """As if nothing had been tried."""
    _verdicts.clear()


def hindrance() -> str:
    """Why nothing can be tried in the midst of this call; empty if it can."""
    if (
        torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx, export
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    ):
        return "a traced call"
    if torch._C._current_graph_task_id() != -1:  # the trial's own backward would wait for this one
        return "a call inside a backward pass"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a call that is being captured"
    return ""


def attempt(key: Key, p: Problem, device: torch.device) -> str:
    """The verdict on the kernels of ``key``, by trial if there is none yet; ``p`` is the call."""
    with _lock:
        known = _verdicts.get(key)
        if known is not None:
            return known
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(_tried(key, p, device)))
        thread.start()
        thread.join()
        (why,) = found
        if why.startswith(_NO_MEMORY):  # says nothing of the kernels: another call tries again
            return why
        _verdicts[key] = why
    if why:
        warnings.warn(
            f"fastrnn: the {key.backend} kernels of {key.family} ({key.number_format}) are not "
            f"used on this GPU: {why}; fastrnn.explain names what runs instead",
            RuntimeWarning,
            stacklevel=2,
        )
    return why


_NO_MEMORY = "there was no memory to try it in"


def _tried(key: Key, p: Problem, device: torch.device) -> str:
    here: AbstractContextManager[Any] = nullcontext()
    try:
        if device.type == "cuda":
            here = torch.cuda.device(device)
        with here:
            for noise in _noises(key):
                why = _compared(key, p, noise, device)
                if why:
                    return why
    except torch.OutOfMemoryError:
        return _NO_MEMORY
    except Exception as error:  # whatever a kernel that never ran may raise: it is not used
        return f"its trial raised {type(error).__name__}: {str(error).strip()[:300]}"
    return ""


def _noises(key: Key) -> list[str]:
    """What regularisers the trials have, one after another."""
    if "+regularisers" not in key.family:
        return [""]
    modes = {"lstm": MODES, "gru": ("update", "state")}.get(key.family[:4].strip("_+"), ("state",))
    return [Noise(0, True, mode, False, 0.25, 0.2).text() for mode in modes]


def _sizes(key: Key, p: Problem) -> Iterator[Problem]:
    """Problems to try: as small as can be, or of the call's own hidden size."""
    rows = _ROWS
    if key.backend == "triton":  # as many as bring about the call's tile
        tile, _ = triton_numbers(p)
        rows = p.batch if p.cell == "bnlstm" else max(rows, least_rows(tile.rows, p.directions))
    small = p._replace(
        steps=_STEPS, batch=max(rows, 2), input_size=_INPUTS, num_layers=1, packed=False
    )
    if key.backend == "cuda" and p.hidden_size > _SMALL:
        yield small._replace(hidden_size=_SMALL, proj_size=min(p.proj_size, _SMALL // 2))
    yield small


def _compared(key: Key, p: Problem, noise: str, device: torch.device) -> str:
    plans = ["triton", "triton"]
    if key.backend == "cuda":
        plans = [f"cuda,{exchange}" for exchange in key.plans]
    dtype = p.given if p.given is not None and key.backend == "cuda" else p.dtype
    for size in _sizes(key, p):
        layer = _Layer(size, dtype, noise, device)
        try:
            got = layer.run(*plans)
        except RuntimeError as error:
            # This exchange has no kernel for so few units: then with the call's own.
            if "kernel takes a hidden size" not in str(error) or size.hidden_size == p.hidden_size:
                raise
            continue
        again = layer.run(*plans)
        if key.backend == "cuda":
            from fastrnn.backends import cuda_native

            if device.type == "cuda":
                torch.cuda.synchronize(device)
            cuda_native.raise_if_failed(device.index or 0)
        return layer.judge(got, again, _EPS[_spacing(key, p)])
    raise AssertionError("no size was tried")


def _spacing(key: Key, p: Problem) -> str:
    """The format whose roundings are allowed: torch's products over all steps have their own."""
    # A batch-normalised layer of 16-bit tensors is computed in float32 there.
    wide = p.given is not None and key.backend == "triton"
    name = format_name(p._replace(given=None)) if wide else key.number_format
    return "tf32" if name == "float32" and _matmul_tf32() else name


def _matmul_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to name one where its backends were set apart
        return True


class _Layer:
    """The tensors of a trial and what is to come of them; values that every format holds."""

    def __init__(self, p: Problem, dtype: torch.dtype, noise: str, device: torch.device) -> None:
        self.p, self.dtype, self.noise, self.device = p, dtype, noise, device
        self._draw = torch.Generator().manual_seed(20240229)
        d, n, h, out = p.directions, p.batch, p.hidden_size, p.proj_size or p.hidden_size
        self.kind = KINDS.get(p.cell)
        self.cells = p.cell == "bnlstm" or (self.kind is not None and self.kind.has_cell)
        self.x = self._tensor(p.steps, n, p.input_size)
        self.h0 = self._tensor(d, n, out)
        self.c0 = self._tensor(d, n, h) if self.cells else None
        self.weights = [w for _ in range(d) for w in self._direction(h, out)]
        # Two rows at least go to the end: statistics of one row are none.
        self.lengths = torch.tensor([max(p.steps - i // 2, 1) for i in range(n)], device=device)
        self.reset = (torch.arange(p.steps * n, device=device) % 7 == 5).view(p.steps, n)
        self.seed = torch.full((1,), 11, dtype=torch.int64, device="cpu") if noise else None
        self.s_mask: Tensor | None = None
        if p.cell == "rhn":
            groups = p.gates if p.gate_masks else 1
            kept = torch.rand(d, groups, n, h, generator=self._draw, device="cpu") < 0.75
            self.s_mask = (kept / 0.75).bfloat16().to(device, self.dtype)
        self.running = self._running() if p.cell == "bnlstm" else []
        self.upstream = [
            self._tensor(p.steps, n, d * out), self._tensor(d, n, out),
            *([self._tensor(d, n, h)] if self.cells else []),
        ]  # fmt: skip

    def _tensor(self, *shape: int, bound: float = 1.0, around: float = 0.0) -> Tensor:
        values = (2 * torch.rand(*shape, generator=self._draw, device="cpu") - 1) * bound + around
        if self.p.cell == "rnn_relu":
            # Every unit well on one side of the kink, where rounding decides nothing.
            values = values.abs()
        return values.bfloat16().to(self.device, self.dtype)

    def _direction(self, h: int, out: int) -> list[Tensor]:
        p, bound = self.p, 1 / math.sqrt(h)
        if p.cell == "rhn":
            rows = p.gates * h
            shapes: list[tuple[int, ...]] = [(rows, p.input_size), (p.depth, rows, h)]
            return [self._tensor(*s, bound=bound) for s in (*shapes, (p.depth, rows))]
        rows = GATES.get(p.cell, 4) * h
        if p.cell == "rnn_relu":
            # The recurrence does not grow beyond the bias of the units that stay off.
            weights = [self._tensor(rows, p.input_size, bound=bound / 4)]
            weights += [self._tensor(rows, out, bound=1 / h)]
            side = torch.where(torch.arange(rows, device=self.device) % 3 == 0, -16.0, 1.0)
            return [*weights, side.to(self.dtype), self._tensor(rows, bound=bound)]
        weights = [self._tensor(rows, size, bound=bound) for size in (p.input_size, out)]
        if p.cell == "bnlstm":
            norms = [self._tensor(rows, bound=0.1, around=0.3) for _ in range(2)]
            norms += [self._tensor(h, bound=0.1, around=0.3), self._tensor(h, bound=bound)]
            return [*weights, self._tensor(rows, bound=bound), *norms]
        weights += [self._tensor(rows, bound=bound) for _ in range(2)]
        weights += [self._tensor(out, h, bound=bound)] if p.proj_size else []
        if self.kind is not None and self.kind.norms:
            weights += [self._tensor(rows, bound=0.5, around=1.0) for _ in range(2)]
            if self.kind.has_cell:
                weights += [self._tensor(h, bound=0.5, around=1.0), self._tensor(h, bound=0.5)]
        return weights

    def _running(self) -> list[Tensor]:
        p, wide = self.p, ops.state_dtype(self.dtype)
        rows = (4 * p.hidden_size, 4 * p.hidden_size, p.hidden_size)
        each = [make(p.steps, k) for k in rows for make in (torch.zeros, torch.ones)]
        return [t.to(self.device, wide) for _ in range(p.directions) for t in each]

    def run(self, forward: str, backward: str) -> _Results:
        """Results and gradients by the operators, with these plans."""
        p, sequence = self.p, (None, self.lengths, self.reset)
        dy, dh_n, *rest = self.upstream
        dc_n = rest[0] if rest else None
        x, h0, c0, w = self.x, self.h0, self.c0, self.weights
        if p.cell == "rhn":
            y, h_n, gates = ops.rhn_forward_train(
                x, h0, w, None, self.s_mask, *sequence, False, False, forward
            )
            dx, dh0, dw = ops.rhn_backward(
                dy, dh_n, x, y, h0, gates, w, None, self.s_mask, *sequence, False, True, True,
                True, backward,
            )  # fmt: skip
            return _named([y, h_n], [dx, dh0], dw)
        if p.cell == "bnlstm":
            y, h_n, c_n, cells, tape, *used = ops.bnlstm_forward(
                x, h0, c0, w, self.running, None, *sequence, 0.1, True, False, False, True, True,
                forward,
            )  # fmt: skip
            dx, dh0, dc0, dw = ops.bnlstm_backward(
                dy, dh_n, dc_n, None, x, y, h0, c0, cells, tape, used, w, *sequence, 0.1, True,
                False, False, True, True, True, backward,
            )  # fmt: skip
            return _named([y, h_n, c_n], [dx, dh0, dc0], dw)
        y, h_n, c_n, cells, gates = ops.layer_forward_train(
            x, h0, c0, w, *sequence, p.cell, False, False, forward, self.seed, self.noise
        )
        dx, dh0, dc0, dw = ops.layer_backward(
            dy, dh_n, dc_n, None, x, y, h0, c0, cells, gates, w, *sequence, p.cell, False, True,
            True, True, backward, self.seed, self.noise,
        )  # fmt: skip
        if not self.cells:
            return _named([y, h_n], [dx, dh0], dw)
        return _named([y, h_n, c_n], [dx, dh0, dc0], dw)

    def truth(self, dtype: torch.dtype) -> _Results:
        """The same by the reference."""
        p, sequence = self.p, (None, self.lengths, self.reset)

        def wide(t: Tensor) -> Tensor:
            return t.detach().to(dtype)

        leaves = [wide(t).requires_grad_() for t in (self.x, self.h0)]
        leaves += [wide(self.c0).requires_grad_()] if self.c0 is not None else []
        weights = [wide(w).requires_grad_() for w in self.weights]
        x, h0 = leaves[:2]
        outputs: Any
        if p.cell == "rhn":
            mask = None if self.s_mask is None else wide(self.s_mask)
            outputs = reference.rhn(x, h0, weights, None, mask, *sequence, False)
        elif p.cell == "bnlstm":
            running = [wide(t) for t in self.running]
            outputs = reference_bnlstm.layer(
                x, h0, leaves[2], weights, running, *sequence, 0.1, True, False, False
            )[:3]
        else:
            c0 = leaves[2] if self.cells else None
            outputs = reference.layer(
                x, h0, c0, weights, *sequence, p.cell, False, self.seed, self.noise
            )[: 2 + self.cells]
        found = torch.autograd.grad(
            outputs, [*leaves, *weights], [wide(t) for t in self.upstream], allow_unused=True
        )
        every = [
            torch.zeros_like(leaf) if g is None else g
            for g, leaf in zip(found, [*leaves, *weights], strict=True)
        ]
        values = [t.detach() for t in outputs]
        return _named(values, every[: len(leaves)], every[len(leaves) :])

    def judge(self, got: _Results, again: _Results, eps: float) -> str:
        """Why the results are not right; empty if they are."""
        same_dtype = self.dtype
        if self.p.cell == "bnlstm":  # whose reference is float32 where data have 16 bits
            same_dtype = ops.state_dtype(self.dtype)
        exact, same = self.truth(torch.float64), self.truth(same_dtype)
        # Layer norm enlarges one draw of roundings; the tests take the worst of four instead.
        twice = 2 if self.kind is not None and self.kind.norms else 1
        for name, truth in exact.items():
            value = got[name]
            if not torch.equal(value, again[name]) and bool(value.isfinite().all()):
                return f"two runs differ in {name}"
            if value.shape != truth.shape:
                return f"{name} has the shape {tuple(value.shape)}, not {tuple(truth.shape)}"
            error = float((value.double() - truth).abs().max())
            scale = max(1.0, float(truth.abs().max()))
            allowed = _K * twice * float((same[name].double() - truth).abs().max())
            allowed += _FLOOR * eps * scale
            if not error <= allowed:
                return f"{name} is off by {error:.3g} in its trial, {allowed:.3g} are allowed"
        return ""


def _named(values: list[Tensor], inputs: list[Tensor], weights: list[Tensor]) -> _Results:
    names = ("y", "h_n", "c_n")
    found = dict(zip(names, values, strict=False))
    found |= {f"the gradient of {n}": g for n, g in zip(("x", "h_0", "c_0"), inputs, strict=False)}
    return found | {f"the gradient of weight {i}": g for i, g in enumerate(weights)}
