"""A training step of a Recurrent Highway layer whose shape was seen before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import dispatch
from fastrnn.autograd import PreparedRhnLayer
from fastrnn.backends.cpu_rhn import RhnCall
from fastrnn.functional.rhn import check_weights
from fastrnn.nn.stepper import TrainingCall


class RhnTrainingCall(TrainingCall):
    """As ``TrainingCall``, for an RHN with these ``options``: couple_carry, bias, bidirectional."""

    def __init__(self, options: tuple[bool, bool, bool], *args: Any) -> None:
        super().__init__(*args)
        self.options = options

    def _prepare(self, x: Tensor, weights: list[Tensor]) -> RhnCall | None:
        if x.dtype not in (torch.float32, torch.float64):  # 16-bit ones are widened
            return None
        couple_carry, bias, bidirectional = self.options
        directions = 2 if bidirectional else 1
        hidden = check_weights(x, weights, couple_carry, bias, 1, directions)
        highway = (weights[1].size(0), 2 if couple_carry else 3, False)
        backend, _ = dispatch.choose(
            self.cell, x, self._batch, (hidden, 0, directions, 1), True, False, False,
            highway=highway,
        )  # fmt: skip
        if backend != "cpu":
            return None
        return RhnCall(x, self._h_like, weights, self.layout.batch_first)

    def _run(
        self, layer: RhnCall, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        return PreparedRhnLayer.apply(layer, x, h, *weights)
