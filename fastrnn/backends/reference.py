"""One layer, both directions, by the plain-PyTorch recurrences of ``fastrnn.reference``.

Slow, differentiable to any order, and at home on every device, under every function transform and
in every floating dtype. It also is what the fused backward is differentiated through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.noise import Noise
from fastrnn.reference import gru_layer, lstm_layer, rnn_layer
from fastrnn.regularisers import draw_masks

__all__ = ["layer"]

GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer; arguments and shapes as ``fastrnn::layer_forward``.

    Returns:
        y, h_n, c_n and cells; the last two are None but for an LSTM. Cells have the data's dtype,
        float32 for the 16-bit types.
    """
    live = None
    if batch_sizes is not None:
        live = torch.arange(h0.size(1)) < batch_sizes.unsqueeze(1)
        lengths = live.sum(0).to(x.device)
        live = live.to(x.device)
        x = x.new_zeros((*live.shape, x.size(-1))).index_put(live.nonzero().unbind(1), x)
    elif batch_first:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)

    directions = h0.size(0)
    per_direction = len(weights) // directions
    ys, h_n, c_n, cells = [], [], [], []
    for d in range(directions):
        own = weights[d * per_direction : (d + 1) * per_direction]
        options: dict[str, Any] = {"reverse": d == 1, "lengths": lengths, "reset": reset}
        if noise:
            hidden = own[0].size(0) // GATES[cell]
            shape, out = (x.size(0), x.size(1)), h0.size(2)
            options["masks"] = draw_masks(Noise.parse(noise), seed, d, shape, hidden, out, x)
        if cell == "lstm":
            assert c0 is not None
            y, h, c, states = lstm_layer(x, h0[d], c0[d], own, **options)
            c_n.append(c)
            cells.append(states)
        elif cell.startswith("gru"):
            after = cell == "gru"
            y, h = gru_layer(x, h0[d], own, reset_after=after, **options)
        else:
            name = cell.removeprefix("rnn_")
            y, h = rnn_layer(x, h0[d], own, nonlinearity=name, **options)
        ys.append(y)
        h_n.append(h)

    y, h = _to_layout(ys, live, batch_first), torch.stack(h_n)
    if cell != "lstm":
        return y, h, None, None
    states = _to_layout(cells, live, batch_first)
    if states.dtype in (torch.bfloat16, torch.float16):
        states = states.float()
    return y, h, torch.stack(c_n), states


def _to_layout(parts: Sequence[Tensor], live: Tensor | None, batch_first: bool) -> Tensor:
    """Join the directions, (T, N, K) each, and lay them out as the input is."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
    if live is not None:
        return joined[live]
    return joined.transpose(0, 1).contiguous() if batch_first else joined
