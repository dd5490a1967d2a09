"""The whole stack by torch's own kernels, the ones behind torch.nn.LSTM, GRU and RNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["plan", "stack"]

_FUNCTIONS = {"gru": torch._VF.gru, "rnn_tanh": torch._VF.rnn_tanh, "rnn_relu": torch._VF.rnn_relu}


def stack(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run all layers.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input: (T, N, I), (N, T, I) if ``batch_first``, or (sum, I) with ``batch_sizes``.
        h0, c0: (num_layers * D, N, Hout), (num_layers * D, N, H); c0 for an LSTM only.
        flat_weights: all weights in the order of torch.nn.RNNBase._flat_weights.

    Returns:
        output, h_n and c_n (None but for an LSTM).
    """
    weights, h0 = list(flat_weights), h0.contiguous()  # cuDNN takes no other states
    tail = (bias, num_layers, float(dropout), training, bidirectional)
    if c0 is not None:
        c0 = c0.contiguous()
        if batch_sizes is not None:
            return torch._VF.lstm(input, batch_sizes, (h0, c0), weights, *tail)
        return torch._VF.lstm(input, (h0, c0), weights, *tail, batch_first)
    run = _FUNCTIONS[cell]
    if batch_sizes is not None:
        output, h_n = run(input, batch_sizes, h0, weights, *tail)
    else:
        output, h_n = run(input, h0, weights, *tail, batch_first)
    return output, h_n, None


def plan(cell: str) -> str:
    """The name of the torch function that runs."""
    return f"torch.{cell}"
