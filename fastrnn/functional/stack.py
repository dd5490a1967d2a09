"""Recurrent layers as functions: a whole stack of layers, or one step of a cell.

Each function checks its arguments, asks ``fastrnn.dispatch`` for a backend and runs layer after
layer with torch's dropout in between. Weights are those of torch.nn, in the order of
``RNNBase._flat_weights``: per layer and direction w_ih, w_hh[, b_ih, b_hh][, w_hr].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import dispatch, ops
from fastrnn.autograd import Layer, distinct
from fastrnn.backends import reference, torch_nn
from fastrnn.functional.checks import (
    check_counts,
    check_layer_norm,
    check_pair,
    check_state,
    check_step,
    check_tensors,
    check_weights,
)
from fastrnn.functional.plain import compiles_plain, forward_only, plain_layer
from fastrnn.kinds import KINDS
from fastrnn.regularisers import Regularisers, draw_seed, drop_weights, regularisers_of
from fastrnn.sequence import Batch, describe, flip_layout, sized_by

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]


class WeightCache(Protocol):
    """Keeps packed weights between calls; the modules bring one."""

    def packed(self, layer: int, weights: Sequence[Tensor], cell: str, plan: str) -> Tensor | None:
        """Packed weights of a layer, or None where they must not be kept."""


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    flat_weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
    recurrent_dropout: float = 0,  # not 0.0: torch.compile makes symbols of float defaults
    recurrent_dropout_mode: str = "update",
    recurrent_dropout_per: str = "step",
    zoneout: float | tuple[float, float] = 0,
    weight_dropout: float = 0,
    layer_norm: bool = False,
    cache: WeightCache | None = None,
) -> tuple[Tensor, ...]:
    """A stack of LSTM layers; the formula is that of ``fastrnn.LSTM``.

    With D directions, H hidden units and Hout = proj_size or H:

    Args:
        input: (T, N, I), (N, T, I) if ``batch_first``, or packed rows with ``batch_sizes``.
        hx: h_0 (num_layers * D, N, Hout) and c_0 (num_layers * D, N, H); None: zeros.
        flat_weights: per layer and direction w_ih (4H, I or D*Hout), w_hh (4H, Hout)
            [, b_ih (4H), b_hh (4H)][, w_hr (proj_size, H)][, ln_weight_ih, ln_weight_hh (4H),
            ln_weight_c, ln_bias_c (H)]; gate rows i, f, g, o.
        dropout: probability of zeroing outputs between layers where ``training``.
        batch_sizes: (T,) as in a PackedSequence.
        lengths: N integers 1..T; outputs past an end are 0, states are those at the end.
        reset: bool (T, N), or (N, T) if ``batch_first``; zeroes h and c before step t.
        return_cells: also return c_t of the last layer, in the layout of output, (.., D*H).
        recompute: keep only states for the backward, compute the gates again there.
        recurrent_dropout, recurrent_dropout_mode, recurrent_dropout_per, zoneout, weight_dropout:
            as ``fastrnn.LSTM`` takes them. Masks are drawn where ``training``; else those that
            are not inverted act by their expectation.
        layer_norm: normalise the two terms and the cell, as ``fastrnn.LSTM``; the weights have the
            ln_ parameters then.
        cache: keeps packed weights between calls without gradients.

    Returns:
        output (.., D*Hout), h_n, c_n[, cells]; h_n and c_n are shaped like hx.

    Raises:
        RuntimeError: sizes or devices do not agree, no steps, or no backend can serve the call.
        TypeError, ValueError: another argument does not fit; the message names it.
    """
    h0, c0 = (None, None) if hx is None else check_pair(hx)
    output, h_n, c_n, cells = _run(
        "lstm_layer_norm" if layer_norm else "lstm", input, h0, c0, flat_weights, bias, num_layers,
        dropout, training, bidirectional,
        batch_first, proj_size, batch_sizes, lengths, reset, return_cells, recompute, cache,
        regularisers_of(
            "lstm", recurrent_dropout, recurrent_dropout_mode, recurrent_dropout_per, zoneout,
            weight_dropout,
        ),
    )  # fmt: skip
    assert c_n is not None
    if return_cells:
        assert cells is not None
        return output, h_n, c_n, cells
    return output, h_n, c_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    reset_after: bool = True,
    recurrent_dropout: float = 0,  # not 0.0: torch.compile makes symbols of float defaults
    recurrent_dropout_mode: str = "update",
    recurrent_dropout_per: str = "step",
    zoneout: float = 0,
    weight_dropout: float = 0,
    layer_norm: bool = False,
    cache: WeightCache | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers; the formula is that of ``fastrnn.GRU``.

    Args:
        hx: h_0 (num_layers * D, N, H); None: zeros.
        flat_weights: per layer and direction w_ih (3H, I or D*H), w_hh (3H, H)
            [, b_ih (3H), b_hh (3H)][, ln_weight_ih, ln_weight_hh (3H)]; gate rows r, z, n.
        reset_after: the reset gate acts after the matrix product with h (torch.nn) or before it.
        layer_norm: normalise the two terms, as ``fastrnn.GRU``; with reset_after only.

    The other arguments and the errors are those of ``lstm``. Returns output (.., D*H) and h_n.
    """
    cell = "gru" if reset_after else "gru_reset_before"
    if layer_norm:
        check_layer_norm(reset_after)
        cell = "gru_layer_norm"
    output, h_n, _, _ = _run(
        cell, input, hx, None, flat_weights, bias, num_layers, dropout, training, bidirectional,
        batch_first, 0, batch_sizes, lengths, reset, False, recompute, cache,
        regularisers_of(
            "gru", recurrent_dropout, recurrent_dropout_mode, recurrent_dropout_per, zoneout,
            weight_dropout,
        ),
    )  # fmt: skip
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    recurrent_dropout: float = 0,  # not 0.0: torch.compile makes symbols of float defaults
    recurrent_dropout_mode: str = "state",
    recurrent_dropout_per: str = "step",
    zoneout: float = 0,
    weight_dropout: float = 0,
    cache: WeightCache | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Elman layers; the formula is that of ``fastrnn.RNN``.

    Args:
        hx: h_0 (num_layers * D, N, H); None: zeros.
        flat_weights: per layer and direction w_ih (H, I or D*H), w_hh (H, H)[, b_ih, b_hh (H)].
        nonlinearity: "tanh" or "relu".
        recompute: without effect; a layer without gates keeps nothing but states.

    The other arguments and the errors are those of ``lstm``. Returns output (.., D*H) and h_n.
    """
    output, h_n, _, _ = _run(
        _rnn_name(nonlinearity), input, hx, None, flat_weights, bias, num_layers, dropout,
        training, bidirectional, batch_first, 0, batch_sizes, lengths, reset, False, False, cache,
        regularisers_of(
            "rnn", recurrent_dropout, recurrent_dropout_mode, recurrent_dropout_per, zoneout,
            weight_dropout,
        ),
    )  # fmt: skip
    return output, h_n


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    cache: WeightCache | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: input (N, I), hx = (h, c) of (N, H) each; returns the new (h, c)."""
    h, c = check_pair(hx)
    _, h_n, c_n, _ = _run_cell("lstm", input, h, c, w_ih, w_hh, b_ih, b_hh, cache)
    assert c_n is not None
    return h_n.squeeze(0), c_n.squeeze(0)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    cache: WeightCache | None = None,
) -> Tensor:
    """One GRU step: input (N, I), hx (N, H); returns the new h (N, H)."""
    cell = "gru" if reset_after else "gru_reset_before"
    return _run_cell(cell, input, hx, None, w_ih, w_hh, b_ih, b_hh, cache)[1].squeeze(0)


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    cache: WeightCache | None = None,
) -> Tensor:
    """One Elman step: input (N, I), hx (N, H); returns the new h (N, H)."""
    cell = _rnn_name(nonlinearity)
    return _run_cell(cell, input, hx, None, w_ih, w_hh, b_ih, b_hh, cache)[1].squeeze(0)


_Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _run(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    flat_weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    proj_size: int,
    batch_sizes: Tensor | None,
    lengths: Sequence[int] | Tensor | None,
    reset: Tensor | None,
    return_cells: bool,
    recompute: bool,
    cache: WeightCache | None,
    regularisers: Regularisers | None = None,
) -> _Results:
    """Check all arguments, choose a backend, run the stack: output, h_n, c_n, cells."""
    check_counts(num_layers, proj_size)
    check_tensors("flat_weights", flat_weights)
    batch = describe(
        input, batch_first=batch_first, batch_sizes=batch_sizes, lengths=lengths, reset=reset
    )
    batch = sized_by(batch, h0)
    half = dispatch.autocast_dtype(input)
    if half is not None:
        state = input if h0 is None else h0
        wide = torch.promote_types((state if c0 is None else c0).dtype, half)
        input, flat_weights = input.to(half), [w.to(half) for w in flat_weights]
        h0, c0 = [None if t is None else t.to(half) for t in (h0, c0)]
    directions = 2 if bidirectional else 1
    hidden, out = check_weights(cell, input, flat_weights, bias, num_layers, directions, proj_size)
    h_shape, c_shape = (num_layers * directions, batch.size, out), None
    if KINDS[cell].has_cell:
        c_shape = (num_layers * directions, batch.size, hidden)
    if h0 is not None and c_shape is None:
        check_state("hidden", h0, h_shape, input)
    elif h0 is not None:
        assert c0 is not None
        assert c_shape is not None
        check_state("hidden[0]", h0, h_shape, input)
        check_state("hidden[1]", c0, c_shape, input)

    records = (
        torch.is_grad_enabled()
        and _requires_grad(input, h0, c0, weights=flat_weights)
        and not forward_only()
    )
    sizes = (hidden, proj_size, directions, num_layers)
    active = None
    if regularisers is not None and regularisers.active(training):
        active = regularisers
    backend, plan = dispatch.choose(
        cell,
        input,
        batch,
        sizes,
        records,
        return_cells,
        recompute,
        "" if active is None else active.names(),
    )
    seed = None if active is None or not training else draw_seed()
    if active is not None and seed is not None and active.weight:
        flat_weights = drop_weights(flat_weights, seed, active.weight, num_layers, directions)
    cells = None
    plain = (
        backend == "cpu"
        and active is None
        and not (plan or return_cells or recompute or proj_size)
        and compiles_plain(cell, batch)
    )
    if h0 is None and not plain:
        h0 = input.new_zeros(h_shape)
        if c_shape is not None:
            c0 = h0 if c_shape == h_shape else input.new_zeros(c_shape)
    if backend == "torch":
        assert h0 is not None
        output, h_n, c_n = torch_nn.stack(
            cell, input, h0, c0, flat_weights, bias=bias, num_layers=num_layers,
            dropout=dropout if training else 0.0,
            training=training or (records and input.is_cuda),  # cuDNN's tape, in eval() too
            bidirectional=bidirectional, batch_first=batch.batch_first, batch_sizes=batch_sizes,
        )  # fmt: skip
    else:
        output, h_n, c_n, cells = _run_layers(
            backend, plan, cell, input, h0, c0, flat_weights, batch, num_layers, directions,
            dropout if training else 0.0, records, return_cells, recompute, plain, cache, seed,
            None if active is None else [active.noise(k, training) for k in range(num_layers)],
        )  # fmt: skip
    if half is not None:
        output, h_n, c_n = _as_torch_autocasts(cell, proj_size, output, h_n, c_n, wide)
    if return_cells and cells is not None:
        cells = cells.to(output.dtype)
    return output, h_n, c_n, cells


