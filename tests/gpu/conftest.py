"""Tests that need a GPU: skipped, with the reason, where there is none.

Everything runs with torch's deterministic mode (tests/conftest.py), which wants cuBLAS to be told
before it starts.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def why_not() -> str:
    """Why nothing here can run; empty if it can."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    from fastrnn.backends import cuda_missing

    return cuda_missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    why = why_not() if ours else ""
    for item in ours:
        # Newer torch has two sets of switches and recommends the other one.
        item.add_marker(pytest.mark.filterwarnings("ignore:Please use the new API settings"))
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
