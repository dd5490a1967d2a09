"""The operator that draws masks: random numbers as a function of a seed, the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.ops.layer import register
from fastrnn.reference import philox

__all__ = ["random_mask"]

_SCHEMA = "(Tensor seed, int stream, float p, SymInt steps, SymInt rows, SymInt units) -> Tensor"
torch.library.define("fastrnn::random_mask", _SCHEMA)


def _fake(seed: Tensor, stream: int, p: float, steps: int, rows: int, units: int) -> Tensor:
    return seed.new_empty((steps, rows, units), dtype=torch.bool)


register("CPU", "fastrnn.backends.cpu", {"random_mask": _SCHEMA})
torch.library.register_fake("fastrnn::random_mask", _fake)
_operator = torch.ops.fastrnn.random_mask.default


def random_mask(seed: Tensor, stream: int, p: float, steps: int, rows: int, units: int) -> Any:
    """(steps, rows, units) bool on the seed's device, False with probability p.

    An element depends on the seed, the stream and its own indices alone; see
    ``fastrnn.reference.philox``, which serves where the operator cannot.
    """
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or not seed.is_cpu
    ):
        return philox.keep(seed, stream, p, steps, rows, units, seed.device)
    return _operator(seed, stream, p, steps, rows, units)