def _run_layers(
    backend: str,
    plan: str,
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    flat_weights: Sequence[Tensor],
    batch: Batch,
    num_layers: int,
    directions: int,
    dropout: float,
    records: bool,
    return_cells: bool,
    recompute: bool,
    plain: bool,
    cache: WeightCache | None,
    seed: Tensor | None,
    noises: list[str] | None,
) -> _Results:
    per_layer = len(flat_weights) // num_layers
    last = num_layers - 1
    # torch.nn draws dropout masks in (T, N, ..) order whatever the layout: walk the layers that
    # feed a dropout as views in that order, so that one seed gives one result.
    turned = batch.batch_first and dropout != 0 and last > 0
    layout = flip_layout(batch) if turned else batch
    if turned:
        x = x.transpose(0, 1)
    h_n: list[Tensor] = []
    c_n: list[Any] = []  # None where the cell has no c
    cells: Tensor | None = None
    for k in range(num_layers):
        if turned and k == last:
            x, layout = x.transpose(0, 1), batch
        h: Any  # None only where the call is plain
        h, c, weights = h0, c0, flat_weights
        if last:
            h = None if h0 is None else h0.narrow(0, k * directions, directions)
            c = None if c0 is None else c0.narrow(0, k * directions, directions)
            weights = flat_weights[k * per_layer : (k + 1) * per_layer]
        _, _, batch_first, batch_sizes, lengths, reset = layout
        noise = "" if noises is None else noises[k]
        if plain:
            x, h, c = plain_layer(x, h, c, weights, cell, batch_first, records)
        elif backend == "reference":
            x, h, c, cells = reference.layer(
                x, h, c, weights, batch_sizes, lengths, reset, cell, batch_first, seed, noise
            )
        elif records:
            if is_compiling():
                x, h, c, *weights = distinct([x, h, c, *weights])
            x, h, c, cells = Layer.apply(
                x, h, c, batch_sizes, lengths, reset, seed, cell, batch_first, recompute, plan,
                noise, *weights,
            )  # fmt: skip
        else:
            packed = None
            if cache is not None and backend == "cpu":
                packed = cache.packed(k, weights, cell, plan)
            direct = ops.unobserved(x, h, c, lengths, reset, *weights)
            run = ops.CPU["layer_forward"] if direct else ops.layer_forward
            x, h, c, cells = run(
                x, h, c, weights, packed, batch_sizes, lengths, reset, cell, batch_first,
                return_cells and k == last, plan, seed, noise,
            )  # fmt: skip
        if not last:
            return x, h, c, cells
        h_n.append(h)
        c_n.append(c)
        if dropout != 0 and k < last:
            x = torch.dropout(x, dropout, True)
    return x, torch.cat(h_n), torch.cat(c_n) if KINDS[cell].has_cell else None, cells


