"""Problems of tests/problems.py on a GPU: the tensors there, the verdict on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrnn.backends import cuda_native
from tests.formats import check_in_format
from tests.problems import Problem, Result, backward, check, forward, forward_train
from tests.tolerances import assert_same_bits

_P = TypeVar("_P", bound=Any)  # a problem, of whatever family

FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "bf16x3": torch.float32,
}


def moved(p: _P, device: str = "cuda") -> _P:
    """The same problem with its tensors on a GPU; batch_sizes stay on the host, as torch has it."""
    assert p.batch_sizes is None or p.batch_sizes.is_cpu
    there = copy.copy(p)
    for name in ("x", "h0", "c0", "lengths", "reset", "x_mask", "s_mask"):
        value = getattr(p, name, None)
        setattr(there, name, None if value is None else value.to(device))
    there.weights = [w.to(device) for w in p.weights]
    there.upstream = {key: value.to(device) for key, value in p.upstream.items()}
    return there


def on_host(result: Result) -> Result:
    return {key: value.cpu() for key, value in result.items()}


@contextmanager
def multiplied_as(name: str) -> Iterator[None]:
    """float32 products in TF32, or in three of bfloat16; torch's own products in full."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def settle(where: str = "cuda") -> None:
    """Waits for the device and for what its kernels have to complain about."""
    if where == "cuda":
        torch.cuda.synchronize()
        cuda_native.raise_if_failed(torch.cuda.current_device())


def solve(there: Problem) -> Result:
    """Outputs and gradients of a problem on the GPU, without the opaque tape."""
    tape = forward_train(there)
    out = tape | backward(there, tape)
    del out["gates"]
    return out


def verify(p: Problem, name: str, where: str = "cuda") -> None:
    """Training by the rule, inference with the same bits; the inputs are left alone."""
    with multiplied_as(name):
        there = moved(p, where)
        before = [t.clone() for t in there.inputs()]
        got = solve(there)
        inferred = forward(there, return_cells=p.case.is_lstm)
        settle(where)
    if name in ("tf32", "bf16x3"):
        check_in_format(p, on_host(got), name)
    else:
        check(p, on_host(got))
    for key, value in inferred.items():
        assert_same_bits(f"inference: {key} of {p.case}", value, got[key])
    for tensor, kept in zip(there.inputs(), before, strict=True):
        assert_same_bits(f"an input of {p.case}", tensor, kept)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for key, value in a.items():
        assert_same_bits(key, value, b[key])
