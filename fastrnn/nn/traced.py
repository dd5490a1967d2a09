"""Calls that torch.fx traces symbolically: its tracer takes only modules of torch.nn for leaves."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "as_leaf"]


def as_leaf(module: nn.Module, input: Proxy, hx: Any, **options: Any) -> Proxy | None:
    """The call of ``module`` as one node, as the tracer makes it of torch.nn's; None for the module
    that is itself traced."""
    tracer: Any = input.tracer
    path = tracer.path_of_module(module)
    if not path:
        return None
    given = {name: value for name, value in options.items() if value is not None}
    node: Proxy = tracer.create_proxy(
        "call_module", path, (input,) if hx is None else (input, hx), given
    )
    return node
