"""Microseconds of a call on a GPU by each backend: measured on such a device, or else a model's.

Everything is data, in ``table.json``: `python -m benchmarks.gpu --stage refit --write` puts what a
campaign measured and verified there, one entry of ``devices`` for each device:

    name       the device's own (fnmatch), with its multiprocessors in ``sms``: a part of a GPU
               (MIG) has another name and fewer of them, and falls through to the model
    source     where the numbers are from
    verified   [backend, family, format]: kernels whose tests passed there (``fastrnn.gpu.trial``)
    rows       cell, format, training, directions, packed, depth, T, N, H, and by backend ``us`` of
               a step and ``call`` of a call beside its steps (absent if only a total is known)

The model knows no product over all steps at once: every backend has the same ones. None of its
constants was measured by this project; where torch has a kernel of its own they favour it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrnn.backends import Problem, _acts_in_kernel, cuda_plans, triton_numbers
from fastrnn.backends.rows import tf32_allowed
from fastrnn.backends.triton.plan import padded
from fastrnn.kinds import GATES

__all__ = [
    "TABLE",
    "Device",
    "Estimate",
    "Table",
    "algorithm",
    "device",
    "estimate",
    "family",
    "format_name",
    "table",
]

TABLE = Path(__file__).with_name("table.json")
_SMALL_H = {"lstm": (192, 128), "gru": (192, 128), "rnn": (384, 256)}  # largest H forward, backward
_SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


class Device(NamedTuple):
    """What numbers are kept by; ``sms``: multiprocessors."""

    name: str = "no GPU"
    sms: int = 132


class Estimate(NamedTuple):
    """``call_us + T * step_us``; ``source``: where it was measured, "" for a prediction."""

    step_us: float
    call_us: float
    source: str = ""
    note: str = ""

    def total(self, steps: int) -> float:
        return self.call_us + steps * self.step_us

    def __str__(self) -> str:
        word = "measured" if self.source else "predicted"
        note = f" ({self.note})" if self.note else ""
        return f"{word} {self.step_us:.3g} us a step{note}"


class Table:
    """The data of one file."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        if data.get("schema") != 1:
            raise ValueError(f"table.json: got schema {data.get('schema')!r}, expected 1")
        self.data, self.model = data, data["model"]

    def entry(self, at: Device) -> Mapping[str, Any]:
        """What was measured on such a device; {} if nothing was."""
        for entry in self.data["devices"]:
            if fnmatchcase(at.name, entry["name"]) and entry.get("sms", at.sms) == at.sms:
                found: Mapping[str, Any] = entry
                return found
        return {}

    def verified(self, at: Device, backend: str, family: str, number_format: str) -> bool:
        return [backend, family, number_format] in self.entry(at).get("verified", [])


_table: list[Table] = []


def table() -> Table:
    """The shipped data, read at the first call."""
    if not _table:
        _table.append(Table(json.loads(TABLE.read_text())))
    return _table[0]


_devices: dict[int, Device] = {}


def device(ordinal: int) -> Device:
    if not torch.cuda.is_available():
        return Device()
    if ordinal not in _devices:
        properties = torch.cuda.get_device_properties(ordinal)
        _devices[ordinal] = Device(properties.name, properties.multi_processor_count)
    return _devices[ordinal]


def format_name(p: Problem) -> str:
    """The numbers of the recurrent products: float32 is "tf32" where torch allows that."""
    dtype = p.given or p.dtype
    return _SHORT.get(dtype) or ("tf32" if tf32_allowed() else "float32")


def family(p: Problem) -> str:
    """Calls whose kernels are of one source."""
    cell = "rhn_uncoupled" if p.cell == "rhn" and p.gates == 3 else p.cell
    options = {
        "projection": bool(p.proj_size),
        "regularisers": _acts_in_kernel(p),
        "gate masks": p.gate_masks,
    }
    return "+".join([cell, *(name for name, used in options.items() if used)])


def algorithm(
    cell: str,
    number_format: str,
    batch: int,
    input_size: int,
    hidden: int,
    *,
    backward: bool,
    directions: int = 1,
    layers: int = 1,
    proj: int = 0,
    packed: bool = False,
    sms: int = 132,
) -> str:
    """Which algorithm torch asks cuDNN for, by torch's rules (aten/src/ATen/native/cudnn/RNN.cpp).

    PERSIST_STATIC_SMALL_H, PERSIST_STATIC or STANDARD on compute capability 8.0 or newer; "" for
    cells that cuDNN lacks. A request only: what cuDNN does inside STANDARD is closed.
    """
    cell = "rnn" if cell.startswith("rnn") else cell
    if cell not in _SMALL_H:
        return ""
    if proj or packed or number_format == "float64":
        return "STANDARD"
    if _SMALL_H[cell][backward] >= hidden:
        return "PERSIST_STATIC_SMALL_H"
    if cell == "gru" or directions > 1 or layers > 1 or number_format != "float16" or sms < 98:
        return "STANDARD"
    whole = hidden <= 1024 and hidden % 128 == 0 and input_size % 128 == 0
    fits = batch % 8 == 0 and batch <= 128
    if cell == "rnn":
        fits = fits and (batch < 96 or hidden < 896)
    return "PERSIST_STATIC" if whole and fits else "STANDARD"


def estimate(backend: str, p: Problem, at: Device) -> Estimate | None:
    """A call of ``backend``, all layers; None where nobody can say."""
    found = _measured(backend, p, at)
    if found is None:
        step = _MODELS[backend](p, at)
        if step is None:
            return None
        note = "cuDNN's " + _algorithm(p, at) if backend == "torch" else ""
        found = Estimate(step, table().model["call_us"][backend] * (1 + p.training), "", note)
    layers = p.num_layers
    calls = 1 if backend == "torch" else layers
    return found._replace(step_us=found.step_us * layers, call_us=found.call_us * calls)


