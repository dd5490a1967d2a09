"""What the GPU backends share: the rows of a layer's sequences, its weights by kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.kinds import GATES, KINDS

__all__ = ["Rows", "Weights", "alone", "dense", "describe", "tf32_allowed"]


class Rows(NamedTuple):
    """Steps of sequences as rows of matrices: row (t, n) is t * stride_t + n * stride_n, or
    offsets[t] + n of packed data."""

    steps: int
    size: int
    rows: int
    stride_t: int
    stride_n: int
    lengths: Tensor | None
    reset: Tensor | None
    offsets: Tensor | None

    def arguments(self) -> dict[str, Any]:
        return {
            "lengths": self.lengths,
            "reset": self.reset,
            "offsets": self.offsets,
            "T": self.steps,
            "N": self.size,
            "R": self.rows,
            "stride_t": self.stride_t,
            "stride_n": self.stride_n,
            "zero": 0,
        }

    def flat(self, x: Tensor) -> Tensor:
        """The rows of x as a matrix."""
        return x.reshape(self.rows, x.size(-1))

    def sequence_of_row(self, device: torch.device) -> Tensor:
        """(rows,) which sequence each row belongs to."""
        if self.offsets is None:
            rows = torch.arange(self.rows, device=device)
            return rows % self.size if self.stride_n == 1 else rows // self.steps
        rows = torch.arange(self.rows, device=device)
        step = torch.searchsorted(self.offsets, rows, right=True) - 1
        return rows - self.offsets[step]

    def without_padding(self, x: Tensor) -> Tensor:
        """The rows of x, zero past the end of a sequence, where there may be NaN."""
        x = self.flat(x)
        if self.lengths is None or self.offsets is not None:
            return x
        return x.masked_fill(self.padding(x.device).reshape(-1, 1), 0.0)

    def padding(self, device: torch.device) -> Tensor:
        """(T, N), or (N, T) if batch_first: True past the end of a sequence."""
        assert self.lengths is not None
        t = torch.arange(self.steps, device=device)
        dead = t[:, None] >= self.lengths[None, :]
        return dead if self.stride_n == 1 else dead.t()


def describe(
    x: Tensor,
    size: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
) -> Rows:
    """The rows of x in the layouts of ``fastrnn.ops.layer``."""
    if batch_sizes is not None:
        starts = torch.cumsum(batch_sizes, 0) - batch_sizes
        rows = torch.arange(size, device=batch_sizes.device)
        ends = (batch_sizes.unsqueeze(1) > rows).sum(0)
        ends, starts = _onto(ends, x.device), _onto(starts, x.device)
        return Rows(batch_sizes.size(0), size, x.size(0), 0, 1, ends, None, starts)
    steps = x.size(1 if batch_first else 0)
    stride_t, stride_n = (1, steps) if batch_first else (size, 1)
    if lengths is not None:  # a traced call has not looked at the values; every row has a last step
        lengths = lengths.to(x.device).clamp(1, steps).contiguous()
    # Rows of reset are the rows of x.
    clear = None if reset is None else reset.to(x.device).contiguous().view(torch.uint8)
    return Rows(steps, size, steps * size, stride_t, stride_n, lengths, clear, None)


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; a copy from pinned memory does not wait for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Weights:
    """The weights of a layer by kind, one tensor for each direction."""

    def __init__(self, weights: Sequence[Tensor], cell: str, directions: int) -> None:
        per = len(weights) // directions
        plain = per - KINDS[cell].norms
        self.gates = GATES[cell]
        self.w_ih = [weights[d * per] for d in range(directions)]
        self.w_hh = [weights[d * per + 1] for d in range(directions)]
        biased = plain >= 4
        self.b_ih = [weights[d * per + 2] for d in range(directions) if biased]
        self.b_hh = [weights[d * per + 3] for d in range(directions) if biased]
        self.w_hr = [weights[d * per + plain - 1] for d in range(directions) if plain % 2]
        self.norms = [list(weights[d * per + plain : (d + 1) * per]) for d in range(directions)]
        if plain == per:
            self.norms = []
        self.hidden = self.w_hh[0].size(0) // self.gates
        self.out = self.w_hh[0].size(1)
        self.directions = directions

    def inputs(self) -> Tensor:
        """(D*G*H, I)."""
        return self.w_ih[0] if self.directions == 1 else torch.cat(self.w_ih)


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def alone(part: Tensor) -> Tensor:
    """A tensor that shares its memory with no other result."""
    return (
        part
        if part.numel() * part.element_size() == part.untyped_storage().nbytes()
        else part.clone()
    )


def tf32_allowed() -> bool:
    """The switch of cuDNN's recurrent layers for float32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # torch refuses to name one precision where convolutions and RNNs were set apart.
        return False
