"""What the reference cells share: the walk over time, frozen rows, resets and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
LAYER_NORM_EPS = 1e-5  # as in csrc/cpu/layer.h


class Step(NamedTuple):
    """One time step t: its input, and masks (N, 1) of the rows to reset and the rows that run."""

    t: int
    x: Tensor
    clear: Tensor | None
    live: Tensor | None

    def start(self, state: Tensor) -> Tensor:
        """The state (N, K) this step reads: zero where a reset is due."""
        if self.clear is None:
            return state
        return torch.where(self.clear, torch.zeros_like(state), state)


def make_steps(
    x: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool
) -> Iterator[Step]:
    """Yield the steps of x (T, N, I) in processing order."""
    inputs = x.unbind(0)
    order = range(len(inputs) - 1, -1, -1) if reverse else range(len(inputs))
    for t in order:
        x_t = inputs[t]
        live = None if lengths is None else (lengths > t).unsqueeze(1)
        if live is not None:
            # A mask by selection: padding may hold NaN, which a product with 0 would keep.
            x_t = torch.where(live, x_t, torch.zeros_like(x_t))
        yield Step(t, x_t, None if reset is None else reset[t].unsqueeze(1), live)


def freeze(step: Step, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The state after a step and its output: the old state and 0 on a frozen row."""
    if step.live is None:
        return new, new
    return torch.where(step.live, new, old), torch.where(step.live, new, torch.zeros_like(new))


def stack_steps(steps: Sequence[Tensor], state: Tensor, x: Tensor, reverse: bool) -> Tensor:
    """Outputs in processing order -> (T, N, K) in time order; (0, N, K) when there is no step."""
    if not steps:
        return x.new_zeros((0, *state.shape))
    return torch.stack(list(reversed(steps)) if reverse else list(steps))


def normalised(term: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Layer norm of (N, K) over K, differentiable to any order, which torch's is only twice."""
    if term.dtype == torch.float16:  # whose range ends before the slope of 1 / sqrt(var + eps) at 0
        bias = None if bias is None else bias.float()
        return normalised(term.float(), gain.float(), bias).half()
    centred = term - term.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(variance + LAYER_NORM_EPS) * gain
    return scaled if bias is None else scaled + bias


def activations(linear: bool) -> tuple[Activation, Activation]:
    """(sigmoid, tanh), or their tangents at 0, which hide no error behind saturation."""
    if linear:
        return lambda a: 0.5 + 0.25 * a, lambda a: a
    return torch.sigmoid, torch.tanh
