"""Recurrent layers as functions: a whole stack of layers, or one step of a cell."""

from fastrnn.functional.bnlstm import bnlstm
from fastrnn.functional.rhn import rhn
from fastrnn.functional.stack import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = ["bnlstm", "gru", "gru_cell", "lstm", "lstm_cell", "rhn", "rnn", "rnn_cell"]
