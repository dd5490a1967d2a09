"""Tests of the CUDA backend on the CPU: its kernels are compiled for a SIMT emulator.

They are for a process in which that library stands in for fastrnn._cuda from the start:
tests/test_cuda_backend.py makes one for each file here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

LIBRARY = os.environ.get("FASTRNN_EMULATED", "")
collect_ignore_glob = [] if LIBRARY else ["test_*.py"]

if LIBRARY:
    spec = importlib.util.spec_from_file_location("_cuda_emulated", LIBRARY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.emulated
    sys.modules["fastrnn._cuda"] = module


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    """allow_tf32 is put back after each test."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before
