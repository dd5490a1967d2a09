"""What the oldest torch cannot do, in one place."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

OLD = not hasattr(torch.compiler, "is_exporting")  # torch 2.6


def exporting(strict: bool = True) -> Any:
    """Around a strict export with dynamic sizes. torch 2.6 does not tell export from compile, so
    that a layer with gradients is an autograd.Function, into which its dynamo takes no size."""
    return torch.no_grad() if OLD and strict else contextlib.nullcontext()
