"""A batch-normalised LSTM layer, both directions, by the plain-PyTorch recurrence.

It also serves statistics over a process group, which no fused kernel does: every statistic is a sum
over all ranks, by collectives that autograd can walk back through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastrnn.backends.reference import from_layout, to_layout, without_autocast
from fastrnn.reference.bnlstm import Moments, batch_moments, bnlstm_layer

__all__ = ["layer", "most_steps"]


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    running: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    eps: float,
    batch_stats: bool,
    sequence: bool,
    batch_first: bool,
    process_group: Any = None,
) -> tuple[Tensor, ...]:
    """Run one layer; arguments and results as ``fastrnn::bnlstm_forward``, without the tape.

    ``process_group``: statistics are over the rows of all its ranks.
    """
    x, lengths, reset, live = from_layout(x, h0.size(1), batch_sizes, lengths, reset, batch_first)
    steps = x.size(0)
    moments: Moments = batch_moments
    if process_group is not None and batch_stats:
        x, lengths, reset = _pad_to_group(x, lengths, reset, process_group)
        moments = _GroupMoments(process_group)
    directions = h0.size(0)
    per, per_running = len(weights) // directions, len(running) // directions
    with without_autocast(x):
        results = [
            bnlstm_layer(
                x,
                h0[d],
                c0[d],
                weights[d * per : (d + 1) * per],
                running[d * per_running : (d + 1) * per_running],
                batch_stats=batch_stats,
                eps=eps,
                sequence=sequence,
                reverse=d == 1,
                lengths=lengths,
                reset=reset,
                moments=moments,
            )
            for d in range(directions)
        ]
    y, h, c, cells, *used = zip(*results)
    return (
        to_layout([part[:steps] for part in y], live, batch_first),
        torch.stack(h),
        torch.stack(c),
        to_layout([part[:steps] for part in cells], live, batch_first),
        *(torch.stack(part) for part in used),
    )


class _SumOverRanks(Function):
    """The sum over all ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad.contiguous(), ctx.group), None


class _GroupMoments:
    """``batch_moments`` over the rows of all ranks."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, values: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        values = values.flatten(0, -2)
        mask = values.new_ones((values.size(0), 1)) if live is None else live.flatten(0, -2)
        zero = values.new_zeros(())
        kept = values if live is None else torch.where(mask, values, zero)
        count = mask.sum().to(values.dtype).reshape(1)
        total = _SumOverRanks.apply(torch.cat([kept.sum(0), count]), self._group)
        rows = total[-1].detach()
        mean = total[:-1] / rows.clamp(min=1)
        squares = (values - mean).square()
        squares = squares if live is None else torch.where(mask, squares, zero)
        var = _SumOverRanks.apply(squares.sum(0), self._group) / rows.clamp(min=1)
        return mean, var, rows


def most_steps(steps: int, device: torch.device, group: Any) -> int:
    """The longest sequence of any rank."""
    most = torch.tensor([steps], device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(most)


def _pad_to_group(
    x: Tensor, lengths: Tensor | None, reset: Tensor | None, group: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The ranks meet at every step, so all take as many steps as the longest sequence has."""
    steps, size = x.shape[:2]
    more = most_steps(steps, x.device, group) - steps
    if more:
        if lengths is None:
            lengths = torch.full((size,), steps, device=x.device)
        x = torch.cat([x, x.new_zeros((more, *x.shape[1:]))])
        reset = None if reset is None else torch.cat([reset, reset.new_zeros((more, size))])
    return x, lengths, reset
