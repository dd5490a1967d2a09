"""Calls under a tracer: torch.fx's, which takes only modules of torch.nn for leaves, and dynamo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._guards import CompileContext
from torch.compiler import is_compiling
from torch.fx import Proxy

from fastrnn import dispatch, functional
from fastrnn.functional.plain import is_exporting

__all__ = ["Proxy", "as_leaf", "in_one_piece"]


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


@contextmanager
def _compiling() -> Iterator[None]:
    """Lets is_compiling() be true."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


# Whether torch.compile does that for all that runs while it is at work; not before torch 2.13.
_holds_flag = hasattr(torch.compiler, "_compile_session_context")


def _piece(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        # A backend that runs the graph as it is calls this too, when nothing is compiled.
        held = _holds_flag or CompileContext.current_compile_id() is None
        with nullcontext() if held else _compiling():
            return getattr(functional, name)(*args, **kwargs)

    return call


_PIECES = {name: _piece(name) for name in ("lstm", "gru", "rnn")}


def _takes_pieces() -> bool:
    """Asked while dynamo traces: whether it is for torch.compile, which then knows the pieces.
    Importing fastrnn does not bring in dynamo, and Triton with it."""
    if not _tells_export or is_exporting():
        return False
    for piece in _PIECES.values():
        torch.compiler.allow_in_graph(piece)
    return True


_takes_pieces._dynamo_marked_constant = True  # type: ignore[attr-defined]
_tells_export = hasattr(torch.compiler, "is_exporting")  # not before torch 2.7


def in_one_piece(name: str, plain: bool) -> Any:
    """``functional``'s function of this name; where torch.compile traces and the call is ``plain``
    (none of its options draws, or is a number but an integer), one that dynamo does not look into.

    Dynamo guards every function and constant that it meets; looking at them before each call takes
    longer than a small layer. What a plain call does depends on its arguments, on what dynamo
    guards in any case, and on ``use_backend``, which is asked here.
    """
    if plain and is_compiling() and not dispatch._in_force and _takes_pieces():
        return _PIECES[name]
    return getattr(functional, name)
