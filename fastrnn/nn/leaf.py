"""A module that torch.fx.symbolic_trace meets stays one call in its graph, as torch.nn's do.

Its tracer goes into every module that is not torch's own; ours then tell it so themselves.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["as_leaf"]


def as_leaf(
    module: nn.Module,
    input: Proxy,
    hx: Any,
    lengths: Any = None,
    reset: Any = None,
    return_cells: Any = None,
) -> Any:
    """The node of `module(input, hx, lengths=..., ...)`, without what is None."""
    arguments = (input,) if hx is None else (input, hx)
    options = {"lengths": lengths, "reset": reset, "return_cells": return_cells}
    tracer: Any = input.tracer
    return tracer.create_proxy(
        "call_module",
        tracer.path_of_module(module),
        arguments,
        {name: value for name, value in options.items() if value is not None},
    )
