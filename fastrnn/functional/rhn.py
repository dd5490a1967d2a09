"""The Recurrent Highway Network as a function: checks, dispatch, masks, a stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import dispatch, ops
from fastrnn.autograd import distinct
from fastrnn.autograd.rhn import RhnLayer
from fastrnn.backends import reference
from fastrnn.functional.checks import check_count, check_state, check_tensors
from fastrnn.functional.plain import forward_only
from fastrnn.functional.stack import WeightCache
from fastrnn.sequence import Batch, describe, flip_layout, sized_by

__all__ = ["rhn"]


def rhn(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    couple_carry: bool = True,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    variational_input: float = 0.0,
    variational_state: float = 0.0,
    tie_gate_masks: bool = True,
    batch_sizes: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    cache: WeightCache | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Recurrent Highway layers; the formula is that of ``fastrnn.RHN``.

    With D directions, H hidden units, depth L and G = 2 gates (h, t), or 3 (h, t, c) where
    ``couple_carry`` is False; L, H and the sizes of the layers are read from the weights:

    Args:
        input: (T, N, I), (N, T, I) if ``batch_first``, or packed rows with ``batch_sizes``.
        hx: h_0 (num_layers * D, N, H); None: zeros.
        flat_weights: per layer and direction w_ih (G*H, I or D*H), w_hh (L, G*H, H)
            [, bias (L, G*H)]; gate rows h, t[, c].
        dropout: probability of zeroing outputs between layers where ``training``.
        variational_input, variational_state: probabilities of zeroing features of a layer's input
            and of its state where they enter the matrix products, where ``training``; the rest is
            scaled by 1 / (1 - p). Masks are drawn once per call, sequence, layer and direction
            from torch's generator, and shared over time and depth.
        tie_gate_masks: one mask for all gates, else one for each.
        batch_sizes: (T,) as in a PackedSequence.
        lengths: N integers 1..T; outputs past an end are 0, states are those at the end.
        reset: bool (T, N), or (N, T) if ``batch_first``; zeroes the state before step t.
        recompute: keep only outputs for the backward, compute the gates again there.
        cache: keeps packed weights between calls without gradients.

    Returns:
        output (.., D*H) and h_n, shaped like hx.

    Raises:
        RuntimeError: sizes or devices do not agree, no steps, or no backend can serve the call.
        TypeError, ValueError: another argument does not fit; the message names it.
    """
    for name, p in (
        ("dropout", dropout),
        ("variational_input", variational_input),
        ("variational_state", variational_state),
    ):
        check_probability(name, p)
    check_count("num_layers", num_layers)
    check_tensors("flat_weights", flat_weights)
    batch = describe(
        input, batch_first=batch_first, batch_sizes=batch_sizes, lengths=lengths, reset=reset
    )
    batch = sized_by(batch, hx)
    half = dispatch.autocast_dtype(input)
    if half is not None:
        input, flat_weights = input.to(half), [w.to(half) for w in flat_weights]
        hx = None if hx is None else hx.to(half)
    directions = 2 if bidirectional else 1
    hidden = check_weights(input, flat_weights, couple_carry, bias, num_layers, directions)
    h_shape = (num_layers * directions, batch.size, hidden)
    if hx is None:
        hx = input.new_zeros(h_shape)
    else:
        check_state("hidden", hx, h_shape, input)

    leaves = (input, hx, *flat_weights)
    records = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    records = records and not forward_only()
    sizes = (hidden, 0, directions, num_layers)
    gates = 2 if couple_carry else 3
    gate_masks = training and variational_state > 0 and not tie_gate_masks
    highway = (flat_weights[1].size(0), gates, gate_masks)
    backend, plan = dispatch.choose(
        "rhn", input, batch, sizes, records, False, recompute, highway=highway
    )
    # "bf16" is for kernels this cell does not have: its float32 stays float32.
    plan = "" if backend == "cpu" else plan
    groups = 1 if tie_gate_masks else gates
    rates = (variational_input, variational_state) if training else (0.0, 0.0)
    return _run_layers(
        backend, plan, input, hx, flat_weights, batch, num_layers, directions,
        dropout if training else 0.0, rates, groups, records, recompute, cache,
    )  # fmt: skip


