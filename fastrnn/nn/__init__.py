"""The modules: parameters, arguments and errors. All arithmetic is in `fastrnn.functional`."""

from fastrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.nn.rhn import RHN
from fastrnn.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RHN", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
