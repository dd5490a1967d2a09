"""Calls of a Recurrent Highway Network whose shape was seen before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import dispatch
from fastrnn.autograd import PreparedRhnLayer
from fastrnn.backends.cpu_rhn import RhnCall, inference_layer
from fastrnn.functional.rhn import check_weights
from fastrnn.nn.stepper import NativeCall, TrainingCall

_Options = tuple[bool, bool, bool]  # couple_carry, bias, bidirectional


def _runs_here(
    call: NativeCall | TrainingCall,
    options: _Options,
    x: Tensor,
    weights: list[Tensor],
    training: bool,
) -> bool:
    """Whether the CPU library makes the call; raises if the weights do not fit."""
    couple_carry, bias, _ = options
    check_weights(x, weights, couple_carry, bias, call.sizes[3], call.sizes[2])
    highway = (weights[1].size(0), 2 if couple_carry else 3, False)
    backend, _ = dispatch.choose(
        call.cell, x, call.batch, call.sizes, training, False, False, highway=highway
    )
    return backend == "cpu"


class RhnNativeCall(NativeCall):
    """As ``NativeCall``, for an RHN with these ``options``."""

    def __init__(self, options: _Options, *args: Any) -> None:
        super().__init__(*args)
        self.options = options

    def _plan(self, x: Tensor, weights: list[Tensor]) -> str | None:
        return "" if _runs_here(self, self.options, x, weights, False) else None

    def _layer(self, x: Tensor, weights: list[Tensor], packed: Tensor, plan: str) -> Any:
        directions, (steps, batch, *_) = self.sizes[2], self.layout
        strides = self._strides(weights[0].size(1), directions * weights[1].size(2))
        return inference_layer(strides, (steps, batch), directions, weights, packed)


class RhnTrainingCall(TrainingCall):
    """As ``TrainingCall``, for an RHN with these ``options``."""

    def __init__(self, options: _Options, *args: Any) -> None:
        super().__init__(*args)
        self.options = options

    def _prepare(self, x: Tensor, weights: list[Tensor]) -> RhnCall | None:
        if x.dtype not in (torch.float32, torch.float64):  # 16-bit ones are widened
            return None
        if not _runs_here(self, self.options, x, weights, True):
            return None
        return RhnCall(x, self._h_like, weights, self.layout.batch_first)

    def _run(
        self, layer: RhnCall, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        return PreparedRhnLayer.apply(layer, x, h, *weights)
