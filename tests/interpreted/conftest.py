"""Tests of the Triton kernels on the CPU.

Triton reads TRITON_INTERPRET where it is imported, so they are for a process that has it from the
start: tests/test_triton.py makes one for each file here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # A bound of a loop, in the interpreter of Triton 3.2 to 3.6; an error from NumPy 2.4 on.
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning"
    )


if not collect_ignore_glob:
    import triton.language as tl
    from triton.runtime import interpreter

    def _patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The interpreter looks for what to patch in triton.language at each call between functions
        of a kernel. All has been patched at the launch, and the looking is a third of the time."""

        def patched(fn: Any) -> Any:
            modules = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
            return patch(fn) if any(tl.core.is_builtin(lang.load) for lang in modules) else None

        return patched

    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _patch_once(interpreter._patch_lang)
