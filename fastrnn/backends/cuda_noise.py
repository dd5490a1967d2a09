"""Recurrent dropout and zoneout of a layer on the CUDA kernels: what a launch is told, and states
masked outside of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.cuda_grid import Grid
from fastrnn.backends.cuda_native import Launcher
from fastrnn.noise import MODES, Noise, seed_on

__all__ = ["Regulariser"]


class Regulariser:
    """The regularisers of one call.

    Attributes:
        acts: whether the kernels have to have them.
        masks_state: whether h is masked where it enters the matrix product.
    """

    def __init__(self, text: str, seed: Tensor | None, like: Tensor) -> None:
        self._noise = noise = Noise.parse(text)
        self.acts = noise.acts
        self.masks_state = noise.training and noise.mode == "state"
        self._seed: Tensor | None = None
        if not (self.acts and noise.training):
            return
        if seed is None:
            raise ValueError(f"seed: got None, expected a tensor for noise {text!r}")
        self._seed = seed_on(seed, like.device)

    def fields(self, first: int) -> tuple[Any, ...]:
        """What the library is told of the launch whose row 0 is row ``first`` of the batch."""
        noise = self._noise
        return (
            MODES.index(noise.mode) + 1 if noise.mode else 0,
            noise.sequence,
            0 if self._seed is None else self._seed.data_ptr(),
            noise.layer,
            first,
            noise.drop,
            noise.zoneout_h,
            noise.zoneout_c,
        )

    def initial(self, launcher: Launcher, grid: Grid, h0: Tensor) -> Tensor:
        """(D, N, H): h0 as the first step's product takes it."""
        out = torch.empty_like(h0)
        for d in range(h0.size(0)):
            states = (grid.state(h0, d, 0), grid.state(out, d, 0), *self._shape(grid, h0, d), 0, 0)
            launcher.mask_states(self.fields(0), states)
        return out

    def of_steps(self, launcher: Launcher, grid: Grid, before: Tensor, d: int) -> Tensor:
        """(rows, H): the states before all steps of a direction, as their products took them."""
        out = torch.empty_like(before)
        source, target = grid.at(before, 0, 0), grid.at(out, 0, 0)
        states = (source[0], target[0], *self._shape(grid, before, d), *source[1:])
        launcher.mask_states(self.fields(0), states)
        return out

    def _shape(self, grid: Grid, states: Tensor, d: int) -> tuple[int, ...]:
        return grid.steps, grid.size, states.size(-1), grid.lengths_at(0), d
