"""Batch-normalised LSTM: one layer, one direction, in plain PyTorch.

For every step s, with the gate rows of the weights in torch's order i, f, g, o:

    (z_i, z_f, z_g, z_o) = BN(h W_hh^T; gamma_hh) + BN(x W_ih^T; gamma_ih) + bias
    c' = sigmoid(z_f) * c + sigmoid(z_i) * tanh(z_g)
    h' = sigmoid(z_o) * tanh(BN(c'; gamma_c) + beta_c)
    BN(u; gamma) = gamma * (u - mean) / sqrt(var + eps)

Mean and biased variance are over the batch, apart for every step; gamma, beta and bias are shared
by all steps. The carry c' itself is not normalised.

Source: Cooijmans, Ballas, Laurent, Gulcehre, Courville 2016 (arXiv:1603.09025). As there, the two
batch norms of the pre-activations have no shift of their own: bias carries both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrnn.reference._steps import Step, activations, freeze, make_steps, stack_steps

__all__ = ["Moments", "batch_moments", "bnlstm_layer", "turn"]

# (values (.., K), live rows (.., 1) or None) -> mean (K), biased variance (K), number of rows.
Moments = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, "Tensor | int"]]


def batch_moments(values: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance of the live rows of this batch, and how many they are."""
    values = values.flatten(0, -2)
    if live is None:
        return values.mean(0), values.var(0, correction=0), values.size(0)
    live = live.flatten(0, -2)
    count = live.sum()
    rows = count.clamp(min=1)
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    mean = torch.where(live, values, zero).sum(0) / rows
    var = torch.where(live, (values - mean).square(), zero).sum(0) / rows
    return mean, var, count


def turn(data: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse data (T, N, ...) in time, each sequence within its own length."""
    if lengths is None:
        return data.flip(0)
    t = torch.arange(data.size(0), device=data.device).unsqueeze(1)
    source = torch.where(t < lengths, lengths - 1 - t, t)
    source = source.reshape(*source.shape, *[1] * (data.dim() - 2)).expand_as(data)
    return data.gather(0, source)


def bnlstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    running: Sequence[Tensor],
    *,
    batch_stats: bool,
    eps: float,
    sequence: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    linear: bool = False,
    moments: Moments = batch_moments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one direction of a batch-normalised LSTM layer.

    Steps are counted in the order of processing, from each sequence's own first step: with
    ``reverse``, step s of row n is time lengths[n] - 1 - s.

    Args:
        x: (T, N, I), padded where ``lengths`` is given; values past an end are never read.
        h0, c0: (N, H).
        weights: w_ih (4H, I), w_hh (4H, H)[, bias (4H)], gamma_ih (4H), gamma_hh (4H),
            gamma_c (H), beta_c (H).
        running: mean and variance of the input term (L, 4H), of the recurrent term (L, 4H) and of
            the cell (L, H); step s reads row min(s, L - 1). L may differ.
        batch_stats: normalise by the statistics of the batch. A step with fewer than two live
            rows, and all steps if False, take ``running`` instead.
        eps: added to the variance.
        sequence: one statistic of the input term over all live (t, n), for all steps; ``running``
            where N < 2.
        reverse, lengths, reset, linear: as in ``lstm_layer``.
        moments: computes the statistics; the default is of this batch alone.

    Returns:
        y (T, N, H), h_n (N, H), c_n (N, H), cells (T, N, H), and the statistics used, mean and
        variance stacked, without gradient: input term (2, T, 4H), or (2, 1, 4H) if ``sequence``,
        recurrent term (2, T, 4H), cell (2, T, H).
    """
    w_ih, w_hh, *rest = weights
    bias = rest.pop(0) if len(rest) == 5 else None
    gamma_ih, gamma_hh, gamma_c, beta_c = rest
    sigmoid, tanh = activations(linear)
    if reverse:
        x = turn(x, lengths)
        reset = None if reset is None else turn(reset, lengths)

    used: list[list[Tensor]] = [[], [], []]

    def normalise(
        term: int, s: int, values: Tensor, live: Tensor | None, rows: Tensor | int | None = None
    ) -> Tensor:
        """BN without gamma; ``rows``: the batch, where ``values`` are more than one step's."""
        mean, var = (row[min(s, row.size(0) - 1)] for row in running[2 * term : 2 * term + 2])
        if batch_stats:
            batch_mean, batch_var, count = moments(values, live)
            count = count if rows is None else rows
            if isinstance(count, Tensor):
                mean = torch.where(count >= 2, batch_mean, mean)
                var = torch.where(count >= 2, batch_var, var)
            elif count >= 2:
                mean, var = batch_mean, batch_var
        used[term].append(torch.stack([mean, var]).detach())
        return (values - mean) * torch.rsqrt(var + eps)

    steps = list(make_steps(x, lengths, reset, False))
    inputs = [torch.nn.functional.linear(step.x, w_ih) for step in steps]
    if sequence and steps:
        live = None if lengths is None else torch.stack([_live(step) for step in steps])
        # A batch of one has no statistics, however long its sequence is.
        rows = moments(inputs[0], None)[2] if batch_stats else None
        inputs = list(normalise(0, 0, torch.stack(inputs), live, rows).unbind(0))
    h, c = h0, c0
    ys: list[Tensor] = []
    cells: list[Tensor] = []
    for s, step in enumerate(steps):
        h_prev, c_prev = step.start(h), step.start(c)
        b = inputs[s] if sequence else normalise(0, s, inputs[s], step.live)
        a = normalise(1, s, torch.nn.functional.linear(h_prev, w_hh), step.live)
        z = gamma_hh * a + gamma_ih * b
        z_i, z_f, z_g, z_o = (z if bias is None else z + bias).chunk(4, dim=-1)
        c_new = sigmoid(z_f) * c_prev + sigmoid(z_i) * tanh(z_g)
        h_new = sigmoid(z_o) * tanh(gamma_c * normalise(2, s, c_new, step.live) + beta_c)
        h, y = freeze(step, h_new, h)
        c, cell = freeze(step, c_new, c)
        ys.append(y)
        cells.append(cell)
    y, states = stack_steps(ys, h, x, False), stack_steps(cells, c, x, False)
    if reverse:
        y, states = turn(y, lengths), turn(states, lengths)
    statistics = (torch.stack(rows, 1) for rows in used)
    return y, h, c, states, *statistics  # type: ignore[return-value]


def _live(step: Step) -> Tensor:
    assert step.live is not None
    return step.live
