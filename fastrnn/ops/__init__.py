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
from fastrnn.ops.plain import (
    plain_backward,
    plain_forward,
    plain_forward_into,
    plain_forward_train,
)
from fastrnn.ops.random import random_mask
from fastrnn.ops.rhn import RHN_CPU, rhn_backward, rhn_forward, rhn_forward_train

__all__ = [
    "BNLSTM_CPU",
    "CPU",
    "RHN_CPU",
    "bnlstm_backward",
    "bnlstm_forward",
    "layer_backward",
    "layer_forward",
    "layer_forward_train",
    "pack_weights",
    "plain_backward",
    "plain_forward",
    "plain_forward_into",
    "plain_forward_train",
    "random_mask",
    "rhn_backward",
    "rhn_forward",
    "rhn_forward_train",
    "state_dtype",
    "unobserved",
]
