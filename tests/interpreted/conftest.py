"""Tests of the Triton kernels on the CPU.

Triton reads TRITON_INTERPRET where it is imported, so they are for a process that has it from the
start: tests/test_triton.py makes one for each file here.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # A bound of a loop, in the interpreter of Triton 3.2 to 3.6; an error from NumPy 2.4 on.
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning"
    )