def check_probability(name: str, p: Any) -> None:
    """Raise unless p is a number in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(
            f"{name}: got {p!r} ({type(p).__name__}), expected a probability, a number in [0, 1]"
        )
    if not 0 <= p <= 1:
        raise ValueError(
            f"{name}: got {p}, expected a probability in [0, 1], that of an element being zeroed"
        )


def _mask(like: Tensor, p: float, *shape: int) -> Tensor | None:
    """An inverted dropout mask: 0 with probability p, else 1 / (1 - p); None where p is 0."""
    return torch.nn.functional.dropout(like.new_ones(shape), p, True) if p else None


def _run_layers(
    backend: str,
    plan: str,
    x: Tensor,
    hx: Tensor,
    flat_weights: Sequence[Tensor],
    batch: Batch,
    num_layers: int,
    directions: int,
    dropout: float,
    rates: tuple[float, float],
    groups: int,
    records: bool,
    recompute: bool,
    cache: WeightCache | None,
) -> tuple[Tensor, Tensor]:
    per_layer = len(flat_weights) // num_layers
    last = num_layers - 1
    # One seed gives one result whatever the layout: layers that feed a dropout are walked as views
    # in (T, N, ..) order, as in `fastrnn.functional.stack`.
    turned = batch.batch_first and dropout > 0 and last > 0
    layout = flip_layout(batch) if turned else batch
    if turned:
        x = x.transpose(0, 1)
    h_n: list[Tensor] = []
    for k in range(num_layers):
        if turned and k == last:
            x, layout = x.transpose(0, 1), batch
        h = hx.narrow(0, k * directions, directions) if last else hx
        weights: Sequence[Tensor] = flat_weights[k * per_layer : (k + 1) * per_layer]
        x_mask = _mask(x, rates[0], directions, groups, batch.size, x.size(-1))
        s_mask = _mask(x, rates[1], directions, groups, batch.size, h.size(-1))
        _, _, batch_first, batch_sizes, lengths, reset = layout
        if backend == "reference":
            x, h = reference.rhn(
                x, h, weights, x_mask, s_mask, batch_sizes, lengths, reset, batch_first
            )
        elif records:
            if is_compiling():
                x, h, *weights = distinct([x, h, *weights])
            x, h = RhnLayer.apply(
                x, h, x_mask, s_mask, batch_sizes, lengths, reset, batch_first, recompute, plan,
                *weights,
            )  # fmt: skip
        else:
            # Weights packed for masks that differ from gate to gate have another layout.
            plain = backend == "cpu" and (groups == 1 or (x_mask is None and s_mask is None))
            packed = cache.packed(k, weights, "rhn", "") if cache is not None and plain else None
            direct = ops.unobserved(x, h, x_mask, s_mask, lengths, reset, *weights)
            run = ops.RHN_CPU["rhn_forward"] if direct else ops.rhn_forward
            x, h = run(
                x,
                h,
                weights,
                x_mask,
                s_mask,
                packed,
                batch_sizes,
                lengths,
                reset,
                batch_first,
                plan,
            )
        h_n.append(h)
        if dropout > 0 and k < last:
            x = torch.nn.functional.dropout(x, dropout, True)
    return x, torch.cat(h_n) if last else h_n[0]


def check_weights(
    input: Tensor,
    weights: Sequence[Tensor],
    couple_carry: bool,
    bias: bool,
    num_layers: int,
    directions: int,
) -> int:
    """Check number, shape, dtype and device of all weights; returns H."""
    per_direction = 2 + bool(bias)
    if len(weights) != num_layers * directions * per_direction:
        raise ValueError(
            f"flat_weights: got {len(weights)} tensors, expected {per_direction} for each of "
            f"{num_layers} layers and {directions} directions (bias={bias})"
        )
    w_ih, w_hh = weights[0], weights[1]
    if w_ih.dim() != 2 or w_hh.dim() != 3:
        raise ValueError(
            f"flat_weights: got w_ih and w_hh of {w_ih.dim()} and {w_hh.dim()} dimensions, "
            "expected 2 and 3: w_ih (G*H, I) and w_hh (depth, G*H, H)"
        )
    depth, _, hidden = w_hh.shape
    if depth < 1:
        raise ValueError(f"flat_weights[1]: got depth {depth}, expected at least 1")
    names = "h and t" if couple_carry else "h, t and c"
    rows = (2 if couple_carry else 3) * hidden
    features = input.size(-1)
    if w_ih.size(1) != features:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.size(1)}, got {features}"
        )
    index = 0
    for layer in range(num_layers):
        wide = features if layer == 0 else directions * hidden
        shapes: list[tuple[int, ...]] = [(rows, wide), (depth, rows, hidden)]
        for expected in (shapes + [(depth, rows)] * bool(bias)) * directions:
            w = weights[index]
            if w.shape != expected:
                raise RuntimeError(
                    f"flat_weights[{index}]: got shape {tuple(w.shape)}, expected {expected} in "
                    f"layer {layer} with hidden_size {hidden} and the rows of {names} "
                    f"(couple_carry={couple_carry})"
                )
            if w.dtype != input.dtype:
                raise ValueError(
                    f"RNN input dtype ({input.dtype}) does not match weight dtype ({w.dtype}). "
                    f"Convert input: input.to({w.dtype}), or convert model: model.to({input.dtype})"
                )
            if w.device != input.device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, found input tensor "
                    f"at {input.device} and parameter tensor at {w.device}"
                )
            index += 1
    return hidden
