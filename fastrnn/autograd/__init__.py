"""Gradients: one differentiable ``torch.autograd.Function`` per kind of layer."""

from fastrnn.autograd.layer import Layer, LayerBackward, distinct
from fastrnn.autograd.rhn import RhnLayer, RhnLayerBackward

__all__ = ["Layer", "LayerBackward", "RhnLayer", "RhnLayerBackward", "distinct"]
