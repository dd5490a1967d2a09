"""Gradients: one differentiable ``torch.autograd.Function`` per kind of layer."""

from fastrnn.autograd.layer import Layer, LayerBackward, distinct

__all__ = ["Layer", "LayerBackward", "distinct"]
