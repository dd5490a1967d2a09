"""The modules: parameters, arguments and errors. All arithmetic is in `fastrnn.functional`."""

from fastrnn.nn.bnlstm import BNLSTM
from fastrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.nn.rhn import RHN
from fastrnn.nn.rnn import GRU, LSTM, RNN

__all__ = ["BNLSTM", "GRU", "LSTM", "RHN", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
