"""Hooks on saved tensors that change strides: a backward reads what they give back right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastrnn
from tests.tolerances import assert_same_bits

Solve = Callable[[torch.nn.Module, Tensor, str], list[Tensor]]

LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LSTM": lambda: fastrnn.LSTM(3, 5, bidirectional=True),
    "GRU": lambda: fastrnn.GRU(3, 5, reset_after=False),
    "RHN": lambda: fastrnn.RHN(3, 5, depth=2),
    "BNLSTM": lambda: fastrnn.BNLSTM(3, 5, max_length=4),
}


def transposed(t: Tensor) -> Tensor:
    """The same values with the strides of the transpose."""
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def check_other_strides(solve: Solve, layer: str, backend: str) -> None:
    """``solve`` gives the results and gradients of a call; they keep their bits under the hook."""
    rnn, x = LAYERS[layer](), torch.randn(4, 3, 3)
    expected = solve(rnn, x, backend)
    with torch.autograd.graph.saved_tensors_hooks(transposed, transposed):
        got = solve(rnn, x, backend)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"result {index}", a, b)
