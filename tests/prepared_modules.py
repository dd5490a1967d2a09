"""Small layers for the tests of prepared calls."""

from __future__ import annotations

from typing import Any

import torch

import fastrnn

CELLS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}


def make(cell: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return CELLS[cell](5, 7, **options).eval()


def states(module: Any, batch: int | None) -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if batch is None else (batch,)
    h = torch.randn(layers, *middle, module.proj_size or 7)
    return (h, torch.randn(layers, *middle, 7)) if module.mode == "LSTM" else h