def _algorithm(p: Problem, at: Device) -> str:
    return algorithm(
        p.cell, format_name(p), p.batch, p.input_size, p.hidden_size, backward=p.training,
        directions=p.directions, layers=p.num_layers, proj=p.proj_size, packed=p.packed,
        sms=at.sms,
    )  # fmt: skip


def _measured(backend: str, p: Problem, at: Device) -> Estimate | None:
    """The nearest row of the same kind, as far as a row reaches."""
    entry, reach = table().entry(at), table().data["reach"]
    if not entry or p.proj_size or p.regularisers or (p.cell == "rhn" and p.gates != 2):
        return None
    kind = (p.cell, format_name(p), p.training, p.directions, p.packed, p.depth)
    best: tuple[float, Estimate] | None = None
    for row in entry["rows"]:
        has = (
            row["cell"], row["format"], row["training"], row["directions"], row["packed"],
            row["depth"],
        )  # fmt: skip
        # Tiles are padded to powers of two: kernels change there, not just their times.
        if has != kind or backend not in row["us"] or padded(row["H"]) != padded(p.hidden_size):
            continue
        wide, many = _apart(row["H"], p.hidden_size), _apart(row["N"], p.batch)
        alone = backend not in row["call"]
        if wide > reach["hidden"] or many > reach["batch"]:
            continue
        if alone and _apart(row["T"], p.steps) > reach["steps"]:
            continue
        if backend == "torch":
            # Not where torch asks cuDNN for something else than was timed.
            timed = p._replace(
                batch=row["N"], hidden_size=row["H"], input_size=row["H"], num_layers=1
            )
            if _algorithm(timed, at) != _algorithm(p, at):
                continue
        if best is None or wide * many < best[0]:
            us, call = row["us"][backend], row["call"].get(backend, 0.0)
            best = wide * many, Estimate(us, call, entry["source"])
    return None if best is None else best[1]


def _apart(a: int, b: int) -> float:
    a, b = max(a, 1), max(b, 1)
    return max(a / b, b / a)


def _rate(rates: Mapping[str, float], p: Problem) -> float:
    name = format_name(p)
    return rates.get("16bit" if name in ("bfloat16", "float16") else name, rates["float32"])


def _products_us(p: Problem) -> float:
    """The recurrent products of a step over the whole device, where they are what takes time."""
    gates = p.gates if p.cell == "rhn" else GATES.get(p.cell, 4)
    out = p.proj_size or p.hidden_size
    flops = 2.0 * p.directions * p.batch * gates * p.depth * p.hidden_size * out
    rate = _rate(table().model["flops_us"], p)
    return (3 if p.training else 1) * flops / rate


def _torch_us(p: Problem, at: Device) -> float:
    name = _algorithm(p, at)
    numbers = table().model["cudnn"][name]
    when = "training" if p.training else "forward"
    if name == "PERSIST_STATIC":
        return float(numbers[when] + numbers[when + "_unit"] * p.hidden_size)
    if name == "PERSIST_STATIC_SMALL_H":
        one = numbers["forward"] + numbers["forward_element"] * p.batch * p.hidden_size
        # Linear in the elements only while they are few: no worse than the standard algorithm.
        standard = table().model["cudnn"]["STANDARD"][when] + _products_us(p)
        return float(min(one * (numbers["training_factor"] if p.training else 1), standard))
    return float(numbers[when]) + _products_us(p)


def _cuda_us(p: Problem, at: Device) -> float | None:
    """The estimate of the plans themselves (csrc/cuda/plan.h); None of a library without one."""
    steps = [plan.step_us for plan in cuda_plans(p)[: 1 + p.training]]
    return sum(steps) if all(steps) else None


def _triton_us(p: Problem, at: Device) -> float:
    """A program has rows of one direction for all steps: on its SM it multiplies, and sweeps the
    weights it keeps or reads those it does not; programs beyond the SMs come in waves."""
    m = table().model["triton"]
    p = p._replace(given=None)  # what has 16 bits and is computed in float32
    plan, matrices = triton_numbers(p)
    weights = matrices * plan.units * plan.outputs
    multiply = 2.0 * weights * plan.rows / _rate(m["sm_flops_us"], p)
    sweep = m["sm_read_bytes_us" if plan.stream else "sm_kept_bytes_us"]
    statistics = m["statistics_us"] if p.cell == "bnlstm" else 0.0
    one = m["base_us"] + statistics + multiply + weights * p.dtype.itemsize / sweep
    programs = -(-max(p.batch, 1) // plan.rows) * p.directions
    waves = -(-programs // at.sms)
    return float(one * p.depth * waves * (1 + m["backward_factor"] * p.training))


def _reference_us(p: Problem, at: Device) -> float:
    """Launches of a Python loop, one after another; nothing of it overlaps."""
    m = table().model["reference"]
    plain = p.cell.removesuffix("_layer_norm").partition("_")[0]
    step = m["step_us"][plain] * p.depth
    step += m["layer_norm_us"] * p.cell.endswith("_layer_norm")
    step += m["option_us"] * (bool(p.regularisers) + p.lengths + p.reset)
    return float(step * p.directions * (m["training_factor"] if p.training else 1)) + _products_us(
        p
    )


_MODELS: dict[str, Callable[[Problem, Device], float | None]] = {
    "cuda": _cuda_us,
    "triton": _triton_us,
    "torch": _torch_us,
    "reference": _reference_us,
}
