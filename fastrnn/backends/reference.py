"""One layer, both directions, by the plain-PyTorch recurrences of ``fastrnn.reference``.

Slow, differentiable to any order, and at home on every device, under every function transform and
in every floating dtype. It also is what the fused backward is differentiated through.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastrnn.kinds import KINDS
from fastrnn.noise import Noise
from fastrnn.reference import gru_layer, lstm_layer, rhn_layer, rnn_layer
from fastrnn.regularisers import draw_masks

__all__ = ["from_layout", "layer", "rhn", "to_layout", "without_autocast"]


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
    x, lengths, reset, live = from_layout(x, h0.size(1), batch_sizes, lengths, reset, batch_first)
    directions = h0.size(0)
    per_direction = len(weights) // directions
    kind = KINDS[cell]
    ys, h_n, c_n, cells = [], [], [], []
    for d in range(directions):
        own = weights[d * per_direction : (d + 1) * per_direction]
        options: dict[str, Any] = {"reverse": d == 1, "lengths": lengths, "reset": reset}
        if noise:
            hidden = own[0].size(0) // kind.gates
            shape, out = (x.size(0), x.size(1)), h0.size(2)
            options["masks"] = draw_masks(Noise.parse(noise), seed, d, shape, hidden, out, x)
        if kind.norms:
            own, options["norm"] = own[: -kind.norms], own[-kind.norms :]
        if kind.has_cell:
            assert c0 is not None
            y, h, c, states = lstm_layer(x, h0[d], c0[d], own, **options)
            c_n.append(c)
            cells.append(states)
        elif cell.startswith("gru"):
            after = cell != "gru_reset_before"
            y, h = gru_layer(x, h0[d], own, reset_after=after, **options)
        else:
            name = cell.removeprefix("rnn_")
            y, h = rnn_layer(x, h0[d], own, nonlinearity=name, **options)
        ys.append(y)
        h_n.append(h)

    y, h = to_layout(ys, live, batch_first), torch.stack(h_n)
    if not kind.has_cell:
        return y, h, None, None
    states = to_layout(cells, live, batch_first)
    if states.dtype in (torch.bfloat16, torch.float16):
        states = states.float()
    return y, h, torch.stack(c_n), states


def rhn(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    x_mask: Tensor | None,
    s_mask: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """One Recurrent Highway layer; arguments, shapes and results as ``fastrnn::rhn_forward``."""
    x, lengths, reset, live = from_layout(x, h0.size(1), batch_sizes, lengths, reset, batch_first)
    directions = h0.size(0)
    per = len(weights) // directions
    results = [
        rhn_layer(
            x,
            h0[d],
            weights[d * per : (d + 1) * per],
            x_mask=None if x_mask is None else x_mask[d],
            s_mask=None if s_mask is None else s_mask[d],
            reverse=d == 1,
            lengths=lengths,
            reset=reset,
        )
        for d in range(directions)
    ]
    ys, states = zip(*results, strict=True)
    return to_layout(ys, live, batch_first), torch.stack(states)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Where a layer is computed again in the dtype that it had, autocast must not reach into it."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def from_layout(
    x: Tensor,
    size: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x (T, N, I), lengths and reset (T, N), and where packed data lie in them, (T, N) bool."""
    if batch_sizes is not None:
        live = torch.arange(size, device=batch_sizes.device) < batch_sizes.unsqueeze(1)
        lengths = live.sum(0).to(x.device)
        live = live.to(x.device)
        x = x.new_zeros((*live.shape, x.size(-1))).index_put(live.nonzero().unbind(1), x)
        return x, lengths, reset, live
    if batch_first:
        return x.transpose(0, 1), lengths, None if reset is None else reset.transpose(0, 1), None
    return x, lengths, reset, None


def to_layout(parts: Sequence[Tensor], live: Tensor | None, batch_first: bool) -> Tensor:
    """Join the directions, (T, N, K) each, and lay them out as the input is."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
    if live is not None:
        return joined[live]
    return joined.transpose(0, 1).contiguous() if batch_first else joined
