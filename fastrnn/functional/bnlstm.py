"""A stack of batch-normalised LSTM layers as a function, which also moves running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import dispatch, ops
from fastrnn.autograd import BNLSTMLayer, distinct
from fastrnn.backends import cpu_bnlstm, reference_bnlstm
from fastrnn.functional.checks import (
    check_count,
    check_pair,
    check_process_group,
    check_settings,
    check_state,
    check_tensors,
)
from fastrnn.functional.plain import forward_only, is_exporting
from fastrnn.functional.stack import WeightCache
from fastrnn.sequence import Batch, describe, sized_by

__all__ = ["bnlstm"]

STATISTICS = 7  # per layer and direction; the last is num_batches_tracked
_Used = tuple[Tensor, Tensor, Tensor]


def bnlstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    flat_weights: Sequence[Tensor],
    flat_statistics: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    batch_stats: bool | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    input_stats: str = "step",
    h0_noise: float = 0.0,
    first_step: int = 0,
    process_group: Any = None,
    cache: WeightCache | None = None,
) -> tuple[Tensor, ...]:
    """A stack of batch-normalised LSTM layers; the formula is that of ``fastrnn.BNLSTM``.

    With D directions and H hidden units:

    Args:
        input: (T, N, I), (N, T, I) if ``batch_first``, or packed rows with ``batch_sizes``.
        hx: h_0 and c_0 (num_layers * D, N, H); None: zeros.
        flat_weights: per layer and direction w_ih (4H, I or D*H), w_hh (4H, H)[, bias (4H)],
            gamma_ih (4H), gamma_hh (4H), gamma_c (H), beta_c (H); gate rows i, f, g, o.
        flat_statistics: per layer and direction the running mean and variance of the input term
            (L, 4H), or (1, 4H) with ``input_stats="sequence"``, of the recurrent term (L, 4H) and
            of the cell (L, H), and num_batches_tracked (L,). Updated in place with
            ``batch_stats``, once everything has been computed.
        training: whether ``dropout`` acts between layers.
        batch_stats: normalise by the batch's statistics; None: as ``training``.
        h0_noise: standard deviation of noise added to h_0.
        first_step: the number of the first step, for sequences that come in parts.
        process_group: the batch is that of all ranks of this group of torch.distributed.

    The other arguments and the errors are those of ``lstm``.

    Returns:
        output (.., D*H), h_n, c_n[, cells]; h_n and c_n are shaped like hx.
    """
    if not is_compiling():
        check_settings(dropout, eps, momentum, h0_noise)
        check_process_group(process_group)
    batch_stats = training if batch_stats is None else batch_stats
    batch = describe(
        input, batch_first=batch_first, batch_sizes=batch_sizes, lengths=lengths, reset=reset
    )
    check_count("num_layers", num_layers)
    check_count("first_step", first_step, 0)
    check_tensors("flat_weights", flat_weights)
    check_tensors("flat_statistics", flat_statistics)
    if input_stats not in ("step", "sequence"):
        raise ValueError(f"input_stats: got {input_stats!r}, expected 'step' or 'sequence'")
    h0, c0 = (None, None) if hx is None else check_pair(hx)
    batch = sized_by(batch, h0)
    directions = 2 if bidirectional else 1
    autocast = dispatch.autocast_dtype(input)
    hidden = check_layers(
        input, flat_weights, flat_statistics, bias, num_layers, directions,
        input_stats == "sequence", autocast is not None,
    )  # fmt: skip
    dtype = input.dtype if autocast is None else autocast
    grad = torch.is_grad_enabled() and not forward_only()
    h0_c0 = () if hx is None else (h0, c0)
    records = grad and any(t.requires_grad for t in (input, *h0_c0, *flat_weights))
    # Statistics of 16-bit values need more digits than those have: all is computed in float32, but
    # where kernels keep statistics, cells and sums in it on their own.
    wide = ops.state_dtype(dtype)
    problem = describe_problem(
        input, dtype, batch, hidden, directions, num_layers, records, return_cells,
        batch_stats and process_group is not None,
    )  # fmt: skip
    backend = dispatch.settle(problem)
    compute = dtype if backend == "cuda" else wide
    shape = (num_layers * directions, batch.size, hidden)
    for name, state in (("hidden[0]", h0), ("hidden[1]", c0)):
        if state is not None:
            check_state(name, state, shape, input if autocast is None else input.to(state.dtype))
    x = input.to(compute)
    weights = [w if w.dtype is compute else w.to(compute) for w in flat_weights]
    h0 = x.new_zeros(shape) if h0 is None else h0.to(compute)
    c0 = x.new_zeros(shape) if c0 is None else c0.to(compute)
    if h0_noise:
        h0 = h0 + h0_noise * torch.randn_like(h0)

    per, last = len(weights) // num_layers, num_layers - 1
    per_statistics = STATISTICS * directions
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    cells = x
    updates: list[tuple[Sequence[Tensor], _Used]] = []
    for k in range(num_layers):
        own = weights[k * per : (k + 1) * per]
        statistics = flat_statistics[k * per_statistics : (k + 1) * per_statistics]
        states = slice(k * directions, (k + 1) * directions)
        x, h, c, cells, *used = _layer(
            backend, x, h0[states], c0[states], own, _given(statistics, first_step, wide),
            batch, eps, batch_stats, input_stats == "sequence", return_cells and k == last,
            records, process_group, None if cache is None or batch_stats else (cache, k, bias),
        )  # fmt: skip
        h_n.append(h)
        c_n.append(c)
        updates.append((statistics, (used[0], used[1], used[2])))
        if training and dropout > 0 and k < last:
            # One seed gives one result whatever the layout: masks are drawn in that of (T, N, ..).
            x = x.transpose(0, 1).contiguous() if batch.batch_first else x
            x = torch.nn.functional.dropout(x, dropout, True)
            x = x.transpose(0, 1) if batch.batch_first else x
    if batch_stats:
        with torch.no_grad():
            live = _live_rows(batch, updates[0][1][1].size(2), x.device, process_group)
            for statistics, found in updates:
                if backend == "cpu" and _followed(statistics, found, live, momentum, first_step):
                    continue
                for d in range(directions):
                    _update(
                        statistics[STATISTICS * d : STATISTICS * (d + 1)],
                        [part[d] for part in found], live, momentum, first_step,
                    )  # fmt: skip
    # The reference's state after no step is the one it was given, which is the caller's.
    alone = num_layers == 1 and backend == "cpu"
    h, c = (h_n[0], c_n[0]) if alone else (torch.cat(h_n), torch.cat(c_n))
    results = (x, h, c, *([cells] if return_cells else []))
    return tuple(t.to(dtype) for t in results)


def describe_problem(
    input: Tensor,
    dtype: torch.dtype,
    batch: Batch,
    hidden: int,
    directions: int,
    num_layers: int,
    records: bool,
    return_cells: bool,
    process_group: bool,
) -> dispatch.Problem:
    return dispatch.Problem(
        cell="bnlstm",
        device=input.device.type,
        dtype=ops.state_dtype(dtype),
        given=dtype,
        training=records,
        steps=batch.steps,
        batch=batch.size,
        input_size=input.size(-1),
        hidden_size=hidden,
        proj_size=0,
        directions=directions,
        num_layers=num_layers,
        packed=batch.batch_sizes is not None,
        lengths=batch.lengths is not None,
        reset=batch.reset is not None,
        return_cells=return_cells,
        transforms=dispatch.transformed(),
        process_group=process_group,
        ordinal=input.device.index,
    )


def _layer(
    backend: str,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    given: Sequence[Tensor],
    batch: Batch,
    eps: float,
    batch_stats: bool,
    sequence: bool,
    return_cells: bool,
    records: bool,
    process_group: Any,
    cache: tuple[WeightCache, int, bool] | None,
) -> tuple[Tensor, ...]:
    """y, h_n, c_n, cells and the three used statistics of one layer."""
    _, _, batch_first, batch_sizes, lengths, reset = batch
    plan = backend if backend in ("cuda", "triton") else ""
    if backend == "reference":
        return reference_bnlstm.layer(
            x, h, c, weights, given, batch_sizes, lengths, reset, eps, batch_stats, sequence,
            batch_first, process_group,
        )  # fmt: skip
    if records:
        if is_compiling():
            x, h, c, *weights = distinct([x, h, c, *weights])
        options = (batch_stats, sequence, batch_first, plan)
        return BNLSTMLayer.apply(
            x, h, c, batch_sizes, lengths, reset, eps, options, len(weights), *weights, *given
        )
    packed = None
    if cache is not None and backend == "cpu":
        keeper, k, bias = cache
        per = 6 + bias
        matrices = [w for i, w in enumerate(weights) if i % per < 2]
        packed = keeper.packed(k, matrices, "lstm", "")
    direct = ops.unobserved(x, h, c, lengths, reset, *weights, *given)
    run = ops.BNLSTM_CPU["bnlstm_forward"] if direct else ops.bnlstm_forward
    y, h_n, c_n, cells, _, *used = run(
        x, h, c, weights, given, packed, batch_sizes, lengths, reset, eps, batch_stats, sequence,
        batch_first, return_cells, False, plan,
    )  # fmt: skip
    return y, h_n, c_n, cells, *used


def _given(statistics: Sequence[Tensor], first: int, dtype: torch.dtype) -> list[Tensor]:
    """The running statistics from step ``first`` on; the last row serves all later steps."""
    rows = []
    for i, buffer in enumerate(statistics):
        if i % STATISTICS == STATISTICS - 1:
            continue
        at = min(first, buffer.size(0) - 1)
        row = buffer[at:] if at else buffer
        rows.append(row if row.dtype is dtype else row.to(dtype))
    return rows


def _live_rows(batch: Batch, steps: int, device: torch.device, group: Any) -> Tensor | int:
    """How many sequences reach each step: (steps,), or N where all have the same length."""
    if group is None and batch.lengths is None and batch.batch_sizes is None:
        return batch.size
    if batch.batch_sizes is not None:
        live = torch.zeros(steps, dtype=torch.int64, device=batch.batch_sizes.device)
        live[: batch.steps] = batch.batch_sizes
        live = live.to(device)
    else:
        t = torch.arange(steps, device=device).unsqueeze(1)
        ends = torch.full((batch.size,), batch.steps, device=device)
        live = (t < (ends if batch.lengths is None else batch.lengths)).sum(1)
    if group is not None:
        torch.distributed.all_reduce(live, group=group)
    return live


def _followed(
    statistics: Sequence[Tensor],
    used: _Used,
    live: Tensor | int,
    momentum: float | None,
    first: int,
) -> bool:
    """Whether the CPU library has moved the statistics of a layer as ``_update`` would."""
    if momentum is None or isinstance(live, Tensor) or live < 2:
        return False
    return ops.unobserved(*statistics, *used) and cpu_bnlstm.follow(
        statistics, used, first, momentum
    )


def _update(
    statistics: Sequence[Tensor],
    used: Sequence[Tensor],
    live: Tensor | int,
    momentum: float | None,
    first: int,
) -> None:
    """Move the running statistics of one direction towards those of this batch.

    Only steps with two live rows or more have any; step s moves row s, and no row beyond the last.
    """
    *buffers, tracked = statistics
    given, rows_left = used[1].size(1), tracked.size(0) - first
    # torch.export cannot reason about a minimum; with steps bounded by the rows there is none.
    steps = given if is_exporting() and given <= rows_left else min(given, rows_left)
    if steps <= 0 or (not isinstance(live, Tensor) and live < 2):
        return
    counts = tracked.narrow(0, first, steps)
    weight: Tensor | float
    if not isinstance(live, Tensor):
        counts.add_(1)
        weight = (1.0 / counts.double()).unsqueeze(1) if momentum is None else momentum
    else:
        valid = live[:steps] >= 2
        counts.add_(valid.to(counts.dtype))
        share = 1.0 / counts.clamp(min=1).double() if momentum is None else torch.full_like(
            counts, momentum, dtype=torch.float64
        )  # fmt: skip
        weight = torch.where(valid, share, torch.zeros_like(share)).unsqueeze(1)
    for i, buffer in enumerate(buffers):
        found = used[i // 2][i % 2]
        shared = i < 2 and buffer.size(0) == 1
        rows = 1 if shared else steps
        mine = weight[:rows].to(found.dtype) if isinstance(weight, Tensor) else weight
        target = buffer.narrow(0, 0 if shared else first, rows)
        if buffer.dtype == found.dtype:
            target.lerp_(found[:rows], mine)
        else:
            target.copy_(target.to(found.dtype).lerp(found[:rows], mine))


def check_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    statistics: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    directions: int,
    sequence: bool,
    autocast: bool,
) -> int:
    """Check number, shape, dtype and device of weights and statistics; returns H."""
    per = 6 + bool(bias)
    for name, tensors, expected in (
        ("flat_weights", weights, per),
        ("flat_statistics", statistics, STATISTICS),
    ):
        if len(tensors) != num_layers * directions * expected:
            raise ValueError(
                f"{name}: got {len(tensors)} tensors, expected {expected} for each of "
                f"{num_layers} layers and {directions} directions (bias={bias})"
            )
    for name, tensors, index, rank in (
        ("flat_weights", weights, 0, 2),
        ("flat_weights", weights, 1, 2),
        ("flat_statistics", statistics, len(statistics) - 1, 1),
    ):
        if tensors[index].dim() != rank:
            raise RuntimeError(
                f"{name}[{index}]: got shape {tuple(tensors[index].shape)}, "
                f"expected {rank} dimensions"
            )
    features, hidden, most = input.size(-1), weights[1].size(-1), statistics[-1].size(0)
    if most < 1:
        raise ValueError(
            "flat_statistics: got no rows, expected those of one step at least (max_length)"
        )
    if weights[0].size(-1) != features:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. Expected "
            f"{weights[0].size(-1)}, got {features}"
        )
    wide, gates = directions * hidden, 4 * hidden
    ih = (1 if sequence else most, gates)
    buffers = (ih, ih, (most, gates), (most, gates), (most, hidden), (most, hidden), (most,))
    vectors = [(gates,)] * (2 + bool(bias)) + [(hidden,)] * 2
    for i in range(num_layers * directions):
        inputs = features if i < directions else wide
        for name, tensors, shapes in (
            ("flat_weights", weights, [(gates, inputs), (gates, hidden), *vectors]),
            ("flat_statistics", statistics, buffers),
        ):
            for j, shape in enumerate(shapes):
                index = i * len(shapes) + j
                tensor = tensors[index]
                if tensor.shape != shape:
                    raise RuntimeError(
                        f"{name}[{index}]: got shape {tuple(tensor.shape)}, expected {shape} with "
                        f"hidden_size {hidden}"
                    )
                if tensor.device != input.device:
                    raise RuntimeError(
                        "Input and parameter tensors are not at the same device, found input "
                        f"tensor at {input.device} and {name}[{index}] at {tensor.device}"
                    )
                if name == "flat_weights" and tensor.dtype != input.dtype and not autocast:
                    raise ValueError(
                        f"RNN input dtype ({input.dtype}) does not match weight dtype "
                        f"({tensor.dtype}). Convert input: input.to({tensor.dtype}), or convert "
                        f"model: model.to({input.dtype})"
                    )
    return hidden
