"""The operators of ``torch.library`` that every backend implements."""

from fastrnn.ops.bnlstm import BNLSTM_CPU, bnlstm_backward, bnlstm_forward
from fastrnn.ops.layer import (
    CPU,
    layer_backward,
    layer_forward,
    layer_forward_train,
    pack_weights,
    state_dtype,
    unobserved,
)

__all__ = [
    "BNLSTM_CPU",
    "CPU",
    "bnlstm_backward",
    "bnlstm_forward",
    "layer_backward",
    "layer_forward",
    "layer_forward_train",
    "pack_weights",
    "state_dtype",
    "unobserved",
]
