"""Which family of CUDA kernels a layer belongs to."""

from __future__ import annotations

import torch

from fastrnn.backends.cuda_native import Need, choose, current

__all__ = ["layer_need", "need_of"]


def layer_need(
    cell: str,
    dtype: torch.dtype,
    size: int,
    hidden: int,
    directions: int,
    *,
    out: int = 0,
    regularised: bool = False,
    exchange: str = "",
) -> Need:
    """What the kernels of an LSTM, GRU or RNN are chosen by.

    A projection (``out``) and layer norm have kernels for a whole sequence, each by itself and
    without regularisers; where none of them takes the layer its steps are launched one by one. The
    batch does not matter here: backward, and whoever traces a graph, must come to the same result.
    """
    normed = cell.endswith("_layer_norm")
    if (out or normed) and not regularised and not (out and normed) and exchange != "steps":
        own = Need("lstm_projected" if out else cell, dtype, 1, hidden, directions)
        try:
            for backward in (False, True):
                choose(own, backward, current(), exchange)
        except RuntimeError:
            pass
        else:
            return own._replace(size=size)
    return Need(
        cell.removesuffix("_layer_norm"), dtype, size, hidden, directions,
        regularised=regularised, out=out, normed=normed,
    )  # fmt: skip


def need_of(
    cell: str,
    dtype: torch.dtype,
    size: int,
    hidden: int,
    directions: int,
    depth: int,
    regularised: bool,
    out: int,
    gate_masks: bool = False,
) -> Need:
    """The same for any cell."""
    if cell == "bnlstm" or cell.startswith("rhn"):
        return Need(
            cell, dtype, size, hidden, directions, depth, regularised, gate_masks=gate_masks
        )
    return layer_need(cell, dtype, size, hidden, directions, out=out, regularised=regularised)