def _run_cell(
    cell: str,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    cache: WeightCache | None,
) -> _Results:
    """One step: a sequence of length 1. The state comes back as (1, N, H)."""
    weights = [w_ih, w_hh]
    if b_ih is not None and b_hh is not None:
        weights += [b_ih, b_hh]
    elif b_ih is not None or b_hh is not None:
        raise ValueError("b_ih, b_hh: got one of the two biases, expected both or neither")
    check_step(input, h, c)
    output, h_n, c_n, _ = results = _run(
        cell, input.unsqueeze(0), h.unsqueeze(0), None if c is None else c.unsqueeze(0), weights,
        b_ih is not None, 1, 0.0, False, False, False, 0, None, None, None, False, False, cache,
    )  # fmt: skip
    # Under autocast torch's LSTMCell, unlike its LSTM, keeps the dtype of the state.
    if c is not None and c.dtype != output.dtype and c_n is not None:
        wide = torch.promote_types(c.dtype, output.dtype)
        return output, h_n.to(wide), c_n.to(wide), None
    return results


def _rnn_name(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: got {nonlinearity!r}, expected 'tanh' or 'relu'")
    return "rnn_" + nonlinearity


def _requires_grad(*given: Tensor | None, weights: Sequence[Tensor]) -> bool:
    for t in (*given, *weights):  # noqa: SIM110 - any() over a generator takes three times as long
        if t is not None and t.requires_grad:
            return True
    return False


def _as_torch_autocasts(
    cell: str,
    proj_size: int,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give results the dtypes of torch.nn under autocast.

    LSTM and RNN return the 16-bit type throughout. GRU, and the cell state of an LSTM with
    projection, mix with the state in its own type and so return that.
    """
    if cell.startswith("gru"):
        return output.to(wide), h_n.to(wide), c_n
    if proj_size and c_n is not None:
        return output, h_n, c_n.to(wide)
    return output, h_n, c_n
