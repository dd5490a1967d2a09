"""fastrnn.BNLSTM in 16 bits and under autocast: arithmetic and statistics are float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import fastrnn
from tests.test_bnlstm import H, I, N, T, make
from tests.tolerances import assert_close_by_rule, assert_same_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """16-bit tensors, float32 arithmetic: at least as good as rounding the float64 result."""
    module, x = make(num_layers=2, gamma_init=0.5), torch.randn(T, N, I)
    module, x = module.to(dtype), x.to(dtype).requires_grad_()
    wide = copy.deepcopy(module).double()
    output, (h, c), cells = module(x, return_cells=True)
    exact = [t.detach() for t in wide(x.detach().double(), return_cells=True)[::2]]
    for name, got, truth in zip(("y", "cells"), (output, cells), exact, strict=True):
        assert got.dtype == dtype
        assert_close_by_rule(name, got, truth, truth.to(dtype))
    assert h.dtype == c.dtype == module.running_mean_c_l0.dtype == dtype
    output.sum().backward()
    assert x.grad.dtype == module.weight_hh_l0.grad.dtype == dtype
    for (name, got), truth in zip(module.named_buffers(), wide.buffers(), strict=True):
        if got.is_floating_point():
            assert_close_by_rule(name, got, truth, truth.to(dtype))


def test_autocast() -> None:
    module, x = make(), torch.randn(T, N, I, requires_grad=True)
    plain = copy.deepcopy(module)(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, (h, c) = module(x)
    assert output.dtype == h.dtype == c.dtype == torch.bfloat16
    assert_same_bits("float32 arithmetic", output, plain.bfloat16())
    output.float().square().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_reaches_into_no_backend(backend: str, half: torch.dtype) -> None:
    """The reference, which statistics of a process group take, is in float32 as the kernels are."""
    module, x, dy = make(), torch.randn(T, N, I), torch.randn(T, N, H).to(half)

    def tensors_after(backend: str, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
        own, leaf = copy.deepcopy(module).to(dtype), x.to(dtype, copy=True).requires_grad_()
        with fastrnn.use_backend(backend), torch.autocast("cpu", dtype=half, enabled=autocast):
            output, _ = own(leaf)
        output.backward(dy.to(output.dtype))
        leaves = {"x": leaf, **dict(own.named_parameters())}
        return {name: t.grad for name, t in leaves.items()} | dict(own.named_buffers())

    got = tensors_after(backend, torch.float32, autocast=True)
    same = tensors_after("reference", torch.float32, autocast=False)
    for name, truth in tensors_after("reference", torch.float64, autocast=False).items():
        if truth.is_floating_point():
            assert_close_by_rule(name, got[name], truth, same[name])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives_inside_autocast(training: bool) -> None:
    """In float32, wherever the second backward is called."""
    module = make().train(training)
    inputs = [torch.randn(T, N, I, requires_grad=True), *module.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(inputs[0])[0].float().square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        loss = sum(t.square().sum() for t in first)
        inside = torch.autograd.grad(loss, inputs, retain_graph=True)
    outside = torch.autograd.grad(loss, inputs)
    for i, (a, b) in enumerate(zip(inside, outside, strict=True)):
        assert_same_bits(f"input {i}", a, b)
