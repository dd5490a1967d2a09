"""Recurrent layers for PyTorch at the speed of the hardware, as drop-ins for `torch.nn`.

    import fastrnn
    rnn = fastrnn.LSTM(64, 128, num_layers=2)          # instead of torch.nn.LSTM
    output, (h_n, c_n) = rnn(torch.randn(50, 8, 64))

`fastrnn.replace(model)` swaps the layers of a model that already exists, `fastrnn.patch()` those
of code that cannot be edited, and `fastrnn.explain(module, input)` says what runs and why.
"""

from fastrnn import functional
from fastrnn._version import __version__
from fastrnn.dispatch import Explanation, explain, use_backend
from fastrnn.nn import BNLSTM, GRU, LSTM, RHN, RNN, GRUCell, LSTMCell, RNNCell
from fastrnn.surgery import patch, replace, restore

__all__ = [
    "BNLSTM",
    "GRU",
    "LSTM",
    "RHN",
    "RNN",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "explain",
    "functional",
    "patch",
    "replace",
    "restore",
    "use_backend",
]
