"""The operators of ``torch.library`` that every backend implements."""

from fastrnn.ops.layer import (
    CPU,
    layer_backward,
    layer_forward,
    layer_forward_train,
    pack_weights,
    state_dtype,
    unobserved,
)
from fastrnn.ops.random import random_mask

__all__ = [
    "CPU",
    "layer_backward",
    "layer_forward",
    "layer_forward_train",
    "pack_weights",
    "random_mask",
    "state_dtype",
    "unobserved",
]
