"""The ground truth: readable plain-PyTorch recurrences, any dtype, differentiable."""

from fastrnn.reference.bnlstm import bnlstm_layer
from fastrnn.reference.gru import gru_layer
from fastrnn.reference.lstm import lstm_layer
from fastrnn.reference.rhn import rhn_layer
from fastrnn.reference.rnn import rnn_layer

__all__ = ["bnlstm_layer", "gru_layer", "lstm_layer", "rhn_layer", "rnn_layer"]
