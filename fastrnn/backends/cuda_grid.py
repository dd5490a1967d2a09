"""Steps and sequences as the CUDA kernels address them: row (t, n) of every tensor is
t * stride_t + n * stride_n, so packed data are spread over T * N rows and gathered again."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.backends.rows import describe

__all__ = ["Grid", "states_before"]


class Grid:
    """The rows of a call.

    Attributes:
        rows: those of x.
        count: T * N, the rows of what the kernels read and write, in x's order or time-major.
    """

    def __init__(
        self,
        x: Tensor,
        size: int,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_first: bool,
    ) -> None:
        self.rows = describe(x, size, batch_sizes, lengths, reset, batch_first)
        self.steps, self.size, self.count = self.rows.steps, size, self.rows.steps * size
        # A single step or sequence has rows in both orders: the order is not read off the strides.
        self.batch_first = batch_first and batch_sizes is None
        self.strides = (1, self.steps) if self.batch_first else (size, 1)
        ends = self.rows.lengths
        self.lengths = None if ends is None else ends.to(torch.int32)
        self.reset = None
        if self.rows.reset is not None:
            self.reset = (self.rows.reset.t() if self.batch_first else self.rows.reset).contiguous()
        self.index = None
        if self.rows.offsets is not None:
            row = torch.arange(self.rows.rows, device=x.device)
            step = torch.searchsorted(self.rows.offsets, row, right=True) - 1
            self.index = step * size + row - self.rows.offsets[step]

    def spread(self, data: Tensor) -> Tensor:
        """Rows of x as the kernels' rows; those that packed data do not have are zeros."""
        if self.index is None:
            return data
        return data.new_zeros((self.count, data.size(1))).index_copy_(0, self.index, data)

    def gather(self, data: Tensor) -> Tensor:
        """The kernels' rows as rows of x."""
        return data if self.index is None else data.index_select(0, self.index)

    def time_major(self, data: Tensor) -> Tensor:
        """(T, N, width)."""
        if self.batch_first:
            return data.view(self.size, self.steps, -1).transpose(0, 1)
        return data.view(self.steps, self.size, -1)

    def as_rows(self, data: Tensor) -> Tensor:
        """(T, N, width) as the kernels' rows."""
        return (data.transpose(0, 1) if self.batch_first else data).reshape(self.count, -1)

    def padding(self) -> Tensor | None:
        """(T, N, 1) bool, True past the end of a sequence; None if no sequence ends early."""
        if self.lengths is None:
            return None
        t = torch.arange(self.steps, device=self.lengths.device)
        return (t[:, None] >= self.lengths).unsqueeze(-1)

    def without_padding(self, data: Tensor) -> Tensor:
        """Rows that are zero past the end of a sequence."""
        dead = self.padding()
        return data if dead is None else data.masked_fill(self.as_rows(dead), 0.0)

    def at(self, data: Tensor | None, column: int, first: int) -> list[int]:
        """Address of row (0, first) from a column on, and the strides of steps and rows."""
        if data is None:
            return [0, 0, 0]
        width = data.size(-1)
        elements = first * self.strides[1] * width + column
        address = data.data_ptr() + elements * data.element_size()
        return [address, self.strides[0] * width, self.strides[1] * width]

    def steps_at(self, data: Tensor | None, column: int, first: int) -> list[int]:
        """``at`` of a dense tensor (steps or micro-steps, N, width), whatever the order of rows."""
        if data is None:
            return [0, 0, 0]
        width = data.size(-1)
        address = data.data_ptr() + (first * width + column) * data.element_size()
        return [address, self.size * width, width]

    def state(self, data: Tensor | None, direction: int, first: int) -> int:
        """Address of a row of a (D, N, H) state."""
        if data is None:
            return 0
        rows = direction * self.size + first
        return data.data_ptr() + rows * data.size(-1) * data.element_size()

    def lengths_at(self, first: int) -> int:
        return 0 if self.lengths is None else self.lengths.data_ptr() + 4 * first

    def reset_of(self, first: int, end: int) -> Tensor | None:
        """(T, end - first), dense."""
        return None if self.reset is None else self.reset[:, first:end].contiguous()


def states_before(grid: Grid, y: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """The state that each step started from, in the kernels' rows; finite past a sequence's end.

    Args:
        y: (rows, H) of one direction; h0: (N, H).
    """
    steps = grid.time_major(y.contiguous())
    start = h0.unsqueeze(0)
    before = torch.cat([steps[1:], start] if reverse else [start, steps[:-1]])
    if reverse and grid.lengths is not None:
        t = torch.arange(grid.steps, device=y.device)
        last = (t[:, None] == grid.lengths - 1).unsqueeze(-1)
        before = torch.where(last, start, before)
    if grid.reset is not None:
        before = before.masked_fill(grid.reset.bool().unsqueeze(-1), 0.0)
    return grid.as_rows(before)
