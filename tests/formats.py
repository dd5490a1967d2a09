"""float32 layers whose recurrent products are made in a narrower format: TF32, or two bfloat16.

The tolerance rule asks for the reference at the format under test. torch has no such dtype, so it
is the float32 reference on recurrent weights that were rounded to the format.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrnn.kinds import KINDS
from tests.problems import Result, check

__all__ = ["FORMATS", "check_in_format", "choose_format", "rounded"]

FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "bf16x3": torch.float32,
}


def choose_format(name: str) -> None:
    """Set the switch by which float32 gets its format."""
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def rounded(weight: Tensor, name: str) -> Tensor:
    """The nearest values that a format has: "tf32" (10 bits of mantissa) or "bf16x3" (16)."""
    if name == "tf32":
        words = weight.contiguous().view(torch.int32)
        return ((words + 0x1000) & ~0x1FFF).view(torch.float32)
    head = weight.bfloat16().float()
    return head + (weight - head).bfloat16().float()


def check_in_format(p: Any, got: Result, name: str, check: Callable[..., None] = check) -> None:
    """The rule, for a problem computed in a format of FORMATS; ``check`` is that of its family."""
    if FORMATS[name] != torch.float32:
        check(p, got)
        return
    same = copy.copy(p)
    per = len(p.weights) // p.case.directions
    narrow = {1}  # w_hh, and w_hr, which parameters of layer norm may follow
    if getattr(p.case, "proj", 0):
        narrow.add(per - 1 - KINDS[p.case.cell].norms)
    same.weights = [rounded(w, name) if i % per in narrow else w for i, w in enumerate(p.weights)]
    check(p, got, note=f"{name}: ", number_format=name, rounded=same)
