"""Gradients: one differentiable ``torch.autograd.Function`` per kind of layer."""

from fastrnn.autograd.bnlstm import BNLSTMLayer, BNLSTMLayerBackward, PreparedBNLSTMLayer
from fastrnn.autograd.layer import Layer, LayerBackward, PreparedLayer, distinct
from fastrnn.autograd.plain import PlainLayer
from fastrnn.autograd.rhn import PreparedRhnLayer, RhnLayer, RhnLayerBackward

__all__ = [
    "BNLSTMLayer",
    "BNLSTMLayerBackward",
    "Layer",
    "LayerBackward",
    "PlainLayer",
    "PreparedBNLSTMLayer",
    "PreparedLayer",
    "PreparedRhnLayer",
    "RhnLayer",
    "RhnLayerBackward",
    "distinct",
]
