"""The same modules on the Triton backend. Last: each shape is compiled when it is first seen."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_gpu_modules import CALLS, MODULES, check_module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("call", CALLS)
def test_module(call: str, name: str, dtype: torch.dtype) -> None:
    check_module("triton", name, dtype, call)
