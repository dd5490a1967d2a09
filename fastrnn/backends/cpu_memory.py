"""Memory of the CPU backend's large tensors.

What a call works with beside its outputs (tapes, scratch, gradients) comes from memory that the
process keeps: the same buffers come back at every step of training, and new pages cost up to a
quarter of one. So do outputs that a backward leads to, which nobody may resize; others are torch's.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

with contextlib.suppress(ImportError):  # a source tree without a build: no call comes this far
    from fastrnn import _cpu

CPU = torch.device("cpu")  # named, because torch.set_default_device may say otherwise
LARGE = 4 << 20  # bytes: larger tensors of torch's memory ask for huge pages
KEPT = 512 << 10  # bytes: larger tensors are kept; malloc keeps smaller ones by itself
_KINDS = {  # DLPack's type and bits
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.uint8: (1, 8),
}


def huge(tensor: Tensor) -> Tensor:
    """The tensor, which nobody has written to: a large one asks the system for huge pages."""
    if tensor.nbytes >= LARGE:
        _cpu.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def output(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor of torch's memory, which a caller may resize."""
    return huge(torch.empty(shape, dtype=dtype, device=CPU))


def kept(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one of memory that is kept when it is gone. It cannot be resized."""
    kind = _KINDS[dtype]
    if math.prod(shape) * kind[1] < 8 * KEPT:
        return torch.empty(shape, dtype=dtype, device=CPU)
    capsule = _cpu.kept_tensor(tuple(shape), *kind)
    return output(shape, dtype) if capsule is None else from_dlpack(capsule)


def kept_like(like: Tensor) -> Tensor:
    """``torch.empty_like``; a large dense tensor in the order of its axes as ``kept``."""
    if like.nbytes < KEPT or not like.is_contiguous() or like.dtype not in _KINDS:
        return torch.empty_like(like)
    return kept(like.shape, like.dtype)


def maker(like: Tensor) -> Callable[[], Tensor]:
    """What makes empty tensors as ``kept`` does, of this one's shape and dtype again and again."""
    if like.nbytes >= KEPT:
        return partial(kept, like.shape, like.dtype)
    return partial(torch.empty_like, torch.empty_like(like, device=CPU))  # the quickest way


def read_limit() -> None:
    """Takes what may lie idle from the environment."""
    value = os.environ.get("FASTRNN_KEEP_MEMORY")
    if value is None:
        return
    if value.isdecimal():
        _cpu.keep_memory(int(value) << 20)
    else:
        print(
            f"fastrnn: FASTRNN_KEEP_MEMORY={value} ignored: expected a whole number of MiB",
            file=sys.stderr,
        )
